"""What each rematerialisation policy costs: memory and time of a gradient.

  python benchmarks/memory.py [--size=smollm2-135m] [--lengths=512,2048,4096]
    [--dtype=float32] [--attention=auto] [--rounds=3]
    [--out=benchmarks/results/memory.json]

For each policy of model/decoder.py and each length: the bytes that XLA takes
for temporaries in the compiled loss and gradient of one row (params, batch and
the gradients themselves come on top, the same for all), and the least of
`rounds` times of one call, the policies taking turns. --rounds=0 only
compiles.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import platform
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from llama_jax import errors, shell
from llama_jax.checkpoint import atomic
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes

POLICIES = tuple(decoder_lib.REMATERIALISATION)


def batch(config, length: int) -> tuple[np.ndarray, ...]:
  """One row that is one document of random words, every token scored."""
  ids = np.random.default_rng(0).integers(
    config.vocab_size, size=(1, length + 1), dtype=np.int32
  )
  positions = np.arange(length, dtype=np.int32)[None]
  segments = np.ones_like(positions)
  weights = np.ones(positions.shape, np.float32)
  return ids[:, :-1], positions, segments, ids[:, 1:], weights


def compile_gradient(decoder, params, row):
  """The compiled (params, *row) -> (loss, gradients)."""

  def loss(params, *row):
    return decoder.apply({"params": params}, *row, 0.0, method="loss_sum")[0]

  return jax.jit(jax.value_and_grad(loss)).lower(params, *row).compile()


def seconds_of(program, params, row) -> float:
  began = time.perf_counter()
  jax.block_until_ready(program(params, *row))
  return time.perf_counter() - began


def measure(config, length: int, rounds: int, params) -> dict[str, dict]:
  """policy -> temporary_bytes, compile_seconds and, timed, seconds."""
  row = batch(config, length)
  programs, found = {}, {}
  for policy in POLICIES:
    decoder = decoder_lib.Decoder(
      config,
      dtype=_DTYPE.value,
      attention=_ATTENTION.value,
      rematerialise=policy,
    )
    began = time.perf_counter()
    programs[policy] = compile_gradient(decoder, params, row)
    memory = programs[policy].memory_analysis()
    found[policy] = {
      "temporary_bytes": memory.temp_size_in_bytes,
      "compile_seconds": time.perf_counter() - began,
    }
  if rounds:
    for program in programs.values():
      seconds_of(program, params, row)
  times = {policy: [] for policy in POLICIES}
  for _ in range(rounds):
    for policy, program in programs.items():
      times[policy].append(seconds_of(program, params, row))
  for policy, each in times.items():
    if each:
      found[policy]["seconds"] = min(each)
  return found


def show(length: int, found: dict[str, dict]) -> None:
  for policy, figures in found.items():
    line = f"T={length:<6} {policy:10}"
    line += f" {figures['temporary_bytes'] / 1e6:10,.0f} MB temporaries"
    if "seconds" in figures:
      rate = length / figures["seconds"]
      line += f" {figures['seconds']:8.3f} s {rate:9,.0f} tokens/s"
    print(line, flush=True)


def main(argv) -> None:
  del argv
  try:
    lengths = [int(length) for length in _LENGTHS.value]
  except ValueError as error:
    raise errors.UserError(
      f"--lengths={','.join(_LENGTHS.value)} must be whole numbers."
    ) from error
  config = sizes.get(_SIZE.value)
  fields = json.dumps(dataclasses.asdict(config), sort_keys=True)
  decoder = decoder_lib.Decoder(config)

  def make():
    return nn.unbox(decoder_lib.init(decoder, jax.random.key(0)))

  params = jax.jit(make)() if _ROUNDS.value else jax.eval_shape(make)
  device = jax.devices()[0]
  result = {
    "date": datetime.date.today().isoformat(),
    "size": _SIZE.value,
    "config_sha256": hashlib.sha256(fields.encode()).hexdigest(),
    "dtype": jnp.dtype(_DTYPE.value).name,
    "attention": _ATTENTION.value,
    "rows": 1,
    "rounds": _ROUNDS.value,
    "lengths": {},
    "jax": jax.__version__,
    "device": f"{device.device_kind}, {platform.machine()},"
    f" {os.cpu_count()} cores",
  }
  out = pathlib.Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  for length in lengths:
    result["lengths"][length] = measure(config, length, _ROUNDS.value, params)
    show(length, result["lengths"][length])
    # Each as soon as it is there: the longest take many minutes.
    atomic.write_text(out, json.dumps(result, indent=1) + "\n")
  print(f"written to {out}")


if __name__ == "__main__":
  _SIZE = flags.DEFINE_string("size", "smollm2-135m", "A preset's name.")
  _LENGTHS = flags.DEFINE_list("lengths", ["512", "2048", "4096"], "Tokens.")
  _DTYPE = flags.DEFINE_enum(
    "dtype", "float32", decoder_lib.DTYPES, "Of computation."
  )
  _ATTENTION = flags.DEFINE_string("attention", "auto", "As in model/decoder.")
  _ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed calls of each.")
  _OUT = flags.DEFINE_string("out", "benchmarks/results/memory.json", "Where.")
  shell.run(main)
