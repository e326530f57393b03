"""Llama weights from llama2.c's .bin files, versions 0 and 1.

Both are a header of whole numbers and all float32 weights in a fixed order,
each kind of all layers together. RoPE is Meta's, with a theta of 1e4, and the
norms' epsilon is 1e-5: llama2.c has no others.

Format: https://github.com/karpathy/llama2.c/blob/master/export.py
"""

import dataclasses
import math
import os
import pathlib
import struct
from typing import Any

import numpy as np

from llama_jax import errors, text
from llama_jax.checkpoint import names, proof, weights
from llama_jax.model import config as config_lib
from llama_jax.text import files

_NORM_EPS, _ROPE_THETA = 1e-5, 1e4
_MAGIC = 0x616B3432
_SIZES = struct.Struct("<7i")
_HEADER_BYTES = 256

# Paths of names.TABLE in the order of the file. _TABLES are cosines and sines
# of RoPE, which are computed anew.
_TABLES = "rope tables"
_ORDERS = {
  0: (
    "embed/embedding",
    "layers/attention_norm/scale",
    "layers/attention/query/kernel",
    "layers/attention/key/kernel",
    "layers/attention/value/kernel",
    "layers/attention/out/kernel",
    "layers/mlp_norm/scale",
    "layers/mlp/gate/kernel",
    "layers/mlp/down/kernel",
    "layers/mlp/up/kernel",
    "final_norm/scale",
    _TABLES,
    "head/kernel",
  ),
  1: (
    "layers/attention_norm/scale",
    "layers/mlp_norm/scale",
    "final_norm/scale",
    "embed/embedding",
    "layers/attention/query/kernel",
    "layers/attention/key/kernel",
    "layers/attention/value/kernel",
    "layers/attention/out/kernel",
    "layers/mlp/gate/kernel",
    "layers/mlp/down/kernel",
    "layers/mlp/up/kernel",
    "head/kernel",
  ),
}


@dataclasses.dataclass(frozen=True)
class _Header:
  version: int
  num_bytes: int
  config: config_lib.LlamaConfig


def read(
  path: str | os.PathLike,
) -> tuple[config_lib.LlamaConfig, dict[str, Any], Any]:
  """A .bin file as (LlamaConfig, params, tokenizer or None).

  Raises:
    BadFileError: the file is damaged, cut off, or of another version.
  """
  config, source = open_tensors(path)
  tokenizer = read_tokenizer(path)
  if tokenizer is not None:
    proof.check_vocabulary(config, tokenizer, source.file)
  return config, weights.read_params(config, source), tokenizer


def read_config(path: str | os.PathLike) -> config_lib.LlamaConfig:
  """The configuration alone."""
  return open_tensors(path)[0]


def read_tokenizer(path: str | os.PathLike) -> Any:
  """That of the one *.model in the same folder, else of the one tok*.bin."""
  folder = pathlib.Path(path).absolute().parent
  found = list(folder.glob("*.model")) or list(folder.glob("tok*.bin"))
  return text.load_tokenizer(found[0]) if len(found) == 1 else None


def open_tensors(
  path: str | os.PathLike,
) -> tuple[config_lib.LlamaConfig, weights.Source]:
  """The configuration and the tensors under Meta's names and in its layout."""
  file = os.fspath(path)
  with files.opened(path) as opened:
    size = opened.seek(0, os.SEEK_END)
    opened.seek(0)
    header = _parse(opened.read(_HEADER_BYTES), file)
  config = header.config
  table = {row.path: row for row in names.rows(config)}
  num_tables = config.context_length * (config.head_dim // 2) * 2
  counts = {
    entry: math.prod(names.our_shape(config, table[entry]))
    for entry in _ORDERS[header.version]
    if entry in table
  } | {_TABLES: num_tables}
  starts, end = {}, header.num_bytes
  for entry in _ORDERS[header.version]:
    starts[entry] = end
    end += 4 * counts.get(entry, 0)
  if end != size:
    raise errors.BadFileError(
      f"{file} ({size} bytes) is damaged, cut off or no llama2.c file: its"
      f" header {_described(config)} asks for {end} bytes."
    )
  tensors, offsets = {}, {}
  for place in names.places(config, "meta"):
    tensor = weights.Tensor(place.shape, np.dtype(np.float32), "F32")
    tensors[place.name] = tensor
    offsets[place.name] = (
      starts[place.row.path] + (place.layer or 0) * tensor.num_bytes
    )

  def rows(name: str, start: int, stop: int) -> np.ndarray:
    shape = (stop - start, *tensors[name].shape[1:])
    row_bytes = 4 * math.prod(shape[1:])
    found = weights.read_bytes(
      file, name, offsets[name] + start * row_bytes, 4 * math.prod(shape)
    )
    return found.view("<f4").reshape(shape)

  return config, weights.Source(file, "meta", tensors, rows)


def _parse(header: bytes, file: str) -> _Header:
  if len(header) < _HEADER_BYTES:
    raise errors.BadFileError(
      f"{file} ({len(header)} bytes) is too small to be a llama2.c file."
    )
  magic, version = struct.unpack_from("<Ii", header)
  if magic == _MAGIC:
    if version != 1:
      what = "quantised to int8" if version == 2 else "unknown"
      raise errors.BadFileError(
        f"{file} is llama2.c's version {version}, which is {what}; export the"
        " model anew with --version 1."
      )
    sizes = _SIZES.unpack_from(header, 8)
    shared = header[8 + _SIZES.size]
    if shared > 1 or any(header[9 + _SIZES.size :]):
      raise errors.BadFileError(
        f"{file} is damaged: its header does not end in zeros."
      )
    return _Header(1, _HEADER_BYTES, _config(sizes, bool(shared), file))
  *rest, vocab_size, context_length = _SIZES.unpack_from(header)
  sizes = (*rest, abs(vocab_size), context_length)
  return _Header(0, _SIZES.size, _config(sizes, vocab_size > 0, file))


def _config(
  header: tuple[int, ...], tied: bool, file: str
) -> config_lib.LlamaConfig:
  dim, hidden_dim, layers, heads, kv_heads, vocab_size, context = header
  if min(header) < 1 or dim % heads or heads % kv_heads:
    raise errors.BadFileError(
      f"{file} is no llama2.c file, or damaged: its header says dim={dim},"
      f" hidden_dim={hidden_dim}, n_layers={layers}, n_heads={heads},"
      f" n_kv_heads={kv_heads}, vocab_size={vocab_size}, seq_len={context}."
    )
  try:
    return config_lib.LlamaConfig(
      vocab_size=vocab_size,
      embed_dim=dim,
      num_layers=layers,
      num_heads=heads,
      num_kv_heads=kv_heads,
      head_dim=dim // heads,
      mlp_dim=hidden_dim,
      norm_eps=_NORM_EPS,
      rope_theta=_ROPE_THETA,
      rope_scaling=None,
      context_length=context,
      tied_embeddings=tied,
    )
  except errors.ConfigError as error:
    raise errors.BadFileError(f"{file}: {error}") from error


def _described(config: config_lib.LlamaConfig) -> str:
  return (
    f"(dim={config.embed_dim}, hidden_dim={config.mlp_dim},"
    f" n_layers={config.num_layers}, n_heads={config.num_heads},"
    f" n_kv_heads={config.num_kv_heads}, vocab_size={config.vocab_size},"
    f" seq_len={config.context_length})"
  )
