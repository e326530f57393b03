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
import reprlib
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from llama_jax import errors
from llama_jax.checkpoint import atomic, names, proof
from llama_jax.model import config as config_lib

ARCHITECTURE = "LlamaForCausalLM"
CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_MAX_JSON_BYTES = 16 << 20

# our field: names that config.json gives it, newest first
_FIELDS = {
  "vocab_size": ("vocab_size",),
  "embed_dim": ("hidden_size",),
  "num_layers": ("num_hidden_layers",),
  "num_heads": ("num_attention_heads",),
  "mlp_dim": ("intermediate_size",),
  "norm_eps": ("rms_norm_eps",),
  # max_sequence_length: the first conversions of Llama 1.
  "context_length": ("max_position_embeddings", "max_sequence_length"),
}

# Values under which a config.json describes a Llama; a missing key means the
# first, as in transformers' LlamaConfig.
_REQUIRED = {
  "model_type": ("llama",),
  "hidden_act": ("silu", "swish"),
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "partial_rotary_factor": (1.0, None),
  "sliding_window": (None, False),
  "num_local_experts": (None, 0),
  "quantization_config": (None,),
}
# What transformers takes a missing rope_theta to mean (Llama 1 lacks it).
_ROPE_THETA = 10000.0
_LLAMA3_FIELDS = {
  "factor": "factor",
  "low_freq_factor": "low_freq_factor",
  "high_freq_factor": "high_freq_factor",
  "original_context": "original_max_position_embeddings",
}

_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}


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
  # Late, so that weights alone need no tokenizer library.
  from llama_jax import text

  return text.find_tokenizer(path)


def read_config(path: str | os.PathLike) -> config_lib.LlamaConfig:
  """The configuration of a model folder; opens config.json alone."""
  folder = _folder(path)
  fields = _read_json(folder, CONFIG)
  file = os.fspath(folder / CONFIG)
  _refuse_other_models(fields, file)

  def field(*keys: str) -> Any:
    for key in keys:
      if fields.get(key) is not None:
        return fields[key]
    raise errors.BadFileError(f"{file} lacks {keys[0]}.")

  ours = {name: field(*keys) for name, keys in _FIELDS.items()}
  num_heads, embed_dim = ours["num_heads"], ours["embed_dim"]
  for name, value in (
    ("num_attention_heads", num_heads),
    ("hidden_size", embed_dim),
  ):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise errors.BadFileError(
        f"{file} has {name}={value!r}; it must be a whole number, 1 or more."
      )
  head_dim = fields.get("head_dim")
  num_kv_heads = fields.get("num_key_value_heads")
  ours["norm_eps"] = _real(ours["norm_eps"], "rms_norm_eps", file)
  ours["head_dim"] = embed_dim // num_heads if head_dim is None else head_dim
  ours["num_kv_heads"] = num_heads if num_kv_heads is None else num_kv_heads
  ours["tied_embeddings"] = bool(fields.get("tie_word_embeddings", False))
  ours["rope_theta"], ours["rope_scaling"] = _rope(fields, file)
  try:
    return config_lib.LlamaConfig(**ours)
  except errors.ConfigError as error:
    raise errors.BadFileError(f"{file}: {error}") from error


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
  fields = _config_fields(config, params)
  if tokenizer is not None:
    ids = _special_ids(tokenizer)
    fields.update(ids)
    _write_json(folder / GENERATION, ids)
    tokenizer.save(folder)
  _write_json(folder / CONFIG, fields)


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
    _write_json(folder / INDEX, index)


def _config_fields(
  config: config_lib.LlamaConfig, params: Mapping[str, Any]
) -> dict[str, Any]:
  """config.json, with the names of transformers 4 and of 5."""
  fields: dict[str, Any] = {
    "architectures": [ARCHITECTURE],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "head_dim": config.head_dim,
    "num_key_value_heads": config.num_kv_heads,
    "tie_word_embeddings": config.tied_embeddings,
    "rope_theta": config.rope_theta,
  }
  for ours, theirs in _FIELDS.items():
    fields[theirs[0]] = getattr(config, ours)
  scaling = None
  if config.rope_scaling is not None:
    scaling = {"rope_type": "llama3"}
    for ours, theirs in _LLAMA3_FIELDS.items():
      scaling[theirs] = getattr(config.rope_scaling, ours)
  fields["rope_scaling"] = scaling
  fields["rope_parameters"] = {
    "rope_theta": config.rope_theta,
    **(scaling or {"rope_type": "default"}),
  }
  dtype = np.dtype(names.flatten(params)[names.EMBED_PATH].dtype).name
  fields["torch_dtype"] = fields["dtype"] = dtype
  return fields


def _special_ids(tokenizer: Any) -> dict[str, Any]:
  """bos_token_id and eos_token_id, a list where several ids end a turn."""
  ids: dict[str, Any] = {}
  if tokenizer.bos_id is not None:
    ids["bos_token_id"] = tokenizer.bos_id
  stops = list(tokenizer.stop_ids)
  if stops:
    ids["eos_token_id"] = stops[0] if len(stops) == 1 else stops
  return ids


def _refuse_other_models(fields: Mapping[str, Any], file: str) -> None:
  architectures = fields.get("architectures")
  if architectures is not None and architectures != [ARCHITECTURE]:
    raise errors.BadFileError(
      f"{file} has architectures={reprlib.repr(architectures)}; only"
      f" {[ARCHITECTURE]} is supported."
    )
  if architectures is None and "model_type" not in fields:
    raise errors.BadFileError(
      f"{file} names neither architectures nor model_type, so it is no model"
      " of transformers."
    )
  for key, allowed in _REQUIRED.items():
    value = fields.get(key, allowed[0])
    if value not in allowed:
      raise errors.BadFileError(
        f"{file} is not a plain Llama: {key}={reprlib.repr(value)}, where"
        f" {allowed[0]!r} is supported."
      )


def _rope(
  fields: Mapping[str, Any], file: str
) -> tuple[float, config_lib.RopeScaling | None]:
  """(rope_theta, scaling) of either era; both at once must agree."""
  for key in ("rope_scaling", "rope_parameters"):
    if not isinstance(fields.get(key), dict | None):
      raise errors.BadFileError(f"{file} has {key}={fields[key]!r}.")
  old = fields.get("rope_scaling") or {}
  new = fields.get("rope_parameters") or {}
  thetas = [
    _real(value, "rope_theta", file)
    for value in (
      fields.get("rope_theta"),
      old.get("rope_theta"),
      new.get("rope_theta"),
    )
    if value is not None
  ]
  scalings = [_scaling(one, file) for one in (old, new) if one]
  if len(set(thetas)) > 1 or len(set(scalings)) > 1:
    raise errors.BadFileError(
      f"{file} contradicts itself: rope_theta={fields.get('rope_theta')!r},"
      f" rope_scaling={old or None!r} and rope_parameters={new!r}."
    )
  theta = thetas[0] if thetas else _ROPE_THETA
  return theta, scalings[0] if scalings else None


def _scaling(
  rope: Mapping[str, Any], file: str
) -> config_lib.RopeScaling | None:
  kind = rope.get("rope_type", rope.get("type", "default"))
  if rope.get("partial_rotary_factor") not in (None, 1.0):
    raise errors.BadFileError(
      f"{file} is not a plain Llama: partial_rotary_factor="
      f"{rope['partial_rotary_factor']!r}, where 1.0 is supported."
    )
  if kind in ("default", None):
    return None
  if kind != "llama3":
    raise errors.BadFileError(
      f"{file} has the rope type {kind!r}; 'default' and 'llama3' are"
      " supported."
    )
  values = {}
  for ours, theirs in _LLAMA3_FIELDS.items():
    values[ours] = _real(rope.get(theirs), f"rope {theirs}", file)
  original = values["original_context"]
  if not original.is_integer():
    raise errors.BadFileError(
      f"{file} has original_max_position_embeddings={original!r}; it must be"
      " a whole number."
    )
  values["original_context"] = int(original)
  try:
    return config_lib.RopeScaling(**values)
  except errors.ConfigError as error:
    raise errors.BadFileError(f"{file}: {error}") from error


def _real(value: Any, name: str, file: str) -> float:
  number = isinstance(value, int | float) and not isinstance(value, bool)
  # Past 1e300 a whole number of JSON overflows float().
  if not number or not abs(value) < 1e300:
    raise errors.BadFileError(
      f"{file} has {name}={reprlib.repr(value)}; it must be a finite number."
    )
  return float(value)


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
  files: dict[str, set[str] | None] = {}
  for tensor, name in weight_map.items():
    if not isinstance(name, str) or not name.endswith(".safetensors"):
      raise errors.BadFileError(
        f"{folder / INDEX} places {tensor!r} in {name!r}, which is not a"
        " .safetensors file of the folder."
      )
    files.setdefault(name, set()).add(tensor)
  return files


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
      dtype = _DTYPES.get(stored, np.dtype(np.void))
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
      if length > min(size, _MAX_JSON_BYTES):
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
  path = _inside(folder, name)
  try:
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
      raise errors.BadFileError(
        f"{path} has {size} bytes; {_MAX_JSON_BYTES} are allowed."
      )
    value = json.loads(path.read_bytes(), object_pairs_hook=_no_doubles)
  except (OSError, ValueError, RecursionError) as error:
    if isinstance(error, errors.UserError):
      raise
    raise errors.BadFileError(f"{path} is not sound JSON: {error}.") from error
  if not isinstance(value, dict):
    raise errors.BadFileError(f"{path} is not a JSON object.")
  return value


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) != len(pairs):
    raise ValueError("a key occurs twice")
  return value


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n")
