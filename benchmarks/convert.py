"""Memory and rate of a conversion, beside the disk's own copy rate.

  python benchmarks/convert.py [--size=llama3.1-8b] [--folder=DIR] [--rounds=2]
    [--max_host_gb=4] [--out=benchmarks/results/convert.json]

Makes a sharded Hugging Face folder of random bfloat16 in the size's shape
(16 GB for 8B; twice that must be free), and takes turns: copy the folder,
convert it to orbax without the check, each read from the disk and flushed to
it; at last once with the check. Prints peak memory of the process that
converts, and rates. Everything it made is deleted.
"""

import datetime
import json
import math
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from absl import flags

from llama_jax import errors, shell
from llama_jax.checkpoint import atomic, building, hugging_face, names, weights
from llama_jax.model import sizes

POOL_BYTES = 32 << 20
# What the project aims at: half the copy's rate, and the flag's memory.
LEAST_RATE = 0.5


def random_source(config) -> weights.Source:
  """Bits of plausible weights, the same for a row whenever it is read."""
  rng = np.random.default_rng(0)
  # bfloat16 of magnitude 2^-7 to 2^-5, either sign, random mantissa.
  exponents = rng.integers(120, 122, POOL_BYTES // 2, dtype=np.uint16)
  rest = rng.integers(0, 2**16, POOL_BYTES // 2, dtype=np.uint16) & 0x807F
  pool = (exponents << 7 | rest).view(ml_dtypes.bfloat16)
  tensors, starts = {}, {}
  for number, place in enumerate(names.places(config, "hf")):
    dtype = pool.dtype
    tensors[place.name] = weights.Tensor(
      place.shape, dtype, weights.stored_as(dtype)
    )
    starts[place.name] = number * 7919

  def rows(name: str, start: int, stop: int) -> np.ndarray:
    shape = (stop - start, *tensors[name].shape[1:])
    first = starts[name] + start * math.prod(shape[1:])
    return np.take(
      pool, np.arange(first, first + math.prod(shape)), mode="wrap"
    ).reshape(shape)

  return weights.Source("random", "hf", tensors, rows)


def forget(folder: pathlib.Path) -> None:
  """Drops a folder's files from the page cache: the next read is the disk's."""
  for path in folder.rglob("*"):
    if path.is_file():
      handle = os.open(path, os.O_RDONLY)
      os.fsync(handle)
      os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
      os.close(handle)


def copy(source: pathlib.Path, destination: pathlib.Path) -> float:
  """Seconds to copy a folder onto the disk."""
  forget(source)
  began = time.monotonic()
  subprocess.run(["cp", "-r", str(source), str(destination)], check=True)
  forget(destination)  # flushes it
  seconds = time.monotonic() - began
  shutil.rmtree(destination)
  return seconds


def convert(
  source: pathlib.Path, destination: pathlib.Path, *settings: str
) -> tuple[float, float]:
  """(seconds, peak bytes) of the verb as a process of its own."""
  forget(source)
  began = time.monotonic()
  command = [
    sys.executable,
    "-m",
    "llama_jax.convert",
    f"--src=hf:{source}",
    f"--dst=orbax:{destination}",
    *settings,
  ]
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  output = process.stdout.read()
  _, status, usage = os.wait4(process.pid, 0)
  seconds = time.monotonic() - began
  if status:
    raise errors.UserError(f"the conversion failed: {output[-2000:]}")
  shutil.rmtree(destination)
  return seconds, usage.ru_maxrss * 1024.0


def main(argv) -> None:
  del argv
  config = sizes.get(_SIZE.value)
  source = random_source(config)
  total = sum(tensor.num_bytes for tensor in source.tensors.values())
  out = pathlib.Path(_OUT.value)
  with tempfile.TemporaryDirectory(dir=_FOLDER.value) as room:
    folder = pathlib.Path(room)
    atomic.check_free(folder, 2.1 * total, "name another --folder")
    made = folder / "made"
    print(
      f"making {total / 1e9:.2f} GB of {_SIZE.value} in {folder}", flush=True
    )
    with building.building(made) as site:
      hugging_face.write_into(site, config, source, None)
    memory = f"--max_host_gb={_MAX_HOST_GB.value:g}"
    copies, converts, peaks = [], [], []
    for number in range(_ROUNDS.value):
      copies.append(copy(made, folder / "copy"))
      seconds, peak = convert(made, folder / "to", memory, "--nocheck")
      converts.append(seconds)
      peaks.append(peak)
      print(
        f"round {number + 1}: copy {copies[-1]:.1f} s, convert {seconds:.1f} s"
        f" = {copies[-1] / seconds:.2f} of the copy's rate, peak"
        f" {peak / 1e9:.2f} GB",
        flush=True,
      )
    checked, checked_peak = convert(made, folder / "to", memory)
  ratio = statistics.median(
    a / b for a, b in zip(copies, converts, strict=True)
  )
  result = {
    "date": datetime.date.today().isoformat(),
    "size": _SIZE.value,
    "bytes": total,
    "max_host_gb": _MAX_HOST_GB.value,
    "copy_seconds": copies,
    "convert_seconds": converts,
    "convert_peak_bytes": peaks,
    "checked_seconds": checked,
    "checked_peak_bytes": checked_peak,
    "rate_over_copy": ratio,
    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
  }
  out.parent.mkdir(parents=True, exist_ok=True)
  atomic.write_text(out, json.dumps(result, indent=1) + "\n")
  rate = total / statistics.median(converts) / 1e6
  print(f"convert       {rate:,.0f} MB/s, {ratio:.2f} of cp (bar {LEAST_RATE})")
  print(
    f"peak memory   {max(peaks) / 1e9:.2f} GB, with the check"
    f" {checked_peak / 1e9:.2f} GB (bar {_MAX_HOST_GB.value:g})"
  )
  print(f"with check    {checked:.1f} s in all")
  print(f"written to    {out}")


if __name__ == "__main__":
  _SIZE = flags.DEFINE_string("size", "llama3.1-8b", "A preset's name.")
  _FOLDER = flags.DEFINE_string("folder", None, "Where to work; else the tmp.")
  _ROUNDS = flags.DEFINE_integer("rounds", 2, "Turns of each.")
  _MAX_HOST_GB = flags.DEFINE_float("max_host_gb", 4.0, "As of convert.")
  _OUT = flags.DEFINE_string("out", "benchmarks/results/convert.json", "Where.")
  shell.run(main)
