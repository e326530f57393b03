"""Rows to finetune on, and the commands that do."""

import json
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
_COLOURS = ["red", "blue", "green", "grey", "pink", "white", "black", "brown"]


def write_data(folder: pathlib.Path) -> pathlib.Path:
  """talks.jsonl, pairs.jsonl and texts.jsonl in a folder, which it returns."""
  talks = [
    {"instruction": f"Is {one} a colour?", "output": f"Yes, {one} is."}
    for one in _COLOURS * 3
  ]
  pairs = [
    {
      "prompt": f"Is {one} {two}?",
      "chosen": "Yes." if one == two else "No.",
      "rejected": "What a strange thing to ask.",
      "rating": ["better", "unsure"][index % 2],
    }
    for one in _COLOURS
    for index, two in enumerate(_COLOURS[:3])
  ]
  texts = [{"text": " ".join(talk.values())} for talk in talks]
  for name, rows in (("talks", talks), ("pairs", pairs), ("texts", texts)):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(lines)
  return folder


def command(config: str, init, data, workdir, **knobs) -> list[str]:
  """Trains a recipe of configs/finetune for six steps on what fits it."""
  rows = "pairs" if config.endswith(("dpo", "reward")) else "talks"
  knobs = {
    "init": init,
    "data.text": data / f"{rows}.jsonl",
    "data.sequence_length": 128,
    "data.heldout": 0.3,
    "training.epochs": 0.0,
    "training.steps": 6,
    "model.dtype": "float32",
    "optimizer.warmup_steps": 0,
    "checkpoint.every": 3,
    "evaluation.every": 3,
    **knobs,
  }
  file, _, variant = config.partition(":")
  return [
    "llama_jax.train",
    f"--config={ROOT}/configs/finetune/{file}.py"
    + (f":{variant}" * bool(variant)),
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in knobs.items()),
  ]
