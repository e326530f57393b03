"""Brings weights from one format to another, with a proof.

  python -m llama_jax.convert --src=gguf:FILE --dst=orbax:DIR [--dtype=bfloat16]
  python -m llama_jax.convert --src=orbax:RUN --dst=peft:DIR
  python -m llama_jax.convert --describe=REF

Tensors pass through block by block, so that memory stays under --max_host_gb
whatever the model. The destination is built under another name, where the same
command goes on after an interrupt; it is read back and proven before it gets
its own: every tensor, brought back to the source's names and layout, is the
same or what --dtype rounds it to; and a plain NumPy Llama on the source's
tensors gives the same logits and loss as our model on what was written, also at
positions beyond the original context where RoPE is scaled.

peft: takes the adapters of a LoRA run alone; every other format takes it as the
whole model that it is with its base.
"""

import collections
import contextlib
import dataclasses
import importlib
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import tqdm
from absl import flags

from llama_jax import checkpoint, errors, shell, text
from llama_jax.checkpoint import (
  account,
  atomic,
  building,
  describe,
  names,
  peft,
  store,
  verify,
  weights,
)

PROOF = "conversion.txt"
PEFT = "peft:"
Q8_0 = "q8_0"
DTYPES = {
  "float32": "F32",
  "float16": "F16",
  "bfloat16": "BF16",
  Q8_0: "Q8_0",
}

# Python, JAX and orbax; and the blocks that a conversion holds at once, read,
# turned, cast and on their way to the disk.
_BASE_BYTES = 1.2e9
_BLOCKS = 10
_LEAST_GB = 1.5


@dataclasses.dataclass(frozen=True)
class Job:
  """A conversion, as it was typed.

  Attributes:
    source: --src.
    destination: --dst.
    dtype: --dtype, a key of DTYPES, or "" to keep what is there.
    model: --model, a preset that says what a meta: source does not.
    tokenizer: --tokenizer, for a source that has none.
    max_host_gb: --max_host_gb.
    shard_gb: --shard_gb, of hf: files.
    model_parallel: --model_parallel, files of meta:.
  """

  source: str
  destination: str
  dtype: str = ""
  model: str = ""
  tokenizer: str = ""
  max_host_gb: float = 4.0
  shard_gb: float = 5.0
  model_parallel: int = 1

  def __post_init__(self):
    if self.dtype and self.dtype not in DTYPES:
      raise errors.UserError(
        f"--dtype={self.dtype} is not known; use one of {', '.join(DTYPES)}."
      )
    if self.max_host_gb < _LEAST_GB:
      raise errors.UserError(
        f"--max_host_gb={self.max_host_gb:g} is too little; use {_LEAST_GB} or"
        " more."
      )
    if not self.shard_gb > 0:
      raise errors.UserError(f"--shard_gb={self.shard_gb:g} must be positive.")

  @property
  def block_bytes(self) -> int:
    """Of weights in one block, so that all of them keep to max_host_gb."""
    room = (self.max_host_gb * 1e9 - _BASE_BYTES) / _BLOCKS
    return int(min(weights.BLOCK_BYTES, room))


def convert(job: Job, *, check: bool) -> None:
  """Reads, writes, proves, and only then names the destination."""
  start = time.monotonic()
  if job.destination.startswith(PEFT):
    _write_adapters(job)
    return
  scheme, module, path = checkpoint.writer(job.destination)
  if job.dtype == Q8_0 and scheme != "gguf":
    raise errors.UserError(
      f"--dtype=q8_0 is a quantisation of gguf:; --dst={job.destination} takes"
      " float32, bfloat16 or float16."
    )
  read = open_source(job)
  config, source = read.config, read.source
  print(f"read     {_summary(read)}", flush=True)
  wanted = source
  if job.dtype and job.dtype != Q8_0:
    wanted = weights.as_dtype(source, names.DTYPES[DTYPES[job.dtype]])
  taken = [
    wanted.tensors[place.name] for place in names.places(config, source.scheme)
  ]
  total = sum(tensor.num_bytes for tensor in taken)
  if not building.unfinished(path):
    needed = total
    if job.dtype == Q8_0:  # 34 bytes for 32 weights
      needed = sum(math.prod(tensor.shape) * 34 // 32 for tensor in taken)
    # A fiftieth on top for metadata, the tokenizer and filesystem blocks.
    atomic.check_free(path, needed * 1.02 + (16 << 20))
  settings = _settings(job, scheme)
  with (
    _bar("convert", total) as tick,
    building.building(path, _fingerprint(job), tick) as site,
  ):
    if site.done:
      print(f"resumed  {len(site.done)} tensors are there", flush=True)
    module.write_into(site, config, wanted, read.tokenizer, **settings)
    tick.close()
    print(f"written  {time.monotonic() - start:.1f} s", flush=True)
    shown = None
    if check:
      shown = prove(job, read, site.content)
      if site.content.is_dir():
        atomic.write_text(site.content / PROOF, shown)
  if shown is None:
    print(f"done     {job.destination}, not proven (--nocheck)")
    return
  where = pathlib.Path(path)
  file = where / PROOF
  if not where.is_dir():
    file = where.with_name(f"{where.name}.{PROOF}")
    atomic.write_text(file, shown)
  print(f"done     {job.destination}, {time.monotonic() - start:.1f} s")
  print(f"proof    {file} has every tensor's shape, dtype and hash")


def _write_adapters(job: Job) -> None:
  """--dst=peft:DIR."""
  scheme, run = checkpoint.parse(job.source, "--src")
  if scheme != "orbax":
    raise errors.UserError(
      f"--dst={job.destination} takes the adapters of a LoRA run; --src="
      f"{job.source} has none, give orbax:RUN."
    )
  if job.dtype == Q8_0:
    raise errors.UserError(
      f"--dtype=q8_0 is a quantisation of gguf:; --dst={job.destination} takes"
      " float32, bfloat16 or float16."
    )
  dtype = names.DTYPES[DTYPES[job.dtype or "float32"]]
  base = peft.write(job.destination.removeprefix(PEFT), run, dtype)
  print(f"done     {job.destination}, adapters beside {base}")
  if base.partition(":")[0] in checkpoint.FORMATS:
    print(
      "note: PEFT takes a Hugging Face model; convert that base with"
      " --dst=hf:DIR and name DIR as base_model_name_or_path in"
      f" {peft.CONFIG}."
    )


def open_source(job: Job, knob: str = "--src") -> verify.Side:
  """What --src is under --model, its weights unread."""
  settings = {}
  if job.model:
    if checkpoint.parse(job.source, knob)[0] != "meta":
      raise errors.UserError(
        f"--model={job.model} completes the params.json of a meta: source;"
        f" {knob}={job.source} says by itself what it is."
      )
    settings["model"] = job.model
  config, source = checkpoint.open_tensors(job.source, knob, **settings)
  tokenizer = checkpoint.read_tokenizer(job.source, knob, **settings)
  if job.tokenizer:
    if tokenizer is not None:
      raise errors.UserError(
        f"--tokenizer={job.tokenizer}: {knob}={job.source} has a tokenizer of"
        " its own; leave the flag out."
      )
    tokenizer = text.load_tokenizer(job.tokenizer)
  return verify.Side(job.source, config, source, tokenizer)


def _settings(job: Job, scheme: str) -> dict[str, Any]:
  """What the destination's writer is told."""
  settings: dict[str, Any] = {"block_bytes": job.block_bytes}
  if scheme == "hf":
    settings["shard_bytes"] = int(job.shard_gb * 1e9)
  if scheme == "meta":
    settings["model_parallel"] = job.model_parallel
  if scheme == "gguf" and job.dtype == Q8_0:
    settings["quantize"] = DTYPES[Q8_0]
  return settings


def _summary(side: verify.Side) -> str:
  tensors, tokenizer = side.source.tensors.values(), side.tokenizer
  stored = ", ".join(sorted({tensor.stored for tensor in tensors}))
  total = sum(weights.stored_bytes(tensor) for tensor in tensors)
  words = "no tokenizer"
  if tokenizer is not None:
    words = f"a tokenizer of {tokenizer.vocab_size:,} words"
    if tokenizer.chat_template is not None:
      words += " and a chat template"
  return (
    f"{side.reference}: {len(tensors)} tensors, {total / 1e6:,.0f} MB as"
    f" {stored}, {words}"
  )


def _fingerprint(job: Job) -> dict[str, Any]:
  """What tells this conversion from another of the same destination."""
  scheme, path = checkpoint.parse(job.source, "--src")
  root = pathlib.Path(path)
  if scheme == "orbax":
    root = store.locate(path)[1]
  files = sorted(root.iterdir()) if root.is_dir() else [root]
  stamps = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
  return {**dataclasses.asdict(job), "files": stamps}


class _Tick:
  """Tells a bar of tensors and bytes; ends it once."""

  def __init__(self, bar: tqdm.tqdm):
    self._bar = bar
    self._units = 0

  def __call__(self, unit: str, num_bytes: int) -> None:
    del unit
    self._units += 1
    self._bar.set_postfix_str(f"{self._units} tensors", refresh=False)
    self._bar.update(num_bytes)

  def close(self) -> None:
    self._bar.close()


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[_Tick]:
  with tqdm.tqdm(
    desc=what, total=total, unit="B", unit_scale=True, mininterval=0.5
  ) as bar:
    yield _Tick(bar)


def prove(job: Job, read: verify.Side, content: pathlib.Path) -> str:
  """The proof that what was written is what was read, a line a tensor.

  Raises BadFileError where it is not.
  """
  scheme, _ = checkpoint.parse(job.destination, "--dst")
  module = importlib.import_module(checkpoint.FORMATS[scheme])
  settings = {"model": job.model} if scheme == "meta" and job.model else {}
  written = verify.Side(
    job.destination,
    *module.open_tensors(content, **settings),
    module.read_tokenizer(content),
  )
  verify.check_settings(read, written)
  total = sum(tensor.num_bytes for tensor in read.source.tensors.values())
  with _bar("check", total) as tick:
    entries = account.account(
      read.config,
      read.source,
      written.source,
      tick=lambda num_bytes: tick("", num_bytes),
      block_bytes=job.block_bytes,
    )
  table = account.table(entries)
  account.check(entries, job.destination)
  counts = collections.Counter(entry.verdict for entry in entries)
  verdicts = ", ".join(f"{n} {word}" for word, n in counts.items())
  outcome = f"tensors  {len(entries)}: {verdicts}, there and back"
  print(outcome, flush=True)
  forwards = verify.forward(
    read,
    written,
    rounded=counts["rounded"] > 0,
    block_bytes=job.block_bytes,
    max_bytes=int(job.max_host_gb * 1e9 - _BASE_BYTES),
  )
  print("\n".join(forwards), flush=True)
  head = f"{job.source} -> {job.destination}"
  return "\n".join([head, table, outcome, *forwards, ""])


def main(argv) -> None:
  del argv
  if _DESCRIBE.value:
    if _SRC.value or _DST.value:
      raise errors.UserError(
        f"--describe={_DESCRIBE.value} stands alone; leave out --src and --dst."
      )
    job = Job(_DESCRIBE.value, "", model=_MODEL.value)
    print(describe.describe(open_source(job, "--describe")))
    return
  for knob, value in (("--src", _SRC.value), ("--dst", _DST.value)):
    if not value:
      raise errors.UserError(f"{knob}=SCHEME:PATH is needed.")
  job = Job(
    _SRC.value,
    _DST.value,
    dtype=_DTYPE.value,
    model=_MODEL.value,
    tokenizer=_TOKENIZER.value,
    max_host_gb=_MAX_HOST_GB.value,
    shard_gb=_SHARD_GB.value,
    model_parallel=_MODEL_PARALLEL.value,
  )
  try:
    convert(job, check=_CHECK.value)
  except KeyboardInterrupt:
    raise KeyboardInterrupt(
      "interrupted; type the same command again to go on"
    ) from None


if __name__ == "__main__":
  _SRC = flags.DEFINE_string(
    "src", None, "orbax:DIR, hf:DIR, meta:DIR, gguf:FILE or llama2c:FILE."
  )
  _DST = flags.DEFINE_string(
    "dst", None, "orbax:DIR, hf:DIR, meta:DIR, gguf:FILE or peft:DIR."
  )
  _DESCRIBE = flags.DEFINE_string("describe", None, "Say what REF is, and end.")
  _DTYPE = flags.DEFINE_string(
    "dtype",
    "",
    "float32, bfloat16, float16, or q8_0 for gguf:; as the source is if empty.",
  )
  _MODEL = flags.DEFINE_string(
    "model", "", "A preset that says what a meta: folder does not."
  )
  _TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "A tokenizer for a source that has none."
  )
  _MAX_HOST_GB = flags.DEFINE_float("max_host_gb", 4.0, "Memory to stay under.")
  _SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "Most of one hf: file, GB.")
  _MODEL_PARALLEL = flags.DEFINE_integer(
    "model_parallel", 1, "Files that a meta: folder is split into."
  )
  _CHECK = flags.DEFINE_boolean("check", True, "Read back and prove.")
  shell.run(main)
