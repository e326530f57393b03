"""Llama weights as a Hugging Face folder: config.json and safetensors.

Reads what any version of transformers has written: the flat rope_theta and
rope_scaling, and the nested rope_parameters of version 5. Writes both, so
that transformers, vLLM and llama.cpp's converter load the folder as it is.
bfloat16, float16 and float32 tensors keep their dtype. A reward model is a
classifier of one label there.

Nothing outside the folder is opened, except where a Hugging Face cache keeps
the files of a snapshot: ../../blobs.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors

from llama_jax import errors, text
from llama_jax.checkpoint import (
  building,
  hugging_face_config,
  names,
  proof,
  weights,
)
from llama_jax.model import config as config_lib
from llama_jax.text import files
from llama_jax.text import folder as text_folder

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
# Ten times the header of a shard with every tensor of 405B.
_MAX_HEADER_BYTES = 2 << 20

_Rows = Callable[[str, int, int], np.ndarray]


def read(
  path: str | os.PathLike,
) -> tuple[config_lib.LlamaConfig, dict[str, Any], Any]:
  """A model folder as (LlamaConfig, params, tokenizer or None).

  Raises:
    BadFileError: a file is damaged or missing, or this is not a Llama.
  """
  config, source = open_tensors(path)
  tokenizer = read_tokenizer(path)
  if tokenizer is not None:
    proof.check_vocabulary(config, tokenizer, source.file)
  return config, weights.read_params(config, source), tokenizer


def read_tokenizer(path: str | os.PathLike) -> Any:
  """The folder's tokenizer, or None if it holds none."""
  return text.find_tokenizer(path)


def read_config(path: str | os.PathLike) -> config_lib.LlamaConfig:
  """The configuration of a model folder; opens config.json alone."""
  folder = _folder(path)
  fields = _read_json(folder, CONFIG)
  return hugging_face_config.parse(fields, os.fspath(folder / CONFIG))


def open_tensors(
  path: str | os.PathLike,
) -> tuple[config_lib.LlamaConfig, weights.Source]:
  """The configuration and the tensors in Hugging Face's names and layout."""
  config = read_config(path)
  folder = _folder(path)
  tensors: dict[str, weights.Tensor] = {}
  readers: dict[str, _Rows] = {}
  for name, keys in _weight_files(folder).items():
    found, reader = open_file(folder, name)
    if keys is not None and (absent := sorted(keys - set(found))):
      raise errors.BadFileError(
        f"{folder / name} lacks the tensor {absent[0]!r}, which {INDEX} places"
        " there."
      )
    if twice := sorted(set(found) & set(tensors)):
      raise errors.BadFileError(
        f"{folder / name} holds the tensor {twice[0]}, which another file of"
        " the folder holds too."
      )
    tensors.update(found)
    readers.update(dict.fromkeys(found, reader))
  source = weights.Source(
    os.fspath(folder),
    "hf",
    tensors,
    lambda name, start, stop: readers[name](name, start, stop),
  )
  weights.check(config, source)
  return config, source


def write(
  path: str | os.PathLike,
  config: config_lib.LlamaConfig,
  params: Mapping[str, Any],
  tokenizer: Any,
  **settings: Any,
) -> None:
  """Writes params in memory as a folder that transformers loads as it is.

  Args:
    path: the folder; it must be absent or empty.
    config: the model's configuration.
    params: our tree, whose dtypes stay.
    tokenizer: see write_into.
    **settings: see write_into.

  Raises:
    UserError: the destination is taken or cannot be written.
    BadFileError: params are not those of config.
  """
  source = weights.from_params(config, params, "hf")
  with building.building(path) as site:
    write_into(site, config, source, tokenizer, **settings)


def write_into(
  site: building.Building,
  config: config_lib.LlamaConfig,
  source: weights.Source,
  tokenizer: Any,
  *,
  shard_bytes: int = SHARD_BYTES,
  block_bytes: int = weights.BLOCK_BYTES,
) -> None:
  """Fills a site with a folder that transformers loads as it is.

  Args:
    site: where to; what an earlier process finished there is not done again.
    config: the model's configuration.
    source: the weights in any scheme; they keep its dtypes.
    tokenizer: saved beside the weights, its stop_ids as eos_token_id; or None.
    shard_bytes: most bytes of weights in one file; a larger tensor has a file
      of its own.
    block_bytes: of weights in memory at once, about.
  """
  if shard_bytes < 1:
    raise errors.ConfigError(
      f"shard_bytes={shard_bytes} must be 1 or more bytes."
    )
  folder = site.content
  folder.mkdir(exist_ok=True)
  if tokenizer is not None:
    proof.check_vocabulary(config, tokenizer, source.file)
  source = weights.as_scheme(config, source, "hf")
  shards = _shards(source, shard_bytes)
  total = sum(tensor.num_bytes for tensor in source.tensors.values())
  weight_map = {}
  for number, keys in enumerate(shards, 1):
    file = (
      WEIGHTS
      if len(shards) == 1
      else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    )
    write_file(site, folder / file, source, keys, block_bytes)
    weight_map.update(dict.fromkeys(keys, file))
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files.write_json(folder / INDEX, index)
  embed = names.name_of(names.EMBED_PATH, "hf")
  fields = hugging_face_config.write_fields(config, source.tensors[embed].dtype)
  if tokenizer is not None:
    tokenizer.save(folder)
    fields.update(text_folder.special_ids(tokenizer))
    if config.head == "scalar":
      fields.update(_padding(tokenizer))
  files.write_json(folder / CONFIG, fields)


def _padding(tokenizer) -> dict[str, int]:
  """pad_token_id, by which transformers finds the last token to score.

  A token that ends a turn is not said to pad, whatever the tokenizer says: the
  score would be read before it. Without one transformers scores row by row.
  """
  pad = tokenizer.special_tokens.get(tokenizer.named_tokens.get("pad_token"))
  if pad is None or pad in (tokenizer.bos_id, *tokenizer.stop_ids):
    return {}
  return {"pad_token_id": pad}


def _shards(source: weights.Source, shard_bytes: int) -> list[list[str]]:
  """The tensors of each file, in their order."""
  shards: list[list[str]] = [[]]
  filled = 0
  for name, tensor in source.tensors.items():
    if shards[-1] and filled + tensor.num_bytes > shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += tensor.num_bytes
  return shards


def write_file(
  site: building.Building,
  path: pathlib.Path,
  source: weights.Source,
  keys: Sequence[str],
  block_bytes: int,
) -> None:
  """Writes tensors of a source as one safetensors file in a site.

  Its format is eight bytes, JSON and the tensors.
  """
  # transformers refuses a file that does not name its framework.
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  # Wide ones first, so that every tensor is aligned to its items.
  keys = sorted(keys, key=lambda key: -source.tensors[key].dtype.itemsize)
  end = 0
  starts = {}
  for key in keys:
    tensor = source.tensors[key]
    starts[key], end = end, end + tensor.num_bytes
    header[key] = {
      "dtype": weights.stored_as(tensor.dtype),
      "shape": list(tensor.shape),
      "data_offsets": [starts[key], end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  data = 8 + len(text)
  with building.RowFile(path, data + end) as file:
    file.write(len(text).to_bytes(8, "little") + text, 0)

    def put(key: str, start: int, rows: np.ndarray) -> None:
      row_bytes = rows.nbytes // len(rows)
      file.write(rows, data + starts[key] + start * row_bytes)

    site.fill(source, keys, block_bytes, put)


def _weight_files(folder: pathlib.Path) -> dict[str, set[str] | None]:
  """File name -> the tensors that the index places there, or None."""
  if (folder / WEIGHTS).exists():
    return {WEIGHTS: None}
  if not (folder / INDEX).exists():
    raise errors.BadFileError(
      f"{folder} holds neither {WEIGHTS} nor {INDEX}; only safetensors are"
      " read."
    )
  weight_map = _read_json(folder, INDEX).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise errors.BadFileError(f"{folder / INDEX} has no weight_map.")
  placed: dict[str, set[str] | None] = {}
  for tensor, name in weight_map.items():
    if not isinstance(name, str) or not name.endswith(".safetensors"):
      raise errors.BadFileError(
        f"{folder / INDEX} places {tensor!r} in {name!r}, which is not a"
        " .safetensors file of the folder."
      )
    placed.setdefault(name, set()).add(tensor)
  return placed


def open_file(
  folder: pathlib.Path, name: str
) -> tuple[dict[str, weights.Tensor], _Rows]:
  """The tensors of a safetensors file of a folder, and a reader of rows."""
  path = files.inside(folder, name)
  size = path.stat().st_size
  with files.opened(path) as raw:
    length = int.from_bytes(raw.read(8), "little")
    if length > min(size, _MAX_HEADER_BYTES):
      raise errors.BadFileError(
        f"{path} ({size} bytes) is damaged or cut off: its header alone is to"
        f" have {length} bytes, of {_MAX_HEADER_BYTES} at the most."
      )
    header = raw.read(length)
  # The library checks that the tensors cover the file without holes or
  # overlaps. It would map the file to read it, which counts as memory in use.
  with _damage(path), safetensors.safe_open(path, framework="np"):
    offsets = files.parse_json(header, str(path), files.no_doubles)
  tensors, starts = {}, {}
  for key, entry in offsets.items():
    if key == "__metadata__":
      continue
    # Messages quote names: no line ends or terminal codes in them.
    if not key.isprintable():
      raise errors.BadFileError(f"{path} holds the tensor name {key[:40]!r}.")
    stored = entry["dtype"]
    # An odd dtype is refused by weights.check, with the tensor's name.
    dtype = names.DTYPES.get(stored, np.dtype(np.void))
    tensors[key] = weights.Tensor(tuple(entry["shape"]), dtype, stored)
    starts[key] = 8 + length + entry["data_offsets"][0]

  def rows(key: str, start: int, stop: int) -> np.ndarray:
    tensor = tensors[key]
    row_bytes = tensor.num_bytes // max(1, tensor.shape[0])
    offset, count = starts[key] + start * row_bytes, (stop - start) * row_bytes
    found = weights.read_bytes(os.fspath(path), key, offset, count)
    return found.view(tensor.dtype).reshape(stop - start, *tensor.shape[1:])

  return tensors, rows


@contextlib.contextmanager
def _damage(path: pathlib.Path) -> Iterator[None]:
  """Turns what safetensors raises into BadFileError."""
  try:
    yield
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    if isinstance(error, errors.UserError):
      raise
    with contextlib.suppress(OSError):
      size = path.stat().st_size
      raise errors.BadFileError(
        f"{path} ({size} bytes) is damaged or cut off: {error}."
        f"{_expected_size(path, size)}"
      ) from error
    raise errors.BadFileError(f"{path} cannot be read: {error}.") from error


def _expected_size(path: pathlib.Path, size: int) -> str:
  """The size that a cut-off file's own header asks for, if it has one."""
  with contextlib.suppress(
    *(OSError, ArithmeticError, ValueError, TypeError, LookupError),
    AttributeError,
  ):
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if length > min(size, _MAX_HEADER_BYTES):
        return ""
      header = files.parse_json(file.read(length), str(path))
    header.pop("__metadata__", None)
    end = max(int(entry["data_offsets"][1]) for entry in header.values())
    return f" Its header asks for {8 + length + end} bytes."
  return ""


def _folder(path: str | os.PathLike) -> pathlib.Path:
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise errors.BadFileError(
      f"{folder} is not a folder; hf: takes one that holds {CONFIG}."
    )
  return folder


def _read_json(folder: pathlib.Path, name: str) -> dict[str, Any]:
  return files.read_json(files.inside(folder, name), files.no_doubles)
