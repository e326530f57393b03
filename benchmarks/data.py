"""Rates of preparing text and of reading what was prepared.

  python benchmarks/data.py --tokenizer=PATH --text=FILES_OR_FOLDER
    [--row_length=2048 --workers=0 --rounds=3 --folder=DIR]
    [--out=benchmarks/results/data.json]

First the stages one by one, in this process: reading with filters and
duplicates, the tokenizer alone, making a shard. Then the verb as a process of
its own, start and all, a round at a time, beside the library's own rate on one
thread. Then rows read in a shuffled order and cut for the model, by one thread
and by two; at last training steps with the loader on and without it. Everything
it made is deleted.
"""

import concurrent.futures
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import flax.linen as nn
import jax
import numpy as np
from absl import flags

from llama_jax import errors, experiment, prepare, shell
from llama_jax.data import batches as batches_lib
from llama_jax.data import packing, preparation, prepared, ramp
from llama_jax.data import parts as parts_lib
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes
from llama_jax.objectives import next_token
from llama_jax.parallel import hosts, mesh
from llama_jax.training import optimizer as optimizer_lib
from llama_jax.training import state as state_lib
from llama_jax.training import step as step_lib

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "data" / "folder.py"
# What the project aims at, in tokens a second.
LEAST_PREPARED, LEAST_READ = 1.0e6, 1.5e6
SAMPLE_MB = 8
# Words of the model whose steps are timed: ids are folded into them, so that a
# tokenizer with many words does not make its head most of a step.
STEP_VOCAB = 4096


def settings() -> dict[str, object]:
  """The recipe's knobs that are not as it has them."""
  return {
    "tokenizer": _TOKENIZER.value,
    "row_length": _ROW_LENGTH.value,
    "workers": _WORKERS.value,
    "sources.text.paths": _TEXT.value,
  }


def stages(folder: pathlib.Path) -> dict[str, float]:
  """Rates of each stage alone: bytes or tokens a second, of one process."""
  given = shell.load_config(str(RECIPE))
  given.update_from_flattened_dict(settings())
  config = prepare.make_config(given)
  reader = parts_lib.Reader(config, b"", lambda *place: None)
  began = time.monotonic()
  parts = list(reader.parts())
  seconds = time.monotonic() - began
  texts = [text for part in parts for _, text in part.texts]
  total = sum(len(text.encode()) for text in texts)
  rates = {"read_bytes": total / seconds}

  maker = preparation.Maker(config, folder)
  sample, size = [], 0
  for text in texts:
    sample.append(text)
    size += len(text)
    if size > SAMPLE_MB * 1e6:
      break
  began = time.monotonic()
  tokens = sum(len(maker.tokenizer.encode(text)) for text in sample)
  rates["encode_tokens"] = tokens / (time.monotonic() - began)

  part = max(parts, key=lambda one: len(one.texts))
  began = time.monotonic()
  counted = maker.make(part)
  rates["make_tokens"] = counted["tokens"] / (time.monotonic() - began)
  return rates


def run(out: pathlib.Path) -> tuple[float, float]:
  """(seconds, peak bytes of the process that reads) of the verb."""
  began = time.monotonic()
  command = [
    sys.executable,
    "-m",
    "llama_jax.prepare",
    f"--config={RECIPE}",
    f"--out={out}",
    *(f"--config.{key}={value}" for key, value in settings().items()),
  ]
  process = subprocess.Popen(
    command,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    cwd=ROOT,
  )
  output = process.stdout.read()
  _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise errors.UserError(f"preparing failed: {output[-2000:]}")
  return time.monotonic() - began, usage.ru_maxrss * 1024.0


def read(folder: pathlib.Path, threads: int) -> float:
  """Tokens a second of shuffled rows as the model is given them."""
  data = prepared.read(folder)
  [rows] = data.sources.values()
  order = np.random.default_rng(0).permutation(len(rows)).tolist()

  def load(index: int) -> None:
    packing.inputs(rows[index], 0, data.row_length, separate=True)

  load(0)  # opens the shards
  began = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for _ in pool.map(load, order, chunksize=16):
      pass
  return len(rows) * data.row_length / (time.monotonic() - began)


def steps(folder: pathlib.Path, rounds: int) -> dict[str, float]:
  """Median seconds of a training step, its batches read as it goes or one
  batch again and again; ten steps of each in turns."""
  data = prepared.read(folder)
  config = dataclasses.replace(
    sizes.get("llama-10m"),
    vocab_size=STEP_VOCAB,
    context_length=data.row_length,
  )
  devices = mesh.make(mesh.ParallelConfig(data=-1, fsdp=1, tensor=1))
  decoder = decoder_lib.Decoder(config)
  recipe = shell.load_config(str(ROOT / "configs" / "nano.py"))
  recipe.data.update(prepared=str(folder), sequence_length=data.row_length)
  asked = experiment.read(recipe)
  optimizer = optimizer_lib.make(asked.optimizer)
  stage = ramp.Stage(0, 2 * devices.size, data.row_length, 1)
  batches = batches_lib.Batches(
    data.sources, asked.data, ramp.Ramp([stage], data.row_length)
  )

  def loss_sum(params, *batch):
    return decoder.apply({"params": params}, *batch, 0.0, method="loss_sum")

  update = jax.jit(
    step_lib.make(next_token.make(loss_sum, 1), optimizer, spike_factor=0),
    donate_argnums=0,
  )
  times: dict[str, list[float]] = {"loaded": [], "same": []}
  with jax.set_mesh(devices):
    params = nn.unbox(decoder_lib.init(decoder, jax.random.key(0)))
    state = state_lib.create(params, optimizer)

    def one(state, batch):
      began = time.monotonic()
      batch = {name: rows[None] for name, rows in batch.items()}
      for name in ("tokens", "targets"):
        batch[name] = batch[name] % STEP_VOCAB
      batch = hosts.put_batch(batch, devices, axis=1)
      state, _ = jax.block_until_ready(update(state, batch, np.float32(1e-4)))
      return state, time.monotonic() - began

    same = batches.get(0)
    state, _ = one(state, same)  # compiles
    at = 1
    for _ in range(rounds):
      reading = batches_lib.read_ahead(
        batches, range(at, at + 10), lambda step: slice(None), workers=1
      )
      began = time.monotonic()
      for batch in reading:
        state, _ = one(state, batch)
        # From step to step, waiting for the batch included.
        times["loaded"].append(time.monotonic() - began)
        began = time.monotonic()
      at += 10
      for _ in range(10):
        state, seconds = one(state, same)
        times["same"].append(seconds)
  return {name: statistics.median(found) for name, found in times.items()}


def main(argv) -> None:
  del argv
  if not _TOKENIZER.value or not _TEXT.value:
    raise errors.UserError("give --tokenizer=PATH and --text=FILES_OR_FOLDER.")
  with tempfile.TemporaryDirectory(dir=_FOLDER.value) as room:
    folder = pathlib.Path(room)
    alone = stages(folder)
    print({name: f"{rate:,.0f}/s" for name, rate in alone.items()}, flush=True)
    seconds, peaks = [], []
    for number in range(_ROUNDS.value):
      out = folder / f"round{number}"
      took, peak = run(out)
      seconds.append(took)
      peaks.append(peak)
      counted = prepared.read(out).report["sources"]["text"]
      tokens = sum(counted[side]["tokens"] for side in ("train", "heldout"))
      print(
        f"round {number + 1}: {tokens:,} tokens in {took:.1f} s ="
        f" {tokens / took:,.0f} a second, peak {peak / 1e6:.0f} MB",
        flush=True,
      )
    reads = {threads: read(out, threads) for threads in (1, 2)}
    stepped = steps(out, _ROUNDS.value)
  rate = tokens / statistics.median(seconds)
  result = {
    "date": datetime.date.today().isoformat(),
    "machine": platform.processor() or platform.machine(),
    "cores": len(os.sched_getaffinity(0)),
    "row_length": _ROW_LENGTH.value,
    "workers": _WORKERS.value,
    "tokens": tokens,
    "seconds": seconds,
    "reader_peak_bytes": peaks,
    "stages": alone,
    "prepared_tokens_per_second": rate,
    "read_tokens_per_second": reads,
    "step_seconds": stepped,
  }
  for what, got, least in (
    ("prepared", rate, LEAST_PREPARED),
    ("read", max(reads.values()), LEAST_READ),
  ):
    print(f"{what}: {got:,.0f} tokens a second; at least {least:,.0f} wanted")
  ratio = stepped["loaded"] / stepped["same"]
  print(f"a step with the loader on: {ratio:.3f} times one without it")
  target = pathlib.Path(_OUT.value)
  target.parent.mkdir(parents=True, exist_ok=True)
  target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  _TOKENIZER = flags.DEFINE_string("tokenizer", None, "File or folder.")
  _TEXT = flags.DEFINE_string("text", None, "What to prepare.")
  _ROW_LENGTH = flags.DEFINE_integer("row_length", 2048, "Tokens.", 2)
  _WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: all cores.", 0)
  _ROUNDS = flags.DEFINE_integer("rounds", 3, "Of the verb.", 1)
  _FOLDER = flags.DEFINE_string("folder", None, "Where to work.")
  _OUT = flags.DEFINE_string(
    "out", "benchmarks/results/data.json", "The results."
  )
  shell.run(main)
