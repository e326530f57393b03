"""Rates of preparing text and of reading what was prepared.

  python benchmarks/data.py --tokenizer=PATH --text=FILES_OR_FOLDER
    [--row_length=2048 --workers=0 --rounds=3 --folder=DIR]
    [--out=benchmarks/results/data.json]

First the stages one by one, in this process: reading with filters and
duplicates, the tokenizer alone, making a shard. Then the verb as a process of
its own, start and all, a round at a time, beside the library's own rate on one
thread. Then rows read in a shuffled order and cut for the model, by one thread
and by two. Everything it made is deleted.
"""

import concurrent.futures
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

import numpy as np
from absl import flags

from llama_jax import errors, prepare, shell
from llama_jax.data import packing, preparation, prepared
from llama_jax.data import parts as parts_lib

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "data" / "folder.py"
# What the project aims at, in tokens a second.
LEAST_PREPARED, LEAST_READ = 1.0e6, 1.5e6
SAMPLE_MB = 8


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
  }
  for what, got, least in (
    ("prepared", rate, LEAST_PREPARED),
    ("read", max(reads.values()), LEAST_READ),
  ):
    print(f"{what}: {got:,.0f} tokens a second; at least {least:,.0f} wanted")
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
