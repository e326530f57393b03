"""A run of ours beside the same run in a plain PyTorch loop.

  python benchmarks/peer_pretrain.py --run=RUN --steps=0 \\
    --peer_python=ENV_WITH_TORCH/bin/python [--folder=DIR] [--out=FILE.json]

RUN is a run's folder. What its config says is written into --folder: the first
params as a Hugging Face folder, each step's batch and rate, the held-out
pieces. peer_pretrain_torch.py trains on that alone. Then held-out losses of
both stand side by side, at the same tokens. The bar: 1 %.

The same command again goes on where the peer left off; each of its evaluations
is in DIR/peer.jsonl as soon as it is made.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from llama_jax import errors, experiment, shell
from llama_jax import run as run_lib
from llama_jax.checkpoint import atomic, hugging_face
from llama_jax.evals import heldout
from llama_jax.training import metrics

HERE = pathlib.Path(__file__).resolve().parent
BAR = 0.01
FIELDS = ("tokens", "targets", "positions", "segments", "loss_mask")


def export(run: run_lib.Run, folder: pathlib.Path, steps: int) -> None:
  """Writes all that the peer needs to do the run's first steps.

  recipe.json   what does not change, and the rate of each step
  init/         the first params, a Hugging Face folder in float32
  steps/        N.npz: batch of step N (0 is the first), each array [B, T]
  heldout/      DOMAIN.npz: pieces, each array [P, T]

  What is there already stays, so that more steps may follow later.

  Raises:
    errors.UserError: the folder is of a run with another config.
  """
  asked = run.asked
  config = json.loads(json.dumps(dataclasses.asdict(asked), default=dict))
  file = folder / "recipe.json"
  if file.is_file() and json.loads(file.read_text())["config"] != config:
    raise errors.UserError(
      f"{folder} was written for another config; remove it or name another"
      " with --folder."
    )
  if not (folder / "init").is_dir():
    with jax.set_mesh(run.devices):
      params = jax.device_get(run.first().params)
    hugging_face.write(folder / "init", run.decoder.config, params, None)
  (folder / "steps").mkdir(parents=True, exist_ok=True)
  for step in range(steps):
    batch = folder / "steps" / f"{step}.npz"
    if not batch.is_file():
      _write_arrays(batch, run.batches.get(step))
  (folder / "heldout").mkdir(exist_ok=True)
  for name, rows in run.heldout.items():
    pieces = heldout.cut(
      rows,
      asked.evaluation.rows,
      run.ramp.row_length,
      asked.data.separate_documents,
    )
    if pieces:
      stacked = {key: np.stack([p[key] for p in pieces]) for key in FIELDS}
      _write_arrays(folder / "heldout" / f"{name}.npz", stacked)
  places = [run.ramp.at(step) for step in range(steps)]
  recipe = {
    "config": config,
    "steps": steps,
    "evaluate_after": [
      step
      for step in range(1, steps + 1)
      if asked.evaluation.due(step, asked.training.steps) or step == steps
    ],
    "rates": [run.rate(step) for step in range(steps)],
    "tokens": [place.tokens + place.stage.tokens for place in places],
    "accumulation": [place.stage.accumulation for place in places],
    "z_loss": asked.training.z_loss,
    "optimizer": config["optimizer"],
  }
  atomic.write_text(file, json.dumps(recipe, indent=1))


def _write_arrays(file: pathlib.Path, arrays) -> None:
  part = file.with_name(f".{file.name}.part.npz")
  np.savez_compressed(part, **{name: arrays[name] for name in FIELDS})
  part.replace(file)


def described(folder: pathlib.Path) -> dict[str, Any]:
  """The run's config.json, of whose files it keeps the last name alone."""
  config = json.loads((folder / "config.json").read_text())
  config["made_by"].pop("command")
  for name in ("text", "prepared", "tokenizer"):
    if isinstance(config["data"][name], str):
      config["data"][name] = pathlib.Path(config["data"][name]).name
  return config


def compare(
  ours: Sequence[dict[str, Any]], peer: Sequence[dict[str, Any]]
) -> dict[str, Any]:
  """Held-out losses of both at the steps that both evaluated.

  Args:
    ours: rows of metrics.jsonl.
    peer: rows of peer.jsonl, named alike.

  Returns:
    "rows", each with step, tokens_seen and name -> [ours, peer, difference as
    a share of the peer's]; "worst" and "last", the largest such share of
    heldout_loss and the last one; "skipped", steps that ours left out.
  """
  theirs = {row["step"]: row for row in peer}
  rows = []
  for row in ours:
    other = theirs.get(row["step"])
    if other is None or row.get("heldout_loss") is None:
      continue
    told = {"step": row["step"], "tokens_seen": row["tokens_seen"]}
    for name, value in other.items():
      if name == "loss" or name.startswith("heldout_loss"):
        told[name] = [row[name], value, row[name] / value - 1]
    rows.append(told)
  if not rows:
    raise errors.UserError(
      "no step has a held-out loss of both; run with --config.evaluation.every"
      " and a prepared folder that has held-out rows."
    )
  shares = [abs(row["heldout_loss"][2]) for row in rows]
  return {
    "worst": max(shares),
    "last": shares[-1],
    "skipped": ours[-1].get("skipped", 0),
    "rows": rows,
  }


def table(result: dict[str, Any]) -> str:
  """The rows as lines of text: ours, the peer's, the difference."""
  names = [name for name in result["rows"][-1] if name.startswith("heldout")]
  lines = ["".join(f"{name:>32}" for name in ("tokens", *names))]
  for row in result["rows"]:
    cells = [f"{row['tokens_seen']:>32,}"]
    for name in names:
      ours, peer, share = row[name]
      cells.append(f"{f'{ours:.4f} {peer:.4f} {share:+.2%}':>32}")
    lines.append("".join(cells))
  return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
  del argv
  if not flags.FLAGS.run or not flags.FLAGS.peer_python:
    raise errors.UserError(
      "--run=RUN and --peer_python=PATH are needed: a run's folder, and a"
      " Python that has torch and transformers."
    )
  folder = pathlib.Path(flags.FLAGS.run).expanduser()
  exchange = pathlib.Path(flags.FLAGS.folder or folder / "peer").expanduser()
  asked = experiment.read(experiment.read_described(folder))
  steps = flags.FLAGS.steps or asked.training.steps
  export(run_lib.set_up(asked, folder), exchange, steps)
  worker = [flags.FLAGS.peer_python, HERE / "peer_pretrain_torch.py", exchange]
  done = subprocess.run([str(word) for word in worker])
  if done.returncode:
    raise errors.UserError(
      f"the peer ended with status {done.returncode}; the same command goes on"
      " from its last checkpoint."
    )
  peer = metrics.read(exchange / "peer.jsonl")
  result = compare(metrics.read(folder / "metrics.jsonl"), peer)
  result |= {"benchmark": "peer_pretrain", "bar": BAR, "steps": steps}
  result["config"] = described(folder)
  result["peer"] = json.loads((exchange / "peer.json").read_text())
  out = pathlib.Path(flags.FLAGS.out)
  atomic.write_text(out, json.dumps(result, indent=1) + "\n")
  print(f"\n{table(result)}\n")
  print(
    f"held-out loss after {steps:,} steps differs by {result['last']:.2%}, by"
    f" {result['worst']:.2%} at most (bar {BAR:.0%}); ours left out"
    f" {result['skipped']} steps; all figures: {out}"
  )


if __name__ == "__main__":
  flags.DEFINE_string("run", None, "The run's folder.")
  flags.DEFINE_string("folder", None, "For what is exchanged; RUN/peer.")
  flags.DEFINE_integer("steps", 0, "Of the run; 0 for all.", lower_bound=0)
  flags.DEFINE_string(
    "peer_python",
    os.environ.get("PEER_PYTHON"),
    "A Python that has torch and transformers; also PEER_PYTHON.",
  )
  flags.DEFINE_string(
    "out", str(HERE / "results" / "peer_pretrain.json"), "The file to write."
  )
  shell.run(main)
