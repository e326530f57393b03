"""How Meta's checkpoints share the tensors out among their files.

A model of R files was trained on R devices: those that hold a layer's
outputs each have rows of its weight, those that hold its inputs have columns
(arXiv:1909.08053). Norms are the same in each.
"""

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import meta_params, torch_zip, weights
from llama_jax.model import config as config_lib

EMBED = "tok_embeddings.weight"
_QUERY = "layers.0.attention.wq.weight"

# The axis that is cut; names without a line are whole in every file.
_AXES = {
  "attention.wq.weight": 0,
  "attention.wk.weight": 0,
  "attention.wv.weight": 0,
  "attention.wo.weight": 1,
  "feed_forward.w1.weight": 0,
  "feed_forward.w2.weight": 1,
  "feed_forward.w3.weight": 0,
  "output.weight": 0,
}
_KEY_VALUE = ("attention.wk.weight", "attention.wv.weight")
# The code of Llama 1, 2 and Code Llama cuts the embedding by width, that of
# Llama 3 by words. The former have 32,000 words and a few; what has more can
# only be meant for the latter.
_CUT_BY_WIDTH = 1 << 15


def _kind(name: str) -> str:
  """The name of a tensor without its layer."""
  return re.sub(r"^layers\.\d+\.", "", name)


def join(
  archives: Sequence[torch_zip.Archive],
  said: meta_params.Said,
  file: str,
) -> weights.Source:
  """The whole tensors of files that each hold a part.

  Args:
    archives: of all files, in their order.
    said: what params.json says.
    file: what messages call them together.

  Raises:
    BadFileError: the files do not fit each other. Where they differ in what
      should be the same in each, the source's rows raise it.
  """
  first = archives[0]
  for archive in archives[1:]:
    _check_alike(first, archive)
  _check_count(archives, said)
  R = len(archives)
  tensors = {}
  axes: dict[str, int | None] = {}
  copies = dict.fromkeys(first.views, 1)
  for name, view in first.views.items():
    shape, kind = list(view.shape), _kind(name)
    axes[name] = axis = _axis(kind, shape, said, R)
    if kind in _KEY_VALUE and shape[0] == said.head_dim:
      # More files than heads: some have the same one.
      copies[name] = max(1, R // said.num_kv_heads)
    if axis is not None and R > 1:
      if axis >= len(shape):
        raise errors.BadFileError(
          f"{first.path}: the tensor {name} is {shape}; it must have two axes."
        )
      shape[axis] = shape[axis] * R // copies[name]
    tensors[name] = weights.Tensor(
      tuple(shape), view.storage.dtype, view.storage.stored
    )

  def rows(name: str, start: int, stop: int) -> np.ndarray:
    axis = axes[name]
    if R == 1:
      return first.rows(name, start, stop)
    if axis is None:
      return _agreed(archives, name, start, stop)
    if axis == 1:
      parts = [archive.rows(name, start, stop) for archive in archives]
      return np.concatenate(parts, axis=1)
    length = first.views[name].shape[0]
    parts = [
      _agreed(archives[i * copies[name] : (i + 1) * copies[name]], name, *span)
      for i, *span in _parts(start, stop, length)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

  return weights.Source(file, "meta", tensors, rows)


def _axis(
  kind: str, shape: Sequence[int], said: meta_params.Said, R: int
) -> int | None:
  if kind != EMBED:
    return _AXES.get(kind)
  # By width, unless a file has the whole width.
  return 1 if len(shape) == 2 and shape[1] * R == said.embed_dim else 0


def _check_count(
  archives: Sequence[torch_zip.Archive], said: meta_params.Said
) -> None:
  """Refuses a folder of which a file is missing."""
  first = archives[0]
  view = first.views.get(_QUERY)
  if view is None or len(view.shape) != 2:
    return
  rows, width = view.shape
  if width != said.embed_dim:
    raise errors.BadFileError(
      f"{said.file} has dim={said.embed_dim}, but in {first.path} the tensor"
      f" {_QUERY} is {list(view.shape)}."
    )
  if rows * len(archives) != width and not width % rows:
    raise errors.BadFileError(
      f"{first.path} is one of {width // rows} files by its tensor {_QUERY}"
      f" {list(view.shape)}, and {len(archives)} are there; fetch the others,"
      " or remove what is not of this model."
    )


def _check_alike(first: torch_zip.Archive, other: torch_zip.Archive) -> None:
  if strangers := sorted(set(first.views) ^ set(other.views)):
    raise errors.BadFileError(
      f"{first.path} and {other.path} do not hold the same tensors:"
      f" {strangers[0]} is in one of them alone."
    )
  for name, view in first.views.items():
    twin = other.views[name]
    here = (view.storage.stored, list(view.shape))
    there = (twin.storage.stored, list(twin.shape))
    if here != there:
      raise errors.BadFileError(
        f"{first.path} and {other.path} are not parts of one model: the tensor"
        f" {name} is {here[0]} {here[1]} in the one, {there[0]} {there[1]} in"
        " the other."
      )


def _agreed(
  archives: Sequence[torch_zip.Archive], name: str, start: int, stop: int
) -> np.ndarray:
  """Rows that are the same in each of some files."""
  value = archives[0].rows(name, start, stop)
  for archive in archives[1:]:
    twin = archive.rows(name, start, stop)
    if value.tobytes() != twin.tobytes():
      raise errors.BadFileError(
        f"{archives[0].path} and {archive.path} are not parts of one model: the"
        f" tensor {name} should be the same in both, and differs."
      )
  return value


def _parts(
  start: int, stop: int, length: int
) -> Iterator[tuple[int, int, int]]:
  """(part, start, stop) of rows in parts of a length each."""
  for i in itertools.count(start // length):
    begin = i * length
    if begin >= stop:
      return
    yield i, max(start, begin) - begin, min(stop, begin + length) - begin


def check_width(config: config_lib.LlamaConfig, model_parallel: int) -> None:
  """Raises ConfigError unless the model can be shared out among so many."""
  cut = ["num_kv_heads", "mlp_dim", "vocab_size"]
  if _cut_axis(EMBED, config.vocab_size) == 1:
    cut.append("embed_dim")
  lengths = [getattr(config, name) for name in cut]
  # Two digits number the files.
  legal = [
    width
    for width in range(1, min(min(lengths), 99) + 1)
    if not any(length % width for length in lengths)
  ]
  if model_parallel not in legal:
    given = zip(cut, lengths, strict=True)
    raise errors.ConfigError(
      f"--model_parallel={model_parallel} does not divide each of"
      f" {', '.join(f'model.{name}={length}' for name, length in given)}; use"
      f" {', '.join(map(str, legal))}."
    )


def _cut_axis(name: str, vocab_size: int) -> int | None:
  if name == EMBED:
    return 1 if vocab_size <= _CUT_BY_WIDTH else 0
  return _AXES.get(_kind(name))


def cut_tensors(
  source: weights.Source, vocab_size: int, R: int
) -> dict[str, weights.Tensor]:
  """The tensors of each of R files."""
  tensors = {}
  for name, tensor in source.tensors.items():
    shape = list(tensor.shape)
    axis = _cut_axis(name, vocab_size)
    if axis is not None:
      shape[axis] //= R
    stored = weights.stored_as(tensor.dtype)
    tensors[name] = weights.Tensor(tuple(shape), tensor.dtype, stored)
  return tensors


def cut_rows(
  name: str,
  start: int,
  rows: np.ndarray,
  length: int,
  vocab_size: int,
  R: int,
) -> Iterator[tuple[int, np.ndarray]]:
  """(file, its part) of rows of a whole tensor; files without any are left.

  Args:
    name: of the tensor.
    start: the tensor's row that the first one is.
    rows: of the tensor.
    length: rows of the whole tensor.
    vocab_size: of the model.
    R: the number of files.
  """
  axis = _cut_axis(name, vocab_size)
  if axis is None:
    yield from ((rank, rows) for rank in range(R))
  elif axis == 1:
    for rank, part in enumerate(np.split(rows, R, axis=1)):
      yield rank, np.ascontiguousarray(part)
  else:
    at = 0
    for rank, first, last in _parts(start, start + len(rows), length // R):
      yield rank, rows[at : at + last - first]
      at += last - first
