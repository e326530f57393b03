"""Every tensor of a source, followed to where it was written and back."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import names, weights
from llama_jax.model import config as config_lib

_DIGITS = 16


@dataclasses.dataclass(frozen=True)
class Entry:
  """What became of one tensor of the source.

  Attributes:
    name: in the source.
    written: its name where it was written; or why it was left out.
    shape: in the source.
    stored: the source's word for how it is kept.
    kept: the same of what was written; "" for a tensor that was left out.
    sha256: first hexadecimal digits over the source's values.
    verdict: "same", "rounded", "left out" or "DIFFERS".
    back: digits over what was written, brought back to the source's layout
      and dtype.
  """

  name: str
  written: str
  shape: tuple[int, ...]
  stored: str
  kept: str
  sha256: str
  verdict: str
  back: str

  @property
  def sound(self) -> bool:
    """Nothing was lost but what the format asked for rounds away."""
    return self.verdict != "DIFFERS"


def account(
  config: config_lib.LlamaConfig,
  source: weights.Source,
  written: weights.Source,
  *,
  tick: Callable[[int], None] = lambda num_bytes: None,
  block_bytes: int = weights.BLOCK_BYTES,
) -> list[Entry]:
  """Compares every tensor with what was written of it, block by block.

  Quantised tensors are taken as their dequantised float32 values. Where
  another dtype was written, the values must be those of the source rounded to
  it; that is then the only difference allowed.

  Args:
    config: of both.
    source: what was read.
    written: what was made of it, in any scheme.
    tick: told of the bytes that were compared.
    block_bytes: in memory at once, of either.

  Raises:
    BadFileError: source and written do not hold the same set of tensors.
  """
  for one in (source, written):
    weights.check(config, one)
    weights.check_tied(config, one)
  back = weights.as_scheme(config, written, source.scheme)
  places = zip(
    names.places(config, source.scheme),
    names.places(config, written.scheme),
    strict=True,
  )
  entries = []
  for here, there in places:
    tensor, kept = source.tensors[here.name], back.tensors[here.name]
    digest, found_digest, rounded = hashlib.sha256(), None, True
    for name, start, stop in source.spans([here.name], block_bytes):
      value = source.rows(name, start, stop)
      found = back.rows(name, start, stop)
      if not _equal(value, found):
        # Up to here both had the same bytes.
        found_digest = found_digest or digest.copy()
        rounded = rounded and _equal(_rounded(value, kept.stored), found)
      if found_digest is not None:
        with np.errstate(over="ignore"):
          found_digest.update(_bytes(found.astype(tensor.dtype, copy=False)))
      digest.update(_bytes(value))
      tick(value.nbytes)
    same = found_digest is None
    found_digest = found_digest or digest
    entries.append(
      Entry(
        name=here.name,
        written=there.name,
        shape=tensor.shape,
        stored=tensor.stored,
        kept=written.tensors[there.name].stored,
        sha256=digest.hexdigest()[:_DIGITS],
        verdict="same" if same else "rounded" if rounded else "DIFFERS",
        back=found_digest.hexdigest()[:_DIGITS],
      )
    )
  for name, why in weights.ignored(source, config).items():
    tensor = source.tensors[name]
    digest = hashlib.sha256(_bytes(source.get(name)))
    entries.append(
      Entry(
        name=name,
        written=f"({why})",
        shape=tensor.shape,
        stored=tensor.stored,
        kept="",
        sha256=digest.hexdigest()[:_DIGITS],
        verdict="left out",
        back="",
      )
    )
  return entries


def as_kept(
  config: config_lib.LlamaConfig,
  source: weights.Source,
  written: weights.Source,
) -> weights.Source:
  """The source with its values rounded as they were written."""
  back = weights.as_scheme(config, written, source.scheme)

  def rows(name: str, start: int, stop: int) -> np.ndarray:
    value = source.rows(name, start, stop)
    return _rounded(value, back.tensors[name].stored).astype(value.dtype)

  return dataclasses.replace(source, tensors=back.tensors, rows=rows)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
  """The same numbers, each NaN and zero by its bits."""
  wide = np.promote_types(a.dtype, b.dtype)
  if {a.dtype, b.dtype} == {names.DTYPES["F16"], names.DTYPES["BF16"]}:
    wide = np.dtype(np.float32)
  bits = f"u{wide.itemsize}"
  return np.array_equal(
    np.ascontiguousarray(a, wide).view(bits),
    np.ascontiguousarray(b, wide).view(bits),
  )


def _bytes(value: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _rounded(value: np.ndarray, stored: str) -> np.ndarray:
  """What a format that stores values so gives back of them."""
  if stored in names.DTYPES:
    with np.errstate(over="ignore"):
      return value.astype(names.DTYPES[stored])
  import gguf

  kind = gguf.GGMLQuantizationType[stored]
  blocks = gguf.quants.quantize(value.astype(np.float32), kind)
  return gguf.quants.dequantize(blocks, kind)


def table(entries: Sequence[Entry]) -> str:
  """The account as aligned text, one tensor a line."""
  lines = [("tensor", "written as", "shape", "from", "to", "sha256", "back")]
  for entry in entries:
    verdict = entry.verdict
    if verdict in ("rounded", "DIFFERS"):
      verdict += f" {entry.back}"
    lines.append(
      (
        entry.name,
        entry.written,
        "x".join(map(str, entry.shape)),
        entry.stored,
        entry.kept,
        entry.sha256,
        verdict,
      )
    )
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) for cell, width in zip(line, widths, strict=True)
    ).rstrip()
    for line in lines
  )


def check(entries: Sequence[Entry], file: str) -> None:
  """Raises BadFileError unless every tensor is accounted for."""
  wrong = [entry.name for entry in entries if not entry.sound]
  if wrong:
    raise errors.BadFileError(
      f"{file}: {len(wrong)} of {len(entries)} tensors differ from what was"
      f" read, {wrong[0]} first; it was not written."
    )
