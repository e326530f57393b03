"""Llama weights as a Hugging Face folder: config.json and safetensors.

Reads what any version of transformers has written: the flat rope_theta and
rope_scaling, and the nested rope_parameters of version 5. Writes both, so
that transformers, vLLM and llama.cpp's converter load the folder as it is.
bfloat16, float16 and float32 tensors keep their dtype.

Nothing outside the folder is opened, except where a Hugging Face cache keeps
the files of a snapshot: ../../blobs.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from llama_jax import errors, text
from llama_jax.checkpoint import atomic, hugging_face_config, names, proof
from llama_jax.model import config as config_lib
from llama_jax.text import files
from llama_jax.text import folder as text_folder

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


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
  return config, names.read_params(config, source), tokenizer


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
) -> tuple[config_lib.LlamaConfig, names.Source]:
  """The configuration and the tensors in Hugging Face's names and layout."""
  config = read_config(path)
  folder = _folder(path)
  tensors: dict[str, names.Tensor] = {}
  readers: dict[str, Callable[[str], np.ndarray]] = {}
  for name, keys in _weight_files(folder).items():
    found, reader = _open_safetensors(folder, name)
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
  source = names.Source(
    os.fspath(folder), "hf", tensors, lambda name: readers[name](name)
  )
  names.check(config, source)
  return config, source


def write(
  path: str | os.PathLike,
  config: config_lib.LlamaConfig,
  params: Mapping[str, Any],
  tokenizer: Any,
  *,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a folder that transformers loads as it is.

  The folder appears under its name only when it is complete. Tensors keep
  the dtype of params; peak memory is one shard.

  Args:
    path: the folder; it must be absent or empty.
    config: the model's configuration.
    params: our tree.
    tokenizer: saved beside the weights, its stop_ids as eos_token_id; or None.
    shard_bytes: most bytes of weights in one file; a larger tensor has a file
      of its own.

  Raises:
    UserError: the destination is taken or cannot be written.
    BadFileError: params are not those of config.
  """
  with atomic.new_folder(path) as folder:
    write_into(folder, config, params, tokenizer, shard_bytes=shard_bytes)


def write_into(
  folder: pathlib.Path,
  config: config_lib.LlamaConfig,
  params: Mapping[str, Any],
  tokenizer: Any,
  *,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """The same into an empty folder that is there already."""
  names.check_params(config, params)
  if shard_bytes < 1:
    raise errors.ConfigError(
      f"shard_bytes={shard_bytes} must be 1 or more bytes."
    )
  if tokenizer is not None:
    proof.check_vocabulary(config, tokenizer, os.fspath(folder))
  try:
    _write_weights(folder, config, params, shard_bytes)
  except safetensors.SafetensorError as error:
    # How it reports a full disk.
    raise errors.UserError(f"{folder} cannot be written: {error}.") from error
  dtype = np.dtype(names.flatten(params)[names.EMBED_PATH].dtype)
  fields = hugging_face_config.write_fields(config, dtype)
  if tokenizer is not None:
    tokenizer.save(folder)
    fields.update(text_folder.special_ids(tokenizer))
  files.write_json(folder / CONFIG, fields)


def _write_weights(
  folder: pathlib.Path,
  config: config_lib.LlamaConfig,
  params: Mapping[str, Any],
  shard_bytes: int,
) -> None:
  """The safetensors files, and their index if there are several."""
  leaves = names.flatten(params)
  shards: list[list[str]] = [[]]
  filled = total = 0
  for place in names.places(config, "hf"):
    itemsize = np.dtype(leaves[place.row.path].dtype).itemsize
    size = math.prod(place.shape) * itemsize
    if shards[-1] and filled + size > shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(place.name)
    filled += size
    total += size

  tensors = names.write_tensors(config, "hf", params)
  weight_map = {}
  for number, keys in enumerate(shards, 1):
    file = (
      WEIGHTS
      if len(shards) == 1
      else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    )
    shard = dict(itertools.islice(tensors, len(keys)))
    # transformers refuses a file that does not name its framework.
    safetensors.numpy.save_file(shard, folder / file, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(keys, file))
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files.write_json(folder / INDEX, index)


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


def _open_safetensors(
  folder: pathlib.Path, name: str
) -> tuple[dict[str, names.Tensor], Callable[[str], np.ndarray]]:
  path = _inside(folder, name)
  with _damage(path):
    file = safetensors.safe_open(path, framework="np")
    tensors = {}
    for key in file.keys():  # noqa: SIM118 (it is no dict)
      # Messages quote names: no line ends or terminal codes in them.
      if not key.isprintable():
        raise errors.BadFileError(f"{path} holds the tensor name {key[:40]!r}.")
      part = file.get_slice(key)
      stored = part.get_dtype()
      # An odd dtype is refused by names.check, with the tensor's name.
      dtype = names.DTYPES.get(stored, np.dtype(np.void))
      tensors[key] = names.Tensor(tuple(part.get_shape()), dtype, stored)

  def read_tensor(key: str) -> np.ndarray:
    with _damage(path):
      return file.get_tensor(key)

  return tensors, read_tensor


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
    OSError, ValueError, TypeError, KeyError, IndexError
  ):
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if length > min(size, files.MAX_JSON_BYTES):
        return f" Its header alone needs {8 + length} bytes."
      header = json.loads(file.read(length))
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


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
  """The path of a plain file of the folder.

  Raises:
    BadFileError: the name leads elsewhere, or to something that is no file.
  """
  path = folder / name
  if name != path.name or "\\" in name or "\0" in name or name in (".", ".."):
    raise errors.BadFileError(
      f"{folder} names the file {name!r}; only plain names of files in the"
      " folder are opened."
    )
  try:
    real = path.resolve(strict=True)
    home = folder.resolve()
    if real.parent not in (home, home.parent.parent / "blobs"):
      raise errors.BadFileError(
        f"{path} is a link to {real}, outside the folder; copy the file."
      )
    # Opening a pipe would wait for ever.
    if not stat.S_ISREG(real.stat().st_mode):
      raise errors.BadFileError(f"{path} is not a file.")
  except (OSError, RuntimeError) as error:
    raise errors.BadFileError(f"{path} cannot be read: {error}.") from error
  return path


def _read_json(folder: pathlib.Path, name: str) -> dict[str, Any]:
  return files.read_json(_inside(folder, name), _no_doubles)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) != len(pairs):
    raise ValueError("a key occurs twice")
  return value
