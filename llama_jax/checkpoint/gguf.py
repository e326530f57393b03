"""Llama weights from llama.cpp's GGUF files.

The header is walked by our own bounded parser: the gguf package's reader
takes seconds for a tokenizer's string arrays, trusts every count it reads and
raises whatever NumPy raises. The package still does what it is best at, the
arithmetic of the quantisations.

F32, F16 and BF16 tensors keep their dtype; every quantised type becomes
float32, which holds its values exactly.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import reprlib
import stat
import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import gguf as gguf_package
import ml_dtypes
import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import names, proof
from llama_jax.model import config as config_lib

ARCHITECTURE = "llama"
_VERSIONS = (2, 3)
_MAX_NAME_BYTES = 1024
_MAX_DIMS = 4
# Longer ones are only counted: nothing in a configuration is longer.
_MAX_ARRAY = 1024
_MAX_STRING_BYTES = 4096

_STRING, _ARRAY = 8, 9
_SCALARS = {
  0: "<B",
  1: "<b",
  2: "<H",
  3: "<h",
  4: "<I",
  5: "<i",
  6: "<f",
  7: "<?",
  10: "<Q",
  11: "<q",
  12: "<d",
}

_PLAIN = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}

# Keys of the llama architecture that change the arithmetic, with the values
# that leave it a Llama.
_NEUTRAL = {
  "expert_count": (0,),
  "use_parallel_residual": (False,),
  "attention.causal": (True,),
  "attention.sliding_window": (0,),
  "attention.clamp_kqv": (0.0,),
  "attention.max_alibi_bias": (0.0,),
  "logit_scale": (0.0, 1.0),
  "embedding_scale": (0.0, 1.0),
  "residual_scale": (0.0, 1.0),
  "attention.scale": (0.0,),
  "attn_logit_softcapping": (0.0,),
  "final_logit_softcapping": (0.0,),
  "rope.scale_linear": (1.0,),
}

# Llama 3.1 to 3.3 differ in the factor alone (RECIPES.md 1).
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _ORIGINAL_CONTEXT = 1.0, 4.0, 8192
# llama.cpp's converter computes the factors in float32.
_FACTORS_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Counted:
  """A long array or string of the metadata, walked over and not kept."""

  count: int


@dataclasses.dataclass(frozen=True)
class Extent:
  """Where a tensor lies in the file.

  Attributes:
    type: the name of its ggml type.
    shape: as NumPy sees it, the reverse of the file's order.
    offset: bytes from the start of the file.
    size: bytes.
  """

  type: str
  shape: tuple[int, ...]
  offset: int
  size: int


@dataclasses.dataclass(frozen=True)
class Header:
  """What stands before the weights.

  Attributes:
    metadata: key -> number, bool, string, list of numbers, or Counted.
    extents: tensor name -> where it lies.
  """

  metadata: Mapping[str, Any]
  extents: Mapping[str, Extent]


def read(
  path: str | os.PathLike,
) -> tuple[config_lib.LlamaConfig, dict[str, Any], Any]:
  """A GGUF file as (LlamaConfig, params, tokenizer or None).

  Peak memory is the result and one tensor.

  Raises:
    BadFileError: the file is damaged, cut off, or not a Llama.
  """
  config, source = open_tensors(path)
  tokenizer = read_tokenizer(path)
  if tokenizer is not None:
    proof.check_vocabulary(config, tokenizer, source.file)
  return config, names.read_params(config, source), tokenizer


def read_config(path: str | os.PathLike) -> config_lib.LlamaConfig:
  """The configuration alone; reads no weights but the RoPE factors."""
  return open_tensors(path)[0]


def read_tokenizer(path: str | os.PathLike) -> Any:
  """The tokenizer inside the file, or None if it holds none."""
  model = read_header(path).metadata.get("tokenizer.ggml.model")
  if model in (None, "none", "no_vocab"):
    return None
  # Late, so that weights alone need no tokenizer library.
  from llama_jax import text

  return text.load_tokenizer(path)


def open_tensors(
  path: str | os.PathLike,
) -> tuple[config_lib.LlamaConfig, names.Source]:
  """The configuration and the tensors in llama.cpp's names and layout."""
  file = os.fspath(path)
  header = read_header(path)
  tensors = {}
  for name, extent in header.extents.items():
    dtype = _PLAIN.get(extent.type, np.dtype(np.float32))
    tensors[name] = names.Tensor(extent.shape, dtype, extent.type)
  for kind in {extent.type for extent in header.extents.values()}:
    _refuse_unknown_type(file, kind)

  def get(name: str) -> np.ndarray:
    return _read_tensor(path, name, header.extents[name])

  source = names.Source(file, "gguf", tensors, get)
  return _config(header.metadata, source), source


def read_header(path: str | os.PathLike) -> Header:
  """Metadata and tensor extents, checked against the size of the file.

  Raises:
    BadFileError: what is wrong, where, and for a file that was cut off the
      size that it should have.
  """
  with _open(path) as file:
    return _Walk(os.fspath(path), file).header()


class _Walk:
  """Reads a header front to back; no count is believed before its bytes."""

  def __init__(self, path: str, file: BinaryIO):
    self.path = path
    self.file = file
    self.size = os.fstat(file.fileno()).st_size
    self.at = 0

  def header(self) -> Header:
    if self.size == 0:
      raise errors.BadFileError(f"{self.path} is empty.")
    magic = self.bytes(4)
    if magic != b"GGUF":
      raise errors.BadFileError(
        f"{self.path} is not a GGUF file: it starts with {magic!r}."
      )
    version = self.number("<I")
    if version not in _VERSIONS:
      swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
      what = (
        "a big-endian GGUF file"
        if swapped in _VERSIONS
        else f"GGUF version {version}"
      )
      raise errors.BadFileError(
        f"{self.path} is {what}; little-endian versions 2 and 3 are read."
      )
    num_tensors, num_keys = self.number("<Q"), self.number("<Q")
    # The least that an entry takes: an empty name, its type, a byte of value;
    # for a tensor an empty name, one dimension, its type and offset.
    self.room(num_keys * 13, f"{num_keys} metadata keys")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
      key = self.name()
      if key in metadata:
        raise self.damaged(f"the key {key} occurs twice")
      metadata[key] = self.value(self.number("<I"), key)
    self.room(num_tensors * 32, f"{num_tensors} tensors")
    alignment = metadata.get("general.alignment", 32)
    if (
      not isinstance(alignment, int)
      or alignment < 1
      or alignment & (alignment - 1)
    ):
      raise self.damaged(f"general.alignment={alignment!r} is no power of 2")
    infos = [self.tensor_info() for _ in range(num_tensors)]
    start = -(-self.at // alignment) * alignment
    return Header(metadata, self.extents(infos, start, alignment))

  def extents(
    self, infos: list[tuple[str, str, tuple, int, int]], start: int, align: int
  ) -> dict[str, Extent]:
    """As llama.cpp: tensors lie in the order of the header, without holes."""
    extents: dict[str, Extent] = {}
    offset = 0
    for name, kind, shape, size, given in infos:
      if name in extents:
        raise self.damaged(f"the tensor {name} occurs twice")
      if given != offset:
        raise self.damaged(
          f"the tensor {name} is at offset {given} of the data and should be"
          f" at {offset}"
        )
      extents[name] = Extent(kind, shape, start + offset, size)
      offset += -(-size // align) * align
    end = max((e.offset + e.size for e in extents.values()), default=start)
    if end > self.size:
      raise errors.BadFileError(
        f"{self.path} is cut off: its tensors need {end} bytes, the file has"
        f" {self.size}. Fetch it again."
      )
    return extents

  def tensor_info(self) -> tuple[str, str, tuple[int, ...], int, int]:
    name = self.name()
    num_dims = self.number("<I")
    if not 1 <= num_dims <= _MAX_DIMS:
      raise self.damaged(f"the tensor {name} has {num_dims} dimensions")
    dims = tuple(self.number("<Q") for _ in range(num_dims))
    number, offset = self.number("<I"), self.number("<Q")
    try:
      kind = gguf_package.GGMLQuantizationType(number)
    except ValueError:
      raise self.damaged(
        f"the tensor {name} has the unknown type {number}"
      ) from None
    block, block_bytes = gguf_package.GGML_QUANT_SIZES[kind]
    if min(dims) < 1 or dims[0] % block:
      raise self.damaged(
        f"the tensor {name} of type {kind.name} has the dimensions"
        f" {list(dims)}, whose first must be a multiple of {block}"
      )
    size = math.prod(dims) // block * block_bytes
    return name, kind.name, dims[::-1], size, offset

  def value(self, kind: int, key: str) -> Any:
    if kind == _STRING:
      length = self.number("<Q")
      if length <= _MAX_STRING_BYTES:
        return self.text(length)
      self.skip(length, f"the string {key}")
      return Counted(length)
    if kind != _ARRAY:
      return self.number(self.scalar(kind, key))
    kind, count = self.number("<I"), self.number("<Q")
    if kind == _STRING:
      self.room(count * 8, f"{count} strings of {key}")
      for _ in range(count):
        self.skip(self.number("<Q"), f"a string of {key}")
      return Counted(count)
    width = struct.calcsize(self.scalar(kind, key))
    if count > _MAX_ARRAY:
      self.skip(count * width, f"the array {key}")
      return Counted(count)
    return [self.number(self.scalar(kind, key)) for _ in range(count)]

  def scalar(self, kind: int, key: str) -> str:
    if kind not in _SCALARS:
      raise self.damaged(f"the key {key} has the unknown type {kind}")
    return _SCALARS[kind]

  def number(self, form: str) -> Any:
    return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

  def name(self) -> str:
    length = self.number("<Q")
    if length > _MAX_NAME_BYTES:
      raise self.damaged(f"a name claims {length} bytes")
    name = self.text(length)
    # Messages quote names: no line ends or terminal codes in them.
    if not name.isprintable():
      raise self.damaged(f"a name is {name[:40]!r}")
    return name

  def text(self, length: int) -> str:
    try:
      return self.bytes(length).decode()
    except UnicodeDecodeError:
      raise self.damaged("a name or string is not UTF-8") from None

  def bytes(self, count: int) -> bytes:
    self.room(count, "the header")
    found = self.file.read(count)
    if len(found) != count:
      raise self.damaged("the file shrank while it was read")
    self.at += count
    return found

  def skip(self, count: int, what: str) -> None:
    self.room(count, what)
    self.file.seek(count, os.SEEK_CUR)
    self.at += count

  def room(self, count: int, what: str) -> None:
    """Refuses to go on if the rest of the file is shorter than count."""
    if count > self.size - self.at:
      raise errors.BadFileError(
        f"{self.path} is cut off or damaged: at byte {self.at}, {what} should"
        f" reach byte {self.at + count} or beyond, the file has {self.size}."
      )

  def damaged(self, why: str) -> errors.BadFileError:
    return errors.BadFileError(
      f"{self.path} is damaged: {why} (before byte {self.at})."
    )


@contextlib.contextmanager
def _open(path: str | os.PathLike) -> Iterator[BinaryIO]:
  try:
    # Opening a pipe would wait for ever.
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise errors.BadFileError(f"{os.fspath(path)} is not a file.")
    with pathlib.Path(path).open("rb") as file:
      yield file
  except (OSError, ValueError) as error:
    if isinstance(error, errors.UserError):
      raise
    raise errors.BadFileError(
      f"{os.fspath(path)} cannot be read: {error}."
    ) from error


def _refuse_unknown_type(file: str, kind: str) -> None:
  """Tries the package on one block of zeros; a header can name any type."""
  if kind in _PLAIN:
    return
  number = gguf_package.GGMLQuantizationType[kind]
  _, block_bytes = gguf_package.GGML_QUANT_SIZES[number]
  try:
    _dequantize(np.zeros((1, block_bytes), np.uint8), number)
  except NotImplementedError:
    raise errors.BadFileError(
      f"{file} holds tensors of type {kind}, which cannot be dequantised;"
      " F32, F16, BF16 and the Q, IQ, TQ and MXFP4 types can."
    ) from None


def _dequantize(
  blocks: np.ndarray, kind: gguf_package.GGMLQuantizationType
) -> np.ndarray:
  # A block's scale may be any float16; the values are passed on as they are.
  with np.errstate(all="ignore"):
    return gguf_package.quants.dequantize(blocks, kind)


def _read_tensor(
  path: str | os.PathLike, name: str, extent: Extent
) -> np.ndarray:
  with _open(path) as file:
    file.seek(extent.offset)
    raw = np.fromfile(file, np.uint8, extent.size)
  if raw.size != extent.size:
    raise errors.BadFileError(
      f"{os.fspath(path)} is cut off: the tensor {name} needs {extent.size}"
      f" bytes at {extent.offset}, {raw.size} were found."
    )
  if extent.type in _PLAIN:
    return raw.view(_PLAIN[extent.type]).reshape(extent.shape)
  kind = gguf_package.GGMLQuantizationType[extent.type]
  # The package walks 16 rows at a time: longer ones are twice as fast.
  num_rows = math.prod(extent.shape[:-1])
  rows = raw.reshape(num_rows // math.gcd(num_rows, 64), -1)
  return _dequantize(rows, kind).reshape(extent.shape)


def _config(
  metadata: Mapping[str, Any], source: names.Source
) -> config_lib.LlamaConfig:
  file = source.file
  architecture = metadata.get("general.architecture")
  if architecture != ARCHITECTURE:
    raise errors.BadFileError(
      f"{file} has general.architecture={reprlib.repr(architecture)}; only"
      f" {ARCHITECTURE!r} is supported."
    )
  if metadata.get("split.count", 1) not in (0, 1):
    raise errors.BadFileError(
      f"{file} is one of {metadata['split.count']} parts; join them first:"
      " llama-gguf-split --merge."
    )

  def whole(key: str, default: int | None = None) -> int:
    value = metadata.get(f"llama.{key}", default)
    if isinstance(value, list) and value and len(set(value)) == 1:
      value = value[0]
    if isinstance(value, bool) or not isinstance(value, int):
      raise errors.BadFileError(
        f"{file} has llama.{key}={reprlib.repr(value)}; it must be one"
        " whole number for all layers."
      )
    return value

  def real(key: str, default: float | None = None) -> float:
    value = metadata.get(f"llama.{key}", default)
    if not isinstance(value, float) or not math.isfinite(value):
      raise errors.BadFileError(
        f"{file} has llama.{key}={reprlib.repr(value)}; it must be a"
        " finite number."
      )
    # The shortest decimal of a float32: 1e-05 and not 9.99999974e-06.
    return float(str(np.float32(value)))

  for key, neutral in _NEUTRAL.items():
    value = metadata.get(f"llama.{key}", neutral[0])
    if value not in neutral:
      raise errors.BadFileError(
        f"{file} is not a plain Llama: llama.{key}={reprlib.repr(value)}, where"
        f" {neutral[0]!r} is supported."
      )

  embed_dim, num_heads = (
    whole("embedding_length"),
    whole("attention.head_count"),
  )
  # Missing keys mean what llama.cpp takes them to mean.
  head_dim = whole("attention.key_length", embed_dim // max(num_heads, 1))
  for key in ("attention.value_length", "rope.dimension_count"):
    if (value := whole(key, head_dim)) != head_dim:
      raise errors.BadFileError(
        f"{file} has llama.{key}={value}, which must equal the head dim"
        f" {head_dim}."
      )
  embedding = source.tensors.get("token_embd.weight")
  rows = embedding.shape[0] if embedding else None
  try:
    config = config_lib.LlamaConfig(
      vocab_size=whole("vocab_size", rows),
      embed_dim=embed_dim,
      num_layers=whole("block_count"),
      num_heads=num_heads,
      num_kv_heads=whole("attention.head_count_kv", num_heads),
      head_dim=head_dim,
      mlp_dim=whole("feed_forward_length"),
      norm_eps=real("attention.layer_norm_rms_epsilon"),
      rope_theta=real("rope.freq_base", 10000.0),
      rope_scaling=None,
      context_length=whole("context_length"),
      tied_embeddings="output.weight" not in source.tensors,
    )
    names.check(config, source)
    return _with_rope_scaling(config, metadata, source)
  except errors.ConfigError as error:
    raise errors.BadFileError(f"{file}: {error}") from error


def _with_rope_scaling(
  config: config_lib.LlamaConfig,
  metadata: Mapping[str, Any],
  source: names.Source,
) -> config_lib.LlamaConfig:
  """Adds Llama 3.1's scaling if the file holds its table of factors.

  llama.cpp keeps no parameters of it, only what each frequency is divided
  by. The largest divisor is the factor; the rest is known, and the whole
  table must follow from it.
  """
  file = source.file
  kind = metadata.get("llama.rope.scaling.type", "none")
  factor = metadata.get("llama.rope.scaling.factor", 1.0)
  if kind != "none" and not (kind == "linear" and factor == 1.0):
    raise errors.BadFileError(
      f"{file} has llama.rope.scaling.type={reprlib.repr(kind)} (factor"
      f" {factor}); 'none'"
      " and Llama 3.1's rope_freqs.weight are supported."
    )
  table = source.tensors.get("rope_freqs.weight")
  if table is None:
    return config
  half = config.head_dim // 2
  if table.shape != (half,):
    raise errors.BadFileError(
      f"{file}: tensor rope_freqs.weight is {list(table.shape)} but"
      f" model.head_dim={config.head_dim} makes it [{half}]."
    )
  found = source.get("rope_freqs.weight").astype(np.float64)
  original = metadata.get(
    "llama.rope.scaling.original_context_length", _ORIGINAL_CONTEXT
  )
  factor = float(found.max())
  if np.all(found == 1.0):
    return config
  plain = proof.inverse_frequencies(config)
  if math.isfinite(factor) and factor > 1 and isinstance(original, int):
    scaled = dataclasses.replace(
      config,
      rope_scaling=config_lib.RopeScaling(
        factor=factor,
        low_freq_factor=_LOW_FREQ_FACTOR,
        high_freq_factor=_HIGH_FREQ_FACTOR,
        original_context=original,
      ),
    )
    divisors = plain / proof.inverse_frequencies(scaled)
    if np.allclose(found, divisors, rtol=_FACTORS_TOLERANCE, atol=0):
      return scaled
  raise errors.BadFileError(
    f"{file}: rope_freqs.weight (largest value {factor:g}) is not Llama 3.1's"
    f" scaling with low_freq_factor={_LOW_FREQ_FACTOR:g},"
    f" high_freq_factor={_HIGH_FREQ_FACTOR:g} and original_context={original}"
    f" at model.rope_theta={config.rope_theta:g}; no other is supported."
  )
