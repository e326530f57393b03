"""The weighted mean of checkpoints, written like a conversion.

  python -m llama_jax.average --ckpts=RUN:steps=900,950,1000 --dst=orbax:DIR
  python -m llama_jax.average --ckpts=RUN:steps=500-1000 --ckpts=hf:DIR \\
    --weights=... --dst=gguf:FILE [--dtype=bfloat16]

Each --ckpts is REF or REF:steps=LIST. REF is a checkpoint reference, or a run's
folder as it is. LIST names steps (900) and ranges (500-1000: those of them that
are there), with commas; only orbax: has steps, and without a list its newest is
taken. --weights has a number for each checkpoint in the order in which they are
listed, and is divided by its sum; without it all weigh the same.

Tensors pass through block by block, so that memory stays under --max_host_gb
whatever the model. A mean is taken in float64 and rounded once, to the dtype
that all have (float32 where they differ) or to --dtype. An interrupted command
goes on when it is typed again; until all is written the destination does not
have its name.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm
from absl import flags

from llama_jax import checkpoint, errors, shell
from llama_jax.checkpoint import (
  atomic,
  building,
  names,
  proof,
  steps,
  store,
  weights,
)
from llama_jax.model import config as config_lib

RECORD = "average.txt"
DTYPES = {
  "float32": names.DTYPES["F32"],
  "bfloat16": names.DTYPES["BF16"],
  "float16": names.DTYPES["F16"],
}

# Python and JAX; and what a block of bfloat16 is while several are on their
# way: float64 sums and products, each source's rows, the rounded mean.
_BASE_BYTES = 1.2e9
_BLOCKS = 40
_LEAST_GB = 1.5


@dataclasses.dataclass(frozen=True)
class Job:
  """A mean, with every checkpoint named.

  Attributes:
    sources: references, see resolve.
    shares: the weight of each; their sum is 1.
    destination: --dst.
    dtype: --dtype, or "" to keep what is there.
    max_host_gb: --max_host_gb.
  """

  sources: tuple[str, ...]
  shares: tuple[float, ...]
  destination: str
  dtype: str = ""
  max_host_gb: float = 4.0

  def __post_init__(self):
    if self.dtype and self.dtype not in DTYPES:
      raise errors.UserError(
        f"--dtype={self.dtype} is not known; use one of {', '.join(DTYPES)}."
      )
    if not self.max_host_gb >= _LEAST_GB:
      raise errors.UserError(
        f"--max_host_gb={self.max_host_gb:g} is too little; use {_LEAST_GB} or"
        " more."
      )

  @property
  def block_bytes(self) -> int:
    """Of weights in one block, so that all of them keep to max_host_gb."""
    room = (self.max_host_gb * 1e9 - _BASE_BYTES) / _BLOCKS
    return int(min(weights.BLOCK_BYTES, room))


def resolve(given: Sequence[str]) -> tuple[str, ...]:
  """References of single checkpoints, from what --ckpts says."""
  found: list[str] = []
  for one in given:
    reference, marked, wanted = one.partition(":steps=")
    if reference.partition(":")[0] not in checkpoint.FORMATS:
      reference = f"orbax:{reference}"
    scheme, path = checkpoint.parse(reference, "--ckpts")
    if scheme != "orbax":
      if marked:
        raise errors.UserError(
          f"--ckpts={one}: {scheme}: holds one checkpoint; leave out"
          f" :steps={wanted}."
        )
      found.append(f"{scheme}:{path}")
      continue
    folder, newest = store.locate(path)
    if not marked:
      found.append(f"orbax:{newest}")
      continue
    there = steps.list_steps(folder / "checkpoints")
    for step in _named_steps(one, wanted, there):
      found.append(f"orbax:{folder / 'checkpoints' / str(step)}")
  twice = sorted({one for one in found if found.count(one) > 1})
  if twice:
    raise errors.UserError(
      f"--ckpts names {twice[0]} twice; name it once and give it a weight."
    )
  return tuple(found)


def _named_steps(one: str, wanted: str, there: Sequence[int]) -> list[int]:
  """The steps of a list such as 900,500-800; each must be there."""
  found = []
  for part in wanted.split(","):
    first, dash, last = part.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
      raise errors.UserError(
        f"--ckpts={one}: {part!r} is no step and no range; steps look like"
        " 900,950 or 500-1000."
      )
    low, high = int(first), int(last if dash else first)
    inside = [step for step in there if low <= step <= high]
    if not inside:
      raise errors.BadFileError(
        f"--ckpts={one}: there is no step {part}; there are"
        f" {', '.join(map(str, there))}."
      )
    found += inside
  return found


def shares_of(
  given: Sequence[str], sources: Sequence[str]
) -> tuple[float, ...]:
  """The numbers of --weights over their sum; all the same without them."""
  if not given:
    return (1 / len(sources),) * len(sources)
  shown = f"--weights={','.join(given)}"
  if len(given) != len(sources):
    raise errors.UserError(
      f"{shown} has {len(given)} numbers for {len(sources)} checkpoints:"
      f" {', '.join(sources)}."
    )
  try:
    numbers = [float(word) for word in given]
  except ValueError as error:
    raise errors.UserError(f"{shown}: {error}.") from error
  if not all(number >= 0 and math.isfinite(number) for number in numbers):
    raise errors.UserError(f"{shown}: a weight must be 0 or more.")
  total = math.fsum(numbers)
  if not 0 < total < math.inf:
    raise errors.UserError(f"{shown}: their sum must be positive.")
  return tuple(number / total for number in numbers)


def mean(
  config: config_lib.LlamaConfig,
  sources: Sequence[weights.Source],
  shares: Sequence[float],
  dtype: np.dtype | None,
) -> weights.Source:
  """The weighted mean of sources of one model, unread, under Hugging Face's
  names.

  Args:
    config: of all.
    sources: in any schemes.
    shares: of each; their sum is 1.
    dtype: what to round to; None for what all have, float32 where they differ.
  """
  halves = [weights.as_scheme(config, source, "hf") for source in sources]
  kept = {}
  for place in names.places(config, "hf"):
    found = {half.tensors[place.name].dtype for half in halves}
    kept[place.name] = dtype or (
      found.pop() if len(found) == 1 else np.dtype(np.float32)
    )

  def rows(name: str, start: int, stop: int) -> np.ndarray:
    total = None
    for half, share in zip(halves, shares, strict=True):
      part = half.rows(name, start, stop).astype(np.float64)
      part *= share
      total = part if total is None else np.add(total, part, out=total)
    if kept[name] != np.float32:
      total = _to_odd(total)
    return weights.cast(total, kept[name], f"the mean of {name}")

  tensors = {
    name: weights.Tensor(
      halves[0].tensors[name].shape, dtype, weights.stored_as(dtype)
    )
    for name, dtype in kept.items()
  }
  return weights.Source("the mean", "hf", tensors, rows)


def _to_odd(value: np.ndarray) -> np.ndarray:
  """float64 as float32 whose last bit says that something was cut off.

  Rounded again to half the bits, it gives what the float64 would have given;
  rounding to the nearest twice would not.
  """
  near = value.astype(np.float32)
  bits = near.view(np.uint32)
  inexact = (near != value) & (bits & 1 == 0) & ~np.isnan(value)
  short = np.abs(near) < np.abs(value)
  bits[inexact & short] += 1
  bits[inexact & ~short] -= 1
  return near


def average(job: Job) -> None:
  """Checks that the checkpoints fit, and writes their mean."""
  _, module, path = checkpoint.writer(job.destination)
  lines = [
    f"{share:.6f}  {source}"
    for source, share in zip(job.sources, job.shares, strict=True)
  ]
  print("\n".join(lines), flush=True)
  config, sources, tokenizer = _open(job.sources)
  result = mean(config, sources, job.shares, DTYPES.get(job.dtype))
  total = sum(tensor.num_bytes for tensor in result.tensors.values())
  if not building.unfinished(path):
    # A fiftieth on top for metadata, the tokenizer and filesystem blocks.
    atomic.check_free(path, total * 1.02 + (16 << 20))
  with (
    tqdm.tqdm(
      desc="average", total=total, unit="B", unit_scale=True, mininterval=0.5
    ) as bar,
    building.building(
      path, _fingerprint(job), lambda unit, num_bytes: bar.update(num_bytes)
    ) as site,
  ):
    if site.done:
      print(f"resumed: {len(site.done)} tensors are there", flush=True)
    module.write_into(
      site, config, result, tokenizer, block_bytes=job.block_bytes
    )
    if site.content.is_dir():
      atomic.write_text(site.content / RECORD, "\n".join([*lines, ""]))
  print(f"done: {job.destination}, the mean of {len(job.sources)} checkpoints")


def _open(references: Sequence[str]):
  """(LlamaConfig, their sources, a tokenizer or None), once they fit."""
  first: dict[str, Any] = {}
  sources = []
  for reference in references:
    config, source = checkpoint.open_tensors(reference, "--ckpts")
    weights.check(config, source)
    weights.check_tied(config, source)
    tokenizer = checkpoint.read_tokenizer(reference, "--ckpts")
    sources.append(source)
    told = {
      f"model.{field.name}": getattr(config, field.name)
      for field in dataclasses.fields(config)
    }
    if tokenizer is not None:
      told["tokenizer"] = tokenizer
    for what, value in told.items():
      before, owner = first.setdefault(what, (value, reference))
      if what == "tokenizer":
        if not proof.same_vocabulary(before, value):
          raise errors.UserError(
            f"--ckpts: the tokenizers of {owner} and {reference} give other"
            " ids; a mean needs models of one tokenizer."
          )
      elif before != value:
        raise errors.UserError(
          f"--ckpts: {what} is {before} in {owner} and {value} in {reference};"
          " a mean needs models of one shape."
        )
  tokenizer, _ = first.get("tokenizer", (None, None))
  return config, sources, tokenizer


def _fingerprint(job: Job) -> dict[str, Any]:
  """What tells this mean from another of the same destination."""
  stamps = []
  for source in job.sources:
    root = pathlib.Path(checkpoint.parse(source, "--ckpts")[1])
    files = sorted(root.iterdir()) if root.is_dir() else [root]
    stamps.append(
      [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    )
  return {**dataclasses.asdict(job), "files": stamps}


def main(argv) -> None:
  del argv
  if not _CKPTS.value:
    raise errors.UserError("--ckpts=REF is needed, once for each or a list.")
  if not _DST.value:
    raise errors.UserError("--dst=SCHEME:PATH is needed.")
  sources = resolve(_CKPTS.value)
  job = Job(
    sources,
    shares_of(_WEIGHTS.value, sources),
    _DST.value,
    dtype=_DTYPE.value,
    max_host_gb=_MAX_HOST_GB.value,
  )
  try:
    average(job)
  except KeyboardInterrupt:
    raise KeyboardInterrupt(
      "interrupted; type the same command again to go on"
    ) from None


if __name__ == "__main__":
  _CKPTS = flags.DEFINE_multi_string(
    "ckpts", [], "RUN:steps=900,950-1000 or REF; may be repeated."
  )
  _WEIGHTS = flags.DEFINE_list(
    "weights", [], "A number for each checkpoint; divided by their sum."
  )
  _DST = flags.DEFINE_string(
    "dst", None, "orbax:DIR, hf:DIR, meta:DIR or gguf:FILE."
  )
  _DTYPE = flags.DEFINE_string(
    "dtype", "", "float32, bfloat16 or float16; as the sources are if empty."
  )
  _MAX_HOST_GB = flags.DEFINE_float("max_host_gb", 4.0, "Memory to stay under.")
  shell.run(main)
