"""Llama weights as a GGUF file that llama.cpp runs.

The gguf package writes the header and quantises; the tensors are streamed to
their places behind it.

Matrices keep the source's dtype or become Q8_0; norms and RoPE factors are
always F32, which llama.cpp demands.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import collections
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import gguf as gguf_package
import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import building, gguf_config, names, proof, weights
from llama_jax.model import config as config_lib

QUANTISATIONS = ("Q8_0",)

_Type = gguf_package.GGMLQuantizationType
_ALIGNMENT = gguf_package.GGUF_DEFAULT_ALIGNMENT
# What llama.cpp's own converter gives rows of the embedding without a token.
_SPARE_SCORE = -1000.0


def write(
  path: str | os.PathLike,
  config: config_lib.LlamaConfig,
  params: Mapping[str, Any],
  tokenizer: Any,
  **settings: Any,
) -> None:
  """Writes params in memory as one GGUF file.

  Args:
    path: the file; it must be absent.
    config: the model's configuration.
    params: our tree.
    tokenizer: see write_into.
    **settings: see write_into.

  Raises:
    UserError: the destination is taken or cannot be written, or GGUF cannot
      hold this model.
    BadFileError: params are not those of config.
  """
  source = weights.from_params(config, params, "gguf")
  with building.building(path) as site:
    write_into(site, config, source, tokenizer, **settings)


def write_into(
  site: building.Building,
  config: config_lib.LlamaConfig,
  source: weights.Source,
  tokenizer: Any,
  *,
  quantize: str | None = None,
  block_bytes: int = weights.BLOCK_BYTES,
) -> None:
  """Fills a site with one GGUF file.

  Args:
    site: where to; what an earlier process finished there is not done again.
    config: the model's configuration.
    source: the weights in any scheme.
    tokenizer: goes into the file; or None, and llama.cpp then takes ids only.
    quantize: one of QUANTISATIONS, for every matrix whose rows are whole
      blocks of it (32 numbers for Q8_0); others keep the source's dtype, as do
      all for None.
    block_bytes: of weights in memory at once, about.

  Raises:
    UserError: GGUF cannot hold this model.
  """
  if quantize not in (None, *QUANTISATIONS):
    raise errors.ConfigError(
      f"quantize={quantize!r} cannot be written; use one of"
      f" {', '.join(QUANTISATIONS)}, or None to keep the weights' dtype."
    )
  if tokenizer is not None:
    proof.check_vocabulary(config, tokenizer, source.file)
  source = _with_rope_factors(config, weights.as_scheme(config, source, "gguf"))
  types = {
    name: _type_of(tensor, quantize) for name, tensor in source.tensors.items()
  }
  metadata = _metadata(config, source, types, tokenizer)
  path = site.content
  header = _header(path.with_name("header"), metadata, source, types)
  starts, end = {}, len(header)
  for name, tensor in source.tensors.items():
    starts[name] = end
    end += _padded(_num_bytes(tensor, types[name]))
  with building.RowFile(path, end) as file:
    file.write(header, 0)

    def put(name: str, start: int, rows: np.ndarray) -> None:
      content = _encode(source.file, name, rows, types[name])
      file.write(content, starts[name] + start * (content.nbytes // len(rows)))

    site.fill(source, source.tensors, block_bytes, put)


def _with_rope_factors(
  config: config_lib.LlamaConfig, source: weights.Source
) -> weights.Source:
  """The tensors that the file will hold, and no other."""
  tensors = {
    place.name: source.tensors[place.name]
    for place in names.places(config, "gguf")
  }
  factors = gguf_config.rope_factors(config)
  if factors is not None:
    tensors[gguf_config.ROPE_FACTORS] = weights.Tensor(
      factors.shape, factors.dtype, "F32"
    )

  def rows(name: str, start: int, stop: int) -> np.ndarray:
    if name == gguf_config.ROPE_FACTORS:
      return factors[start:stop]
    return source.rows(name, start, stop)

  return weights.Source(source.file, "gguf", tensors, rows)


def _type_of(tensor: weights.Tensor, quantize: str | None) -> _Type:
  if len(tensor.shape) == 1:
    return _Type.F32
  if quantize is not None:
    block, _ = gguf_package.GGML_QUANT_SIZES[_Type[quantize]]
    if tensor.shape[-1] % block == 0:
      return _Type[quantize]
  return _Type[weights.stored_as(tensor.dtype)]


def _num_bytes(tensor: weights.Tensor, type: _Type) -> int:
  block, block_bytes = gguf_package.GGML_QUANT_SIZES[type]
  return math.prod(tensor.shape) // block * block_bytes


def _padded(num_bytes: int) -> int:
  return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _encode(file: str, name: str, rows: np.ndarray, type: _Type) -> np.ndarray:
  if type.name in names.DTYPES:
    kept = np.ascontiguousarray(rows, names.DTYPES[type.name])
    return kept.reshape(-1).view(np.uint8)
  # The package walks 16 rows at a time: longer ones are twice as fast.
  num_rows = len(rows) // math.gcd(len(rows), 64)
  rows = rows.reshape(num_rows, -1).astype(np.float32)
  with np.errstate(all="ignore"):
    blocks = gguf_package.quants.quantize(rows, type)
  # A block of Q8_0 is a float16, the scale, and 32 bytes.
  _, block_bytes = gguf_package.GGML_QUANT_SIZES[type]
  scales = blocks.reshape(-1, block_bytes)[:, :2].copy().view(np.float16)
  if not np.all(np.isfinite(scales)):
    raise errors.UserError(
      f"quantize={type.name}: {file}: tensor {name} holds values that are not"
      " finite or too large for the scale of a block; use None."
    )
  return blocks


def _metadata(
  config: config_lib.LlamaConfig,
  source: weights.Source,
  types: Mapping[str, _Type],
  tokenizer: Any,
) -> dict[str, Any]:
  """Every key but general.architecture, which the package's writer adds."""
  count = collections.Counter()
  for name, tensor in source.tensors.items():
    if len(tensor.shape) > 1:
      count[types[name]] += math.prod(tensor.shape)
  most = count.most_common(1)[0][0].name
  file_type = "ALL_F32" if most == "F32" else f"MOSTLY_{most}"
  fields = {
    "general.type": "model",
    "general.name": pathlib.Path(source.file).name.removesuffix(".gguf"),
    "general.file_type": int(gguf_package.LlamaFileType[file_type]),
    "general.quantization_version": gguf_package.GGML_QUANT_VERSION,
    **gguf_config.write_fields(config),
  }
  if tokenizer is None:
    return fields | {"tokenizer.ggml.model": "none"}
  words = dict(tokenizer.gguf_metadata())
  # llama.cpp wants a token for every row of the embedding.
  spare = range(len(words["tokenizer.ggml.tokens"]), config.vocab_size)
  for key, values in (
    ("tokens", [f"[PAD{row}]" for row in spare]),
    ("token_type", [int(gguf_package.TokenType.UNUSED)] * len(spare)),
    ("scores", [_SPARE_SCORE] * len(spare)),
  ):
    if (key := f"tokenizer.ggml.{key}") in words:
      words[key] = [*words[key], *values]
  return fields | words


def _header(
  path: pathlib.Path,
  metadata: Mapping[str, Any],
  source: weights.Source,
  types: Mapping[str, _Type],
) -> bytes:
  """All that stands before the tensors; uses a file of this path."""
  writer = gguf_package.GGUFWriter(path, gguf_config.ARCHITECTURE)
  for key, value in metadata.items():
    if isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif isinstance(value, str):
      writer.add_string(key, value)
    else:
      writer.add_array(key, value)
  for name, tensor in source.tensors.items():
    writer.add_tensor_info(
      name,
      tensor.shape,
      np.dtype(np.float32),
      _num_bytes(tensor, types[name]),
      raw_dtype=types[name],
    )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  writer.close()
  content = path.read_bytes()
  path.unlink()
  return content.ljust(_padded(len(content)), b"\0")
