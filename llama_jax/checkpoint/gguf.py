"""Llama weights from llama.cpp's GGUF files; gguf_write.py is the way back.

The gguf package does what it is best at, the arithmetic of the quantisations;
the header is walked by text/gguf_header.py.

F32, F16 and BF16 tensors keep their dtype; every quantised type becomes
float32, which holds its values exactly.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import os
from typing import Any

import gguf as gguf_package
import numpy as np

from llama_jax import errors, text
from llama_jax.checkpoint import gguf_config, gguf_write, names, proof, weights
from llama_jax.model import config as config_lib
from llama_jax.text import gguf_header

write, write_into = gguf_write.write, gguf_write.write_into


@dataclasses.dataclass(frozen=True)
class Extent:
  """Where a tensor lies in the file.

  Attributes:
    type: its ggml type.
    shape: as NumPy sees it, the reverse of the file's order.
    offset: bytes from the start of the file.
    size: bytes.
  """

  type: gguf_package.GGMLQuantizationType
  shape: tuple[int, ...]
  offset: int
  size: int


def read(
  path: str | os.PathLike,
) -> tuple[config_lib.LlamaConfig, dict[str, Any], Any]:
  """A GGUF file as (LlamaConfig, params, tokenizer or None).

  Peak memory is the result and one tensor.

  Raises:
    BadFileError: the file is damaged, cut off, or not a Llama.
  """
  header = gguf_header.read(path)
  config, source = _open(path, header)
  tokenizer = _tokenizer(path, header)
  if tokenizer is not None:
    proof.check_vocabulary(config, tokenizer, source.file)
  return config, weights.read_params(config, source), tokenizer


def read_config(path: str | os.PathLike) -> config_lib.LlamaConfig:
  """The configuration alone; reads no weights but the RoPE factors."""
  return open_tensors(path)[0]


def read_tokenizer(path: str | os.PathLike) -> Any:
  """The tokenizer inside the file, or None if it holds none."""
  return _tokenizer(path, gguf_header.read(path))


def open_tensors(
  path: str | os.PathLike,
) -> tuple[config_lib.LlamaConfig, weights.Source]:
  """The configuration and the tensors in llama.cpp's names and layout."""
  return _open(path, gguf_header.read(path))


def _tokenizer(path: str | os.PathLike, header: gguf_header.Header) -> Any:
  kind = header.metadata.get("tokenizer.ggml.model")
  if kind in (None, "none", "no_vocab"):
    return None
  return text.from_gguf_metadata(header.metadata, os.fspath(path))


def _open(
  path: str | os.PathLike, header: gguf_header.Header
) -> tuple[config_lib.LlamaConfig, weights.Source]:
  file = os.fspath(path)
  extents = _extents(file, header)
  for kind in {extent.type for extent in extents.values()}:
    _refuse_unknown_type(file, kind)
  tensors = {}
  for name, extent in extents.items():
    dtype = names.DTYPES.get(extent.type.name, np.dtype(np.float32))
    tensors[name] = weights.Tensor(extent.shape, dtype, extent.type.name)

  def rows(name: str, start: int, stop: int) -> np.ndarray:
    return _read_rows(file, name, extents[name], start, stop)

  source = weights.Source(file, "gguf", tensors, rows)
  return gguf_config.parse(header.metadata, source), source


def _extents(file: str, header: gguf_header.Header) -> dict[str, Extent]:
  """Checks, as llama.cpp does, that the tensors lie in the order of the
  header, without holes, and within the file."""
  extents: dict[str, Extent] = {}
  offset = end = 0
  for name, info in header.tensors.items():
    try:
      kind = gguf_package.GGMLQuantizationType(info.type)
    except ValueError:
      raise gguf_header.damaged(
        file, f"the tensor {name} has the unknown type {info.type}"
      ) from None
    block, block_bytes = gguf_package.GGML_QUANT_SIZES[kind]
    if min(info.shape) < 1 or info.shape[-1] % block:
      raise gguf_header.damaged(
        file,
        f"the tensor {name} of type {kind.name} has the shape"
        f" {list(info.shape)}, whose last must be a multiple of {block}",
      )
    if info.offset != offset:
      raise gguf_header.damaged(
        file,
        f"the tensor {name} is at offset {info.offset} of the data and should"
        f" be at {offset}",
      )
    size = math.prod(info.shape) // block * block_bytes
    start = header.data_start + offset
    extents[name] = Extent(kind, info.shape, start, size)
    offset += -(-size // header.alignment) * header.alignment
    end = start + size
  if end > header.file_size:
    raise errors.BadFileError(
      f"{file} is cut off: its tensors need {end} bytes, the file has"
      f" {header.file_size}. Fetch it again."
    )
  return extents


def _refuse_unknown_type(
  file: str, kind: gguf_package.GGMLQuantizationType
) -> None:
  """Tries the package on one block of zeros; a header can name any type."""
  if kind.name in names.DTYPES:
    return
  _, block_bytes = gguf_package.GGML_QUANT_SIZES[kind]
  try:
    _dequantize(np.zeros((1, block_bytes), np.uint8), kind)
  except NotImplementedError:
    raise errors.BadFileError(
      f"{file} holds tensors of type {kind.name}, which cannot be dequantised;"
      " F32, F16, BF16 and the Q, IQ, TQ and MXFP4 types can."
    ) from None


def _dequantize(
  blocks: np.ndarray, kind: gguf_package.GGMLQuantizationType
) -> np.ndarray:
  # A block's scale may be any float16; the values are passed on as they are.
  with np.errstate(all="ignore"):
    return gguf_package.quants.dequantize(blocks, kind)


def _read_rows(
  path: str, name: str, extent: Extent, start: int, stop: int
) -> np.ndarray:
  if len(extent.shape) == 1 and extent.type.name not in names.DTYPES:
    # A block of the quantisation holds many of such rows.
    whole = dataclasses.replace(extent, shape=(1, *extent.shape))
    return _read_rows(path, name, whole, 0, 1)[0, start:stop]
  row_bytes = extent.size // extent.shape[0]
  offset, size = extent.offset + start * row_bytes, (stop - start) * row_bytes
  raw = weights.read_bytes(path, name, offset, size)
  shape = (stop - start, *extent.shape[1:])
  if extent.type.name in names.DTYPES:
    return raw.view(names.DTYPES[extent.type.name]).reshape(shape)
  # The package walks 16 rows at a time: longer ones are twice as fast.
  num_rows = math.prod(shape[:-1])
  blocks = raw.reshape(num_rows // math.gcd(num_rows, 64), -1)
  return _dequantize(blocks, extent.type).reshape(shape)
