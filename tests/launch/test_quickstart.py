"""The quickstart's plan: what runs, what is skipped, what is shown."""

import json
import os
import signal
import subprocess
import threading
import time

import pytest

from llama_jax import errors, quickstart, stages


class Runner:
  """Stands for the verbs: notes the names, makes the outputs."""

  def __init__(self, losses=(2.0, 1.8)):
    self.names = []
    self.losses = dict(zip(("before", "after"), losses, strict=True))
    self.failing = {}

  def __call__(self, stage):
    self.names.append(stage.name)
    if stage.name in self.failing:
      failure = self.failing.pop(stage.name)
      if isinstance(failure, BaseException):
        raise failure
      return failure
    for path in stage.outputs:
      if path.suffix == ".json":
        loss = self.losses[path.stem]
        path.write_text(json.dumps({"mean_loss": loss}))
      elif path.suffix == ".txt":
        path.write_text(quickstart.PROMPT + f"        # {path.stem}\n")
      else:
        path.mkdir(exist_ok=True)
    return 0


VERBS = [
  "convert",
  "evaluate before",
  "generate before",
  "train",
  "evaluate after",
  "generate after",
]


@pytest.fixture
def start(tmp_path, monkeypatch):
  """start(steps=None) plays the quickstart with `start.runner` for verbs."""
  weights = tmp_path / "model.gguf"
  weights.write_bytes(b"weights")
  text = quickstart.standard_library.Split(("a",), ("b",), 1, 1)

  def write(*paths):
    for path in paths:
      path.write_bytes(b"text")
    return text

  monkeypatch.setattr(quickstart.standard_library, "write", write)
  monkeypatch.setattr(quickstart, "SPACE_BYTES", 0)
  workdir = tmp_path / "work dir"

  def begin(steps=None, weights=f"gguf:{weights}", runner=None):
    begin.runner = runner or Runner()
    monkeypatch.setattr(
      stages, "run_command", lambda stage: begin.runner(stage)
    )
    return quickstart.run(workdir, steps, weights)

  begin.workdir = workdir
  return begin


def test_runs_every_verb_once_in_order(start, capsys):
  assert start() == 0
  assert start.runner.names == VERBS
  assert start() == 0
  assert start.runner.names == []
  shown = capsys.readouterr().out
  assert "2.0000 -> 1.8000 nats per token, down 10.0%" in shown
  assert str(start.workdir / "run" / "curves.png") in shown
  assert "--chat" in shown
  assert "launch/quickstart.sh --steps=200" in shown


def test_command_lines_are_those_that_can_be_typed(start, capsys):
  start(steps=7)
  shown = capsys.readouterr().out
  work = start.workdir
  lines = [x for x in shown.splitlines() if x.startswith("$ ")]
  assert len(lines) == len(VERBS)
  # bash itself takes them apart again.
  words = subprocess.run(
    ["bash", "-c", "printf '%s\\0' " + lines[3].removeprefix("$ ")],
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split("\0")[:-1]
  assert words[:3] == ["python", "-m", "llama_jax.train"]
  assert f"--workdir={work / 'run'}" in words
  assert f"--config.init=orbax:{work / 'smollm2'}" in words
  assert f"--config.data.text={work / 'train.jsonl.gz'}" in words
  assert "--config.training.steps=7" in words
  prompt = subprocess.run(
    ["bash", "-c", "printf '%s\\0' " + lines[2].removeprefix("$ ")],
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split("\0")
  assert f"--prompt={quickstart.PROMPT}" in prompt


def test_more_steps_train_on_and_measure_again(start):
  start(steps=30)
  start(steps=60)
  assert start.runner.names == ["train", "evaluate after", "generate after"]
  assert start(steps=60) == 0
  assert start.runner.names == []


@pytest.mark.parametrize("name", VERBS)
def test_goes_on_after_a_failure(start, name):
  runner = Runner()
  runner.failing = {name: 3}
  assert start(runner=runner) == 3
  assert start() == 0
  assert start.runner.names == VERBS[VERBS.index(name) :]


@pytest.mark.parametrize(
  "failure, status",
  # Verbs that stopped and saved exit 130 and 143; others die of the signal.
  [(KeyboardInterrupt(), 130), (130, 130), (-2, 130), (143, 143), (-15, 143)],
)
def test_interrupt_is_one_line_and_goes_on(start, capsys, failure, status):
  runner = Runner()
  runner.failing = {"train": failure}
  assert start(runner=runner) == status
  line = "interrupted; type the same command again to go on"
  assert capsys.readouterr().out.count(line) == 1
  assert start() == 0
  assert start.runner.names == ["train", "evaluate after", "generate after"]


def test_part_of_an_output_is_removed_but_never_the_run(start):
  runner = Runner()
  runner.failing = {"convert": 1}
  start(runner=runner)
  for name in ("smollm2", "run"):
    (start.workdir / name).mkdir()
    (start.workdir / name / "part").write_text("half")
  assert start() == 0
  assert not (start.workdir / "smollm2" / "part").exists()
  assert (start.workdir / "run" / "part").exists()


def test_lost_output_is_made_again(start):
  start()
  (start.workdir / "after.json").unlink()
  assert start() == 0
  assert start.runner.names == ["evaluate after", "generate after"]


def test_other_weights_in_the_same_folder_are_refused(start, tmp_path):
  start()
  other = tmp_path / "other.gguf"
  other.write_bytes(b"")
  with pytest.raises(errors.UserError, match="begun with another command"):
    start(weights=f"gguf:{other}")
  assert start() == 0
  assert start.runner.names == []


@pytest.mark.parametrize("losses", [(2.0, 1.95), (2.0, 2.5)])
def test_loss_that_did_not_fall_is_said_and_fails(start, capsys, losses):
  assert start(runner=Runner(losses)) == 1
  assert "did not fall by 5%" in capsys.readouterr().out


def test_bad_weights_are_refused(start):
  with pytest.raises(errors.UserError, match=r"use one of .*gguf:PATH"):
    start(weights="model.gguf")
  with pytest.raises(errors.BadFileError, match=r"--weights=.* does not exist"):
    start(weights="gguf:/nowhere/model.gguf")


def test_full_disk_is_refused_before_converting(start, monkeypatch):
  monkeypatch.setattr(quickstart, "SPACE_BYTES", 1e18)
  with pytest.raises(errors.UserError, match="no space in"):
    start()
  assert start.runner.names == []


def test_a_workdir_that_cannot_be_made(start):
  start.workdir.write_text("a file")
  with pytest.raises(errors.UserError, match="--workdir="):
    start()


def _stage(tmp_path, code):
  return stages.Stage(
    "it",
    "it",
    (tmp_path / "out.txt",),
    ("-c", code),
    capture=tmp_path / "out.txt",
  )


def test_captured_output_is_kept_only_when_whole(tmp_path):
  assert stages.run_command(_stage(tmp_path, "print('all')")) == 0
  assert (tmp_path / "out.txt").read_text() == "all\n"
  (tmp_path / "out.txt").unlink()
  code = "print('half'); raise SystemExit(4)"
  assert stages.run_command(_stage(tmp_path, code)) == 4
  assert list(tmp_path.iterdir()) == []


def test_child_is_waited_for_when_interrupted(tmp_path):
  """Ctrl-C reaches both: the parent stays until the child has saved."""
  marker = tmp_path / "saved"
  child = (
    "import os, pathlib, signal, time\n"
    "def save(*_):\n"
    "  time.sleep(0.3)\n"
    f"  pathlib.Path({str(marker)!r}).write_text('saved')\n"
    "  raise SystemExit(130)\n"
    "signal.signal(signal.SIGINT, save)\n"
    f"ready = pathlib.Path({str(tmp_path / 'ready')!r})\n"
    "ready.with_suffix('.tmp').write_text(str(os.getpid()))\n"
    "ready.with_suffix('.tmp').rename(ready)\n"
    "time.sleep(20)\n"
  )
  stage = stages.Stage("it", "it", (), ("-c", child))
  ready = tmp_path / "ready"

  def press():  # as a terminal does: to the parent and to the child
    while not ready.exists():
      time.sleep(0.01)
    # Not to all children: the process that other tests talk to is one.
    os.kill(int(ready.read_text()), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)

  thread = threading.Thread(target=press)
  thread.start()
  assert stages.run_command(stage) == 130
  thread.join()
  assert marker.read_text() == "saved"


def test_columns_keep_lines_and_fit_the_terminal():
  left = "def f(x):\n    return [\n        x,\n    ]"
  right = "word " * 40 + "\n    indented\n\nlast"
  width = 90
  shown = quickstart.side_by_side((left, right), ("before", "after"), width)
  lines = shown.splitlines()
  assert all(len(line) <= width for line in lines)
  column = (width - 3) // 2
  rows = [(line[:column].rstrip(), line[column + 3 :]) for line in lines]
  assert rows[0] == ("before", "after")
  assert [a for a, _ in rows[2:6]] == left.splitlines()
  assert [b for _, b in rows[2:]][-3:] == ["    indented", "", "last"]
  assert " ".join(b for _, b in rows[2:]).split().count("word") == 40


def test_narrow_terminal_puts_one_above_the_other():
  shown = quickstart.side_by_side(("left " * 30, "right"), ("a", "b"), 50)
  assert " | " not in shown
  assert shown.index("left") < shown.index("right")
  assert max(map(len, shown.splitlines())) <= 50
