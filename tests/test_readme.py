"""Every command of README and docs runs as it is printed, at nano size."""

import gzip
import json
import os
import pathlib
import re
import shlex

import pytest

from llama_jax import quickstart, stages

ROOT = pathlib.Path(__file__).resolve().parent.parent
# In the order of a reader: a command may use what an earlier one made.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, pages=PAGES) -> list[str]:
  text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
  return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[list[str]]:
  lines = "\n".join(blocks("bash")).splitlines()
  return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def clone(nano, tmp_path_factory, python_source, run_verbs) -> pathlib.Path:
  """A folder like a clone after the quickstart, its model a nano one."""
  folder = tmp_path_factory.mktemp("clone")
  for name in ("llama_jax", "configs", "launch"):
    (folder / name).symlink_to(ROOT / name)
  work = folder / "runs" / "quickstart"
  work.mkdir(parents=True)
  # Text that is there stays: of all the standard library a few pages.
  rows = [json.dumps({"text": text}) + "\n" for text in python_source]
  for name, part in (("train", rows[1:]), ("heldout", rows[:1])):
    with gzip.open(work / f"{name}.jsonl.gz", "wt") as file:
      file.writelines(part)

  def fork(stage):
    ((code, out, err),) = run_verbs(stage.command[1:], cwd=folder)
    assert code == 0, out + err
    if stage.capture:
      stage.capture.write_text(out)
    return code

  train = (
    "--config.data.sequence_length=64",
    "--config.optimizer.peak_lr=3e-3",
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stages, "run_command", fork)
    assert quickstart.run(work, 40, f"hf:{nano}", train) == 0
  # Typed, the same finds all of it done.
  flags = [f"--workdir={work}", "--steps=40", f"--weights=hf:{nano}"]
  flags += [f"--train={word}" for word in train]
  ((code, out, err),) = run_verbs(["llama_jax.quickstart", *flags])
  assert code == 0, out + err
  assert out.count("done before: ") == 7 and "curves.png" in out
  assert (work / "run" / "curves.png").is_file()
  (folder / "prompts.jsonl").write_text(
    '{"prompt": "def f("}\n'
    '{"messages": [{"role": "user", "content": "Hello"}], "id": 2}\n'
  )
  (folder / "talks.jsonl").write_text(
    '{"instruction": "Say yes.", "output": "yes"}\n' * 20
  )
  (folder / "pairs.jsonl").write_text(
    "".join(
      f'{{"prompt": "Say {n}.", "chosen": "{n}", "rejected": "no"}}\n'
      for n in range(20)
    )
  )
  return folder


def test_the_two_commands_are_the_scripts_that_are_there():
  first, second = commands()[:2]
  for command in (first, second):
    assert os.access(ROOT / command[0], os.X_OK), command


def at_nano_size(command: list[str]) -> list[str]:
  """What python -m is given."""
  small = {
    "llama_jax.train": [
      "--config.training.steps=2",
      "--config.training.batch_size=2",
      "--config.data.sequence_length=32",
    ],
    "llama_jax.evaluate": ["--window=128", "--stride=128"],
    "llama_jax.generate": ["--max_new_tokens=8"],
  }.get(command[2], [])
  if any("finetune" in word for word in command):
    small[-1] = "--config.data.sequence_length=128"
  if any(":nano" in word for word in command):
    small = ["--config.training.steps=2"]
  elif "--replay=2" in command:
    small = []
  # The nano model's two kv heads split in two, SmolLM2's three in three; half
  # of its layers are one, of SmolLM2's fifteen.
  smaller = {"cpu_devices=3": "cpu_devices=2", "tensor=3": "tensor=2"}
  smaller["num_layers=15"] = "num_layers=1"
  words = command[2:]
  for real, nano in smaller.items():
    words = [word.replace(real, nano) for word in words]
  return [*words, *small]


VERBS = [c for c in commands() if c[0] == "python"]


@pytest.fixture(scope="module")
def results(clone, run_verbs):
  """All of them, in the order of a reader."""
  found = run_verbs(*map(at_nano_size, VERBS), cwd=clone, given="Hello there\n")
  return dict(zip(map(tuple, VERBS), found, strict=True))


@pytest.mark.parametrize("command", VERBS, ids=" ".join)
def test_command(results, command):
  code, out, err = results[tuple(command)]
  assert code == 0, out + err
  assert out


def test_notebook_lines(clone, run_verbs):
  (clone / "notebook.py").write_text(
    "".join(blocks("python"))
    + "assert logits.shape == (1, len(ids), 512)\n"
    + "assert len({tuple(one.tokens) for one in answers}) == 4\n"
  )
  ((code, out, err),) = run_verbs(["notebook"], cwd=clone)
  assert code == 0, out + err


def test_tree_names_what_is_there():
  tree = blocks("", PAGES[:1])[-1]
  for name in re.findall(r"^  (\w+(?:\.py|/))", tree, re.MULTILINE):
    assert (ROOT / "llama_jax" / name).exists(), name
