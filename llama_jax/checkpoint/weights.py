"""Weights of one layout as those of another, block by block.

Every reader gives a Source and every writer takes one: tensors under the names
and in the layout of one scheme (names.py), of which any rows can be had without
the rest. So a model of any size passes through little memory. as_scheme shows
one under another scheme's names; nothing is read until rows are asked for.
"""

import collections
import concurrent.futures
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import names
from llama_jax.model import config as config_lib
from llama_jax.text import files

# Of weights in memory at once; several are on their way at a time.
BLOCK_BYTES = 64 << 20
_TILE = 128
_READERS = 2


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file, unread.

  Attributes:
    shape: as NumPy sees it, [out, in] for a linear layer.
    dtype: of the rows that Source.rows returns.
    stored: the format's own word for how it is kept, such as "Q4_1".
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  stored: str

  @property
  def num_bytes(self) -> int:
    """Bytes of all its rows as they are read."""
    return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Source:
  """Tensors of a checkpoint under the names and in the layout of a scheme.

  Attributes:
    file: what messages call it.
    scheme: a key of names.SCHEMES.
    tensors: every tensor that the checkpoint holds.
    rows: (name, start, stop) -> those rows of axis 0, C-contiguous; raises
      BadFileError if the bytes cannot be had.
  """

  file: str
  scheme: str
  tensors: Mapping[str, Tensor]
  rows: Callable[[str, int, int], np.ndarray]

  def get(self, name: str) -> np.ndarray:
    """A whole tensor."""
    return self.rows(name, 0, self.tensors[name].shape[0])

  def spans(
    self, wanted: Iterable[str], block_bytes: int
  ) -> Iterator[tuple[str, int, int]]:
    """(name, start, stop) of blocks of rows that cover tensors, in order.

    Args:
      wanted: names of tensors.
      block_bytes: most bytes of one block; a longer row is a block.
    """
    for name in wanted:
      tensor = self.tensors[name]
      length = tensor.shape[0]
      step = max(1, block_bytes * length // max(1, tensor.num_bytes))
      for start in range(0, length, step):
        yield name, start, min(start + step, length)


def from_params(
  config: config_lib.LlamaConfig,
  params: Mapping[str, Any],
  scheme: str,
  file: str = "params",
) -> Source:
  """Our tree in memory under the names of a scheme.

  Args:
    config: the model's configuration.
    params: NumPy or addressable JAX arrays, layers stacked on axis 0.
    scheme: a key of names.SCHEMES.
    file: what messages call it.

  Raises:
    BadFileError: the tree is not that of the configuration.
  """
  check_params(config, params)
  return from_leaves(config, names.flatten(params), scheme, file)


def from_leaves(
  config: config_lib.LlamaConfig,
  leaves: Mapping[str, Any],
  scheme: str,
  file: str,
) -> Source:
  """The same of leaves by path, which need only shape, dtype and indexing.

  Args:
    config: the model's configuration, which the leaves' shapes fit.
    leaves: path -> leaf; leaf[layer, :, a:b] is what a read asks for.
    scheme: a key of names.SCHEMES.
    file: what messages call it.
  """
  tensors, found = {}, {}
  for place in names.places(config, scheme):
    dtype = np.dtype(leaves[place.row.path].dtype)
    tensors[place.name] = Tensor(place.shape, dtype, stored_as(dtype))
    found[place.name] = place

  def rows(name: str, start: int, stop: int) -> np.ndarray:
    place = found[name]
    flip = place.row.reshape != names.AS_IS
    turns = _turns(config, place.row, scheme)
    first, last = _whole_heads(config, start, stop) if turns else (start, stop)
    index: tuple[Any, ...] = () if place.layer is None else (place.layer,)
    index += (slice(None),) if flip else ()
    value = np.asarray(leaves[place.row.path][(*index, slice(first, last))])
    value = transpose(value) if flip else value
    if turns:
      value = names.change_rope_layout(
        value, config.head_dim, to="interleaved"
      )[start - first : stop - first]
    return np.ascontiguousarray(value)

  return Source(file, scheme, tensors, rows)


def as_scheme(
  config: config_lib.LlamaConfig, source: Source, scheme: str
) -> Source:
  """A source under another scheme's names and in its layout.

  Leaves out what carries nothing (see ignored).
  """
  if scheme == source.scheme:
    return source
  origin = {
    there.name: here
    for here, there in zip(
      names.places(config, source.scheme),
      names.places(config, scheme),
      strict=True,
    )
  }
  interleaved = names.SCHEMES[scheme].interleaved
  to = "interleaved" if interleaved else "halves"
  changes = interleaved != names.SCHEMES[source.scheme].interleaved

  def rows(name: str, start: int, stop: int) -> np.ndarray:
    place = origin[name]
    if not (changes and place.row.reshape == names.ROTARY):
      return source.rows(place.name, start, stop)
    first, last = _whole_heads(config, start, stop)
    value = source.rows(place.name, first, last)
    value = names.change_rope_layout(value, config.head_dim, to=to)
    return np.ascontiguousarray(value[start - first : stop - first])

  tensors = {new: source.tensors[old.name] for new, old in origin.items()}
  return Source(source.file, scheme, tensors, rows)


def _turns(config: config_lib.LlamaConfig, row: names.Row, scheme: str) -> bool:
  """Whether our rows of this weight lie in another order in the scheme."""
  return row.reshape == names.ROTARY and names.SCHEMES[scheme].interleaved


def _whole_heads(
  config: config_lib.LlamaConfig, start: int, stop: int
) -> tuple[int, int]:
  """The rows of all heads that the rows from start to stop touch."""
  H = config.head_dim
  return start // H * H, -(-stop // H) * H


def as_dtype(source: Source, dtype: np.typing.DTypeLike) -> Source:
  """A source whose rows are cast.

  Its rows raise UserError where a finite value leaves the range of dtype.
  """
  dtype = np.dtype(dtype)
  tensors = {
    name: dataclasses.replace(tensor, dtype=dtype, stored=stored_as(dtype))
    for name, tensor in source.tensors.items()
  }

  def rows(name: str, start: int, stop: int) -> np.ndarray:
    value = source.rows(name, start, stop)
    return cast(value, dtype, f"{source.file}: tensor {name}")

  return dataclasses.replace(source, tensors=tensors, rows=rows)


def cast(value: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
  """Rows in another dtype; raises UserError where they leave its range."""
  if value.dtype == dtype:
    return value
  with np.errstate(over="ignore"):
    new = value.astype(dtype)
  if dtype == np.float16 and np.any(np.isinf(new) & np.isfinite(value)):
    raise errors.UserError(
      f"--dtype=float16: {what} holds"
      f" {np.abs(value.astype(np.float32)).max():g}, and float16 ends at"
      " 65504; use --dtype=bfloat16 or float32."
    )
  return new


def read_ahead(
  source: Source,
  spans: Iterable[tuple[str, int, int]],
  prepare: Callable[[str, np.ndarray], np.ndarray] = lambda name, rows: rows,
) -> Iterator[tuple[str, int, int, np.ndarray]]:
  """(name, start, stop, rows) of spans, later ones read while one is used.

  Args:
    source: what to read.
    spans: name, start and stop of each.
    prepare: done to a span's rows where they are read, beside the others.
  """
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    pending: collections.deque[tuple[tuple[str, int, int], Any]]
    pending = collections.deque()
    for span in spans:
      job = pool.submit(lambda n, *at: prepare(n, source.rows(n, *at)), *span)
      pending.append((span, job))
      if len(pending) > _READERS:
        (name, start, stop), job = pending.popleft()
        yield name, start, stop, job.result()
    for (name, start, stop), job in pending:
      yield name, start, stop, job.result()


def read_bytes(path: str, name: str, offset: int, count: int) -> np.ndarray:
  """Bytes of a tensor, uint8 [count], read and not mapped: mapped pages count
  as memory in use.

  Raises:
    BadFileError: the file ends before them, or cannot be read.
  """
  with files.opened(path) as file:
    file.seek(offset)
    found = np.fromfile(file, np.uint8, count)
  if found.size != count:
    raise errors.BadFileError(
      f"{path} is cut off: the tensor {name} needs {count} bytes at {offset},"
      f" {found.size} were found."
    )
  return found


def leaf_dtypes(
  config: config_lib.LlamaConfig, source: Source
) -> dict[str, np.dtype]:
  """path -> dtype of our stacked leaf.

  Where the layers of one leaf differ it is float32, which holds them all
  exactly.
  """
  dtypes: dict[str, np.dtype] = {}
  for place in names.places(config, source.scheme):
    found = source.tensors[place.name].dtype
    if dtypes.setdefault(place.row.path, found) != found:
      dtypes[place.row.path] = np.dtype(np.float32)
  return dtypes


def read_params(
  config: config_lib.LlamaConfig, source: Source
) -> dict[str, Any]:
  """Our nested tree of stacked arrays; a leaf's dtype is as leaf_dtypes says.

  Peak memory is the result and one tensor.

  Raises:
    BadFileError: a tensor is missing, unexpected or of a wrong shape.
  """
  check(config, source)
  check_tied(config, source)
  halves = as_scheme(config, source, "hf")
  dtypes = leaf_dtypes(config, source)
  leaves: dict[str, np.ndarray] = {}
  for place in names.places(config, "hf"):
    path = place.row.path
    value = halves.get(place.name)
    if place.row.reshape != names.AS_IS:
      value = transpose(value)
    if place.layer is None:
      leaves[path] = np.ascontiguousarray(value, dtypes[path])
      continue
    if path not in leaves:
      leaves[path] = np.empty(names.our_shape(config, place.row), dtypes[path])
    leaves[path][place.layer] = value
  return names.nest(leaves)


def transpose(matrix: np.ndarray) -> np.ndarray:
  """A contiguous transpose: tile by tile, four times NumPy's rate.

  A whole tile of either order stays in a cache; a column of a wide
  matrix does not.
  """
  bits = matrix.view(f"u{matrix.dtype.itemsize}")
  out = np.empty(matrix.shape[::-1], bits.dtype)
  for i in range(0, matrix.shape[0], _TILE):
    for j in range(0, matrix.shape[1], _TILE):
      tile = bits[i : i + _TILE, j : j + _TILE]
      out[j : j + _TILE, i : i + _TILE] = tile.T
  return out.view(matrix.dtype)


def stored_bytes(tensor: Tensor) -> int:
  """Bytes that a tensor takes in its file."""
  if tensor.stored in names.DTYPES:
    return tensor.num_bytes
  import gguf

  kind = gguf.GGMLQuantizationType[tensor.stored]
  block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  return math.prod(tensor.shape) // block * block_bytes


def stored_as(dtype: np.dtype) -> str:
  """The formats' word for a dtype: "BF16" of bfloat16."""
  for word, known in names.DTYPES.items():
    if known == dtype:
      return word
  return str(dtype)


def ignored(source: Source, config: config_lib.LlamaConfig) -> dict[str, str]:
  """Tensors of the source that carry nothing, with the reason for each."""
  scheme = names.SCHEMES[source.scheme]
  reasons = {}
  for name in source.tensors:
    for pattern, why in scheme.ignored.items():
      if re.fullmatch(pattern, name):
        reasons[name] = why
  head = names.name_of(names.HEAD_PATH, source.scheme)
  if config.tied_embeddings and head in source.tensors:
    reasons[head] = "equal to the tied embedding"
  return reasons


def check(config: config_lib.LlamaConfig, source: Source) -> None:
  """Raises BadFileError unless the tensors are those of this configuration.

  Reads no weights, and no more names than the source holds: a forged
  num_layers costs nothing.
  """
  known = set(ignored(source, config))
  for place in names.places(config, source.scheme):
    found = source.tensors.get(place.name)
    if found is None:
      _refuse_strangers(config, source, known, biases_only=True)
      raise errors.BadFileError(
        f"{source.file} lacks the tensor {place.name} {list(place.shape)},"
        f" which {_demand(config, place)} demands."
      )
    if found.shape != place.shape:
      raise errors.BadFileError(
        f"{source.file}: tensor {place.name} is {list(found.shape)} but"
        f" {_contradicted(config, place, found.shape)} makes it"
        f" {list(place.shape)}."
      )
    if found.dtype not in names.DTYPES.values():
      raise errors.BadFileError(
        f"{source.file}: tensor {place.name} is {found.stored}; float32,"
        " float16 and bfloat16 are allowed."
      )
    known.add(place.name)
  _refuse_strangers(config, source, known, biases_only=False)


def same(source: Source, name: str, other: str) -> bool:
  """Whether two tensors hold the same bits; read until they differ."""
  one, two = source.tensors[name], source.tensors[other]
  return (one.shape, one.dtype) == (two.shape, two.dtype) and all(
    source.rows(*span).tobytes() == source.rows(other, *span[1:]).tobytes()
    for span in source.spans([name], BLOCK_BYTES)
  )


def check_tied(config: config_lib.LlamaConfig, source: Source) -> None:
  """Raises BadFileError if a tied model's file holds another head."""
  embed = names.name_of(names.EMBED_PATH, source.scheme)
  head = names.name_of(names.HEAD_PATH, source.scheme)
  if not config.tied_embeddings or head not in source.tensors:
    return
  if not same(source, head, embed):
    raise errors.BadFileError(
      f"{source.file}: the embeddings are declared tied, but {head} differs"
      f" from {embed}; declare them untied (tie_word_embeddings=false)."
    )


def check_params(
  config: config_lib.LlamaConfig, params: Mapping[str, Any]
) -> None:
  """Raises BadFileError unless the tree is that of the configuration."""
  leaves = names.flatten(params)
  shapes = {
    row.path: names.our_shape(config, row) for row in names.rows(config)
  }
  if missing := sorted(set(shapes) - set(leaves)):
    raise errors.BadFileError(
      f"params lack {', '.join(missing)}, which the configuration demands"
      f" (model.head={config.head}, model.tied_embeddings="
      f"{config.tied_embeddings})."
    )
  if unexpected := sorted(set(leaves) - set(shapes)):
    raise errors.BadFileError(
      f"params hold {', '.join(unexpected)}, which the configuration has no"
      f" place for (model.head={config.head}, model.tied_embeddings="
      f"{config.tied_embeddings})."
    )
  for path, shape in shapes.items():
    if tuple(leaves[path].shape) != shape:
      raise errors.BadFileError(
        f"params {path} is {list(leaves[path].shape)} but the configuration"
        f" makes it {list(shape)}."
      )
    if np.dtype(leaves[path].dtype) not in names.DTYPES.values():
      raise errors.BadFileError(
        f"params {path} is {leaves[path].dtype}; float32, float16 and"
        " bfloat16 are allowed."
      )


def _demand(config: config_lib.LlamaConfig, place: names.Place) -> str:
  if place.layer is not None:
    return f"model.num_layers={config.num_layers}"
  if place.row.path == names.HEAD_PATH:
    return "model.tied_embeddings=False"
  if place.row.path == names.SCORE_PATH:
    return "model.head=scalar"
  return "every Llama"


def _contradicted(
  config: config_lib.LlamaConfig, place: names.Place, found: tuple[int, ...]
) -> str:
  """The configuration values that a tensor's shape is at odds with."""
  axes = place.row.axes
  axes = axes if place.row.reshape == names.AS_IS else axes[::-1]
  wrong = axes
  if len(found) == len(place.shape):
    triples = zip(axes, found, place.shape, strict=True)
    wrong = [axis for axis, have, want in triples if have != want]
  return " and ".join(
    " x ".join(
      f"model.{name}={getattr(config, name)}"
      for name in names.OWNERS[axis] or ("head",)
    )
    for axis in wrong
  )


def _refuse_strangers(
  config: config_lib.LlamaConfig,
  source: Source,
  known: set[str],
  *,
  biases_only: bool,
) -> None:
  """Raises BadFileError for a tensor that has no place in our tree."""
  strangers = sorted(set(source.tensors) - known)
  biases = [name for name in strangers if name.endswith(".bias")]
  if biases:
    raise errors.BadFileError(
      f"{source.file} is not a Llama: it holds the bias {biases[0]}"
      f" ({len(biases)} biases in all), and no Llama has biases."
    )
  if biases_only or not strangers:
    return
  name = strangers[0]
  shape = list(source.tensors[name].shape)
  column = names.SCHEMES[source.scheme].column
  for row in filter(names.stacked, names.TABLE):
    pattern = re.escape(getattr(row, column)).replace(r"\{layer\}", r"(\d+)")
    if re.fullmatch(pattern, name):
      raise errors.BadFileError(
        f"{source.file} holds the tensor {name} {shape}, which is beyond"
        f" model.num_layers={config.num_layers}."
      )
  raise errors.BadFileError(
    f"{source.file} holds the tensor {name} {shape}"
    f" ({len(strangers)} unknown in all), which has no place in a Llama"
    f" with model.num_layers={config.num_layers} and model.head={config.head}."
  )
