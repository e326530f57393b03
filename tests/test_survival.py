"""Training runs that are killed, stopped, poisoned and replayed, for real."""

import json
import random
import shutil
import signal
import time

import forked
import numpy as np
import pytest

from llama_jax.checkpoint import names, steps, store
from llama_jax.training import metrics as metrics_lib

STEPS, EVERY = 60, 3
TIMES = metrics_lib.CLOCKED


@pytest.fixture(scope="module")
def flags_of(nano_flags):
  """Flags of this file's run, with other knobs where they are given."""
  usual = {
    "training.steps": STEPS,
    "checkpoint.every": EVERY,
    "metrics.curves_every": 0,
  }
  return lambda workdir, **knobs: nano_flags(workdir, **usual | knobs)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
  """forked.Forks that compile as users do, not as conftest.py makes tests."""
  folder = tmp_path_factory.mktemp("trainer")
  cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
  one = forked.Forks(folder, environment=cache | {"XLA_FLAGS": ""})
  yield one
  one.close()


def rows_of(folder):
  rows = metrics_lib.read(folder / "metrics.jsonl")
  return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def final(folder):
  params = names.flatten(store.read_params(folder))
  return {path: np.asarray(leaf).tobytes() for path, leaf in params.items()}


def committed(folder):
  return steps.list_steps(folder / "checkpoints")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, flags_of, trainer):
  """An uninterrupted run."""
  folder = tmp_path_factory.mktemp("whole")
  code, out, err = trainer.run(flags_of(folder))
  assert code == 0, err
  assert "done" in out
  assert len(rows_of(folder)) == STEPS
  return folder


def survive(wanted, seed, folder, flags, trainer, whole):
  """R1: killed so many times, then to the end; what was seen on the way."""
  killed, starts, redone = 0, 0, []
  for kill in kills(random.Random(seed)):
    if killed == wanted:
      break
    if committed(folder)[-1:] == [STEPS]:
      # It came to its end between two kills; what is left is another run's.
      check_equal(folder, whole)
      shutil.rmtree(folder)
    starts += 1
    before = committed(folder)
    had = len(rows_of(folder))
    code, out, err = trainer.run(flags, kill=kill)
    assert code in (0, -signal.SIGKILL), (kill, err)
    assert "Traceback" not in err, (kill, err)
    after = committed(folder)
    # No committed checkpoint is lost but by pruning, which leaves two.
    if before:
      assert max(after) >= max(before), (kill, before, after)
      assert len(after) >= min(2, len(before)), (kill, before, after)
    killed += code == -signal.SIGKILL
    start = [line for line in out.splitlines() if line.startswith("run ")]
    if start:
      first = int(start[0].split()[2])
      assert first == max(before, default=0)
      redone.append(max(had - first, 0))
  code, _, err = trainer.run(flags)
  assert code == 0, err
  check_equal(folder, whole)
  print(
    f"R1: {killed} kills in {starts} starts, at most {max(redone)} steps redone"
    f" (a save every {EVERY})"
  )
  # A save is committed while the steps after it are made, and the next waits
  # for it: two intervals at the most.
  assert max(redone) <= 2 * EVERY


def check_equal(folder, whole):
  """Every number of every row and every byte of every weight."""
  assert rows_of(folder) == rows_of(whole)
  assert final(folder) == final(whole)
  names_left = [path.name for path in (folder / "checkpoints").iterdir()]
  assert all(name.isdigit() for name in names_left), names_left


def kills(draws):
  """Endless: three at random times to two at named points."""
  # A start and a save make about so many of these calls.
  calls = {"rename": 6, "replace": 8, "fsync": 50, "rmdir": 30, "unlink": 40}
  while True:
    if draws.random() < 0.6:
      yield {"after": draws.random() * 0.6}
    else:
      name = draws.choice(list(calls))
      nth = draws.randint(1, calls[name])
      yield {"call": [name, nth, draws.choice(["before", "after"])]}


@pytest.mark.parametrize(
  "wanted", [15, pytest.param(50, marks=pytest.mark.slow)]
)
def test_kills(wanted, whole, flags_of, trainer, tmp_path):
  folder = tmp_path / "run"
  survive(wanted, wanted, folder, flags_of(folder), trainer, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(number, whole, flags_of, trainer, tmp_path):
  """R2: a checkpoint within one step and five seconds, its own exit code."""
  flags = flags_of(tmp_path / "run", **{"checkpoint.every": 1000})
  code, _, err = trainer.run(flags, kill={"step": 7, "signal": int(number)})
  assert code == 128 + number, err
  stopped = len(rows_of(tmp_path / "run"))
  assert 7 <= stopped < STEPS
  assert f"stopped and saved at step {stopped} of {STEPS}" in err
  assert committed(tmp_path / "run") == [stopped]
  code, _, err = trainer.run(flags)
  assert code == 0, err
  assert rows_of(tmp_path / "run") == rows_of(whole)
  assert final(tmp_path / "run") == final(whole)


def test_the_same_config_twice(whole, flags_of, trainer, tmp_path):
  """R8: on one core, with a cold compile cache; the others have all cores, and
  all but the first a warm one."""
  cold = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "XLA_FLAGS": ""}
  code, _, err = trainer.run(
    flags_of(tmp_path / "run"), cores=[0], environment=cold
  )
  assert code == 0, err
  assert rows_of(tmp_path / "run") == rows_of(whole)
  assert final(tmp_path / "run") == final(whole)


def test_two_trainers_of_one_folder(flags_of, trainer, run_verbs, tmp_path):
  """R10: the second refuses within five seconds and names the first."""
  flags = flags_of(
    tmp_path / "run", **{"training.steps": 100_000, "checkpoint.every": 100}
  )
  trainer.start(flags, kill={"step": 300, "signal": int(signal.SIGKILL)})
  deadline = time.monotonic() + 60
  while not rows_of(tmp_path / "run") and time.monotonic() < deadline:
    time.sleep(0.01)
  ((second, _, said),) = run_verbs(flags)
  code, _, _ = trainer.finish()
  assert code == -signal.SIGKILL
  assert second == 2, said
  assert said.startswith("error: ") and said.count("\n") == 1
  holder = json.loads((tmp_path / "run" / "lock").read_text())
  assert f"process {holder['pid']} on {holder['host']}" in said
  # A dead holder's folder is taken over.
  flags = flags_of(
    tmp_path / "run", **{"training.steps": max(committed(tmp_path / "run"))}
  )
  code, _, err = trainer.run(flags)
  assert code == 0, err


def test_a_finished_run_is_left_as_it_is(whole, flags_of, trainer):
  before = rows_of(whole)
  code, out, err = trainer.run(flags_of(whole))
  assert code == 0, err
  assert f"done: step {STEPS}" in out
  assert rows_of(whole) == before


def test_a_run_learns_and_says_so(whole):
  rows = rows_of(whole)
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  losses = [row["loss"] for row in rows]
  # From log(512) = 6.24 by a good part of a nat.
  assert abs(losses[0] - np.log(512)) < 0.2
  assert np.mean(losses[-5:]) < losses[0] - 0.7
  assert all(row["skipped"] == 0 for row in rows)
  for name in ("config.json", "model.json", "curves.png", "tokenizer"):
    assert (whole / name).exists()
  described = json.loads((whole / "config.json").read_text())
  assert described["training"]["steps"] == STEPS
  assert described["made_by"]["versions"]["jax"]
  assert committed(whole) == [STEPS - EVERY, STEPS]


def test_replay(whole, flags_of, trainer):
  """R16: the gradient's hash of any step, from the checkpoint before it."""
  logged = {row["step"]: row["gradient_hash"] for row in rows_of(whole)}
  assert len(set(logged.values())) == STEPS
  before = committed(whole)
  assert before == [STEPS - EVERY, STEPS]
  for step, source, argv in (
    (STEPS - 1, STEPS - EVERY, flags_of(whole)),
    (STEPS, STEPS - EVERY, ["llama_jax.train", f"--workdir={whole}"]),
  ):
    code, out, err = trainer.run([*argv, f"--replay={step}"])
    assert code == 0 and "note" not in err, err
    told = json.loads(out[out.index("{") :])
    assert told["gradient_hash"] == logged[step]
    assert (told["from_checkpoint"], told["same"]) == (source, True)
  # Of other knobs it says so.
  _, _, err = trainer.run(
    [*flags_of(whole, **{"training.seed": 1}), f"--replay={STEPS}"]
  )
  assert "note: this is not the run's config: training.seed=1 (the run" in err
  assert committed(whole) == before


def test_a_run_that_only_spikes_stops(flags_of, trainer, tmp_path):
  """R9: after max_skipped in a row it stops, says what was in the batches,
  keeps its state, and goes on behind them."""
  flags = flags_of(
    tmp_path / "run",
    # A rate that throws the model out of all bounds at once.
    **{
      "optimizer.peak_lr": 1e18,
      "optimizer.warmup_steps": 0,
      "training.max_skipped": 4,
    },
  )
  code, _, err = trainer.run(flags)
  assert code == 3, err
  rows = rows_of(tmp_path / "run")
  skipped = [row["skipped_in_row"] for row in rows]
  good = len(rows) - skipped[-1]
  assert skipped[-1] >= 4 and skipped[:good] == [0] * good
  hashes = [row["param_norm"] for row in rows[good - 1 :]]
  assert len(set(hashes)) == 1
  folder = next((tmp_path / "run" / "skipped").iterdir())
  told = json.loads((folder / "documents.json").read_text())
  assert list(map(int, told)) == list(range(good + 1, len(rows) + 1))
  assert all(row["source"] == "text" for rows in told.values() for row in rows)
  assert f"--replay={good + 1}" in err
  assert np.load(folder / f"batch-{good + 1}.npz")["tokens"].shape == (8, 32)
  assert committed(tmp_path / "run")[-1] == len(rows)


def test_one_step_too_many_is_told_at_once(flags_of, run_verbs, tmp_path):
  """A factor so near to 1 that the first step beyond the usual is left out:
  with one allowed it stops there, the run's last step too."""
  knobs = {
    "optimizer.schedule": "constant",
    "training.spike_factor": 1.001,
    "training.max_skipped": 1,
  }
  ((code, _, err),) = run_verbs(flags_of(tmp_path / "a", **knobs))
  rows = rows_of(tmp_path / "a")
  assert code == 3, err
  bad = len(rows)
  assert [row["skipped"] for row in rows] == [0] * (bad - 1) + [1]
  assert f"1 steps in a row were left out, {bad} to {bad}" in err
  # The same with that step as the last.
  ((code, _, err),) = run_verbs(
    flags_of(tmp_path / "b", **knobs, **{"training.steps": bad})
  )
  assert code == 3, err


def test_what_is_refused_leaves_the_run_as_it_was(
  whole, flags_of, trainer, tmp_path
):
  """Also a start that fails before the first step binds nothing."""

  def content(folder):
    names = ("config.json", "model.json", "metrics.jsonl")
    return [(folder / name).read_bytes() for name in names]

  before = content(whole)
  words = tmp_path / "words.txt"
  words.write_text("quite other words " * 100)
  other = {"data.text": words, "data.tokenizer": "train"}
  for knobs, said in (
    ({"training.batch_size": 16}, "other data would follow"),
    (other, "other data would follow"),
    ({"training.steps": 5}, "training.steps=5"),
    ({"model.vocab_size": 600}, "leave them 0"),
    ({"evaluation.tasks": "('none',)"}, "evaluation.tasks"),
  ):
    code, _, err = trainer.run(flags_of(whole, **knobs))
    assert code == 2 and said in err, err
  assert content(whole) == before
  fresh = tmp_path / "run"
  code, _, err = trainer.run(
    flags_of(fresh, **other, **{"training.batch_size": 10_000})
  )
  assert code == 2, err
  code, _, err = trainer.run(flags_of(fresh, **{"training.steps": 1}))
  assert code == 0, err
