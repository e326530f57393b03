"""Orbax behind one file: a model's folder, and a run's checkpoints in it.

  DIR/model.json            the LlamaConfig
  DIR/tokenizer/            as Hugging Face keeps it, where there is one
  DIR/checkpoints/STEP/     params; from a run also optimizer and meta

A step appears under its name only when it is whole (orbax renames it), and a
converted model's DIR likewise (building.py).
"""

import collections
import contextlib
import json
import logging
import math
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import atomic, building, names, weights
from llama_jax.model import config as config_lib

# Small chunks let a restore onto many shards read only what each one needs.
CHUNK_BYTES = 64 << 20
READ_CHUNK = 8 << 20
READ_BYTES = 2 << 30


def _orbax():
  """Orbax is 0.6 s of imports; only those who touch a checkpoint pay it."""
  import warnings

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from orbax.checkpoint import v1 as ocp
  logging.getLogger("absl").addFilter(_quiet)
  return ocp


def _quiet(record: logging.LogRecord) -> bool:
  """Orbax narrates saves and logs each failure's stack thrice; we raise it."""
  return "orbax" not in record.pathname


@contextlib.contextmanager
def _context():
  ocp = _orbax()
  context = ocp.Context()
  context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
  # Trained float32 hardly compresses; trying costs seconds of every core and
  # as much memory as the state again.
  context.array.saving.use_compression = False
  context.memory.read_concurrent_bytes = READ_BYTES
  if jax.process_count() == 1:
    # Sharing a copy's write-out among its replicas pays between hosts; within
    # one it only compiles a slice for every array (5 s on eight devices).
    context.array.saving.use_replica_parallel = False
  with context:
    yield ocp


class Checkpoints:
  """A run's steps, saved in the background, the newest few kept.

  Use as a context manager: leaving it waits for the save under way and raises
  if that failed.
  """

  def __init__(self, folder: pathlib.Path, keep: int):
    ocp = _orbax()
    self._folder = pathlib.Path(folder).absolute() / "checkpoints"
    self._folder.mkdir(parents=True, exist_ok=True)
    self._keep = keep
    self._pending = None
    with _context():
      self._orbax = ocp.training.Checkpointer(
        self._folder,
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        save_decision_policy=(
          ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        ),
        cleanup_tmp_directories=True,
      )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, *error) -> None:
    try:
      self.wait()
    except errors.UserError:
      if kind is None:
        raise
    finally:
      # After a failed save it fails too, with what wait has said already.
      with contextlib.suppress(Exception):
        self._orbax.close()

  def latest(self) -> int | None:
    """The newest complete step."""
    newest = self._orbax.latest
    return None if newest is None else newest.step

  def save(self, step: int, params, rest, meta: dict[str, Any]) -> None:
    """Starts to save; returns once the arrays may change.

    Args:
      step: its name.
      params: the model's.
      rest: whatever else training needs (optimizer state, counters).
      meta: JSON: what the arrays do not say (data position).
    """
    self.wait()
    with _context(), self._saving():
      self._pending = self._orbax.save_checkpointables_async(
        step, {"params": params, "training": rest, "meta": meta}
      )

  def wait(self) -> None:
    """Waits for the save under way; raises if it failed."""
    pending, self._pending = self._pending, None
    if pending is None:
      return
    with self._saving():
      pending.result()

  @contextlib.contextmanager
  def _saving(self):
    """Either half of a save: its failure is one of ours and leaves nothing."""
    try:
      with _writable(self._folder):
        yield
    except errors.UserError:
      # What was half-written holds space that the user is asked to free.
      for stale in self._folder.glob("*.orbax-checkpoint-tmp"):
        shutil.rmtree(stale, ignore_errors=True)
      raise

  def restore(self, step: int, params, rest) -> tuple[Any, Any, dict[str, Any]]:
    """(params, rest, meta) of a step.

    Args:
      step: which.
      params, rest: trees of jax.ShapeDtypeStruct with shardings.
    """
    target = {"params": params, "training": rest, "meta": None}
    path = self._folder / str(step)
    with _context(), _readable(path):
      loaded = self._orbax.load_checkpointables(step, target)
    return loaded["params"], loaded["training"], loaded["meta"]


@contextlib.contextmanager
def _readable(path: pathlib.Path):
  """Orbax's many complaints about a damaged checkpoint, as one of ours."""
  try:
    yield
  except (errors.UserError, MemoryError):
    raise
  except Exception as error:
    raise errors.BadFileError(
      f"{path}: cannot be read as a checkpoint of this model"
      f" ({_first_line(error)})."
    ) from error


@contextlib.contextmanager
def _writable(path: pathlib.Path):
  """Orbax's and TensorStore's errors of a save, as one of ours."""
  try:
    yield
  except (errors.UserError, MemoryError):
    raise
  except Exception as error:
    # TensorStore reports a full disk as a ValueError with the errno inside.
    raise errors.UserError(
      f"{path}: the checkpoint could not be saved ({_first_line(error)});"
      " earlier ones are whole. Free space, or write elsewhere."
    ) from error


def _first_line(error: Exception) -> str:
  text = str(error).strip() or type(error).__name__
  if "No space left" in text:
    return "no space left on the disk"
  return text.splitlines()[0][:200]


def locate(path: str | os.PathLike) -> tuple[pathlib.Path, pathlib.Path]:
  """(model folder, newest or named step's folder) of an orbax: reference."""
  given = pathlib.Path(path).absolute()
  if given.parent.name == "checkpoints" and given.is_dir():
    folder, step = given.parent.parent, given
  else:
    folder, step = given, None
  if not (folder / "model.json").is_file():
    hint = "it does not exist" if not given.exists() else "it has no model.json"
    raise errors.BadFileError(
      f"orbax:{path} is no checkpoint: {hint}; give the folder that convert or"
      " train wrote."
    )
  if step is None:
    steps = [
      int(p.name)
      for p in (folder / "checkpoints").glob("*")
      if p.name.isdigit()
    ]
    if not steps:
      raise errors.BadFileError(
        f"orbax:{path} holds no complete checkpoint yet."
      )
    step = folder / "checkpoints" / str(max(steps))
  return folder, step


def read_config(path: str | os.PathLike) -> config_lib.LlamaConfig:
  """The LlamaConfig beside the weights."""
  return read_model_config(locate(path)[0])


def read_model_config(folder: pathlib.Path) -> config_lib.LlamaConfig:
  """The same of a model's folder that may hold no checkpoint yet."""
  file = folder / "model.json"
  try:
    return config_lib.LlamaConfig.from_dict(json.loads(file.read_text()))
  except (ValueError, TypeError, AttributeError) as error:
    raise errors.BadFileError(f"{file}: not a model's config ({error}).") from (
      error
    )


def read_tokenizer(path: str | os.PathLike):
  """The tokenizer beside the weights, or None."""
  return read_model_tokenizer(locate(path)[0])


def read_model_tokenizer(folder: pathlib.Path):
  """The same of a model's folder that may hold no checkpoint yet."""
  from llama_jax import text

  tokenizer = folder / "tokenizer"
  return text.load_tokenizer(tokenizer) if tokenizer.is_dir() else None


def read_params(path: str | os.PathLike, shardings=None) -> Any:
  """Params of an orbax: reference, onto shardings or the first device."""
  _, step = locate(path)
  with _context() as ocp, _readable(step):
    found = ocp.checkpointables_metadata(step).metadata["params"]
    alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=alone),
      found,
    )
    if shardings is not None:
      target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=sharding
        ),
        target,
        shardings,
      )
    return ocp.load_checkpointables(step, {"params": target})["params"]


def read(path: str | os.PathLike):
  """(LlamaConfig, params, tokenizer or None) of an orbax: reference."""
  return read_config(path), read_params(path), read_tokenizer(path)


def open_tensors(
  path: str | os.PathLike,
) -> tuple[config_lib.LlamaConfig, weights.Source]:
  """The configuration and the weights, which lie in our own layout, under
  Hugging Face's names; any rows of them can be read alone."""
  config = read_config(path)
  _, step = locate(path)
  leaves = {}
  with _readable(step):
    for row in names.rows(config):
      leaves[row.path] = _Leaf(step / "params", _orbax_name(row))
  for row in names.rows(config):
    shape = names.our_shape(config, row)
    if leaves[row.path].shape != shape:
      raise errors.BadFileError(
        f"{step}: {row.path} is {list(leaves[row.path].shape)} but model.json"
        f" makes it {list(shape)}."
      )
  return config, weights.from_leaves(config, leaves, "hf", os.fspath(path))


class _Leaf:
  """One array of a checkpoint, read slice by slice."""

  def __init__(self, folder: pathlib.Path, name: str):
    import tensorstore

    self._folder = folder
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{folder}/{name}/"}
    if (folder / "manifest.ocdbt").exists():  # a run's checkpoint
      base = {"driver": "file", "path": f"{folder}/"}
      kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    self._array = tensorstore.open(
      {"driver": "zarr3", "kvstore": kvstore}, open=True, read=True
    ).result()
    self.shape = tuple(self._array.shape)
    self.dtype = self._array.dtype.numpy_dtype

  def __getitem__(self, index) -> np.ndarray:
    with _readable(self._folder):
      return self._array[index].read().result()


def write_model(folder: pathlib.Path, config, tokenizer) -> None:
  """What lies beside the checkpoints: model.json and tokenizer/."""
  atomic.write_text(folder / "model.json", config.to_json() + "\n")
  if tokenizer is not None:
    tokenizer.save(folder / "tokenizer")


def write_into(
  site: building.Building,
  config: config_lib.LlamaConfig,
  source: weights.Source,
  tokenizer,
  *,
  block_bytes: int = weights.BLOCK_BYTES,
) -> None:
  """Fills a site with a model's folder, its weights as step 0.

  Orbax saves a skeleton, one number for each leaf; then each leaf's array is
  made anew in its real shape and filled block by block, so that no leaf is
  ever in memory. A file holds a block of one layer, with checksums inside.

  Args:
    site: where to; what an earlier process finished there is not done again.
    config: the model's configuration.
    source: the weights in any scheme; they keep its dtypes.
    tokenizer: saved beside them; or None.
    block_bytes: of weights in memory at once, about.
  """
  folder = site.content
  write_model(folder, config, tokenizer)
  halves = weights.as_scheme(config, source, "hf")
  dtypes = weights.leaf_dtypes(config, halves)
  step = folder / "checkpoints" / "0"
  if not step.exists():
    _write_skeleton(step, config, dtypes)
  for name in site.done:
    site.finish(name, halves.tensors[name].num_bytes)
  places = {
    place.name: place
    for place in names.places(config, "hf")
    if place.name not in site.done
  }
  arrays = {
    row.path: _Array(
      step / "params" / _orbax_name(row),
      names.our_shape(config, row),
      dtypes[row.path],
      row,
      block_bytes=block_bytes,
    )
    for row in {place.row for place in places.values()}
  }
  spans = (
    (place.name, start, min(start + step_, place.shape[0]))
    for place in places.values()
    for step_ in (arrays[place.row.path].block,)
    for start in range(0, place.shape[0], step_)
  )

  def turn(name: str, rows: np.ndarray) -> np.ndarray:
    row = places[name].row
    rows = rows.astype(dtypes[row.path], copy=False)
    return rows if row.reshape == names.AS_IS else weights.transpose(rows)

  # One block is on its way to the disk while the next are read and turned.
  pending: collections.deque[tuple[Any, str | None]] = collections.deque()

  def settle(most: int) -> None:
    while len(pending) > most:
      write, finished = pending.popleft()
      write.result()
      if finished is not None:
        site.finish(finished, halves.tensors[finished].num_bytes)

  with _writable(folder):
    for name, start, stop, rows in weights.read_ahead(halves, spans, turn):
      place = places[name]
      write = arrays[place.row.path].write(place.layer, start, stop, rows)
      pending.append((write, name if stop == place.shape[0] else None))
      settle(most=1)
    settle(most=0)


def _orbax_name(row: names.Row) -> str:
  """The folder that orbax gives to a leaf."""
  return row.path.replace("/", ".")


def _write_skeleton(step: pathlib.Path, config, dtypes) -> None:
  """A checkpoint of one number a leaf, laid out as _Array expects it."""
  tree = names.nest(
    {
      row.path: np.zeros(
        (1,) * len(names.our_shape(config, row)), dtypes[row.path]
      )
      for row in names.rows(config)
    }
  )
  with _context() as ocp:
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.array_metadata_store = None
    context.array.saving.enable_write_sharding_file = False
    context.array.saving.use_compression = False
    with context, _writable(step):
      ocp.save_checkpointables(step, {"params": tree})


class _Array:
  """The array of one leaf, written in blocks; kept if it is there already.

  A file holds a block of the formats' rows, which are columns of a kernel of
  ours: so many of one layer as fit a block. A read takes a part of that.

  Attributes:
    block: rows to write at a time.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    shape: tuple[int, ...],
    dtype: np.dtype,
    row: names.Row,
    *,
    block_bytes: int,
  ):
    import tensorstore

    columns = row.reshape != names.AS_IS
    self._columns = columns
    # One layer of a kernel; the norms of all layers.
    read = [1] * (len(shape) - 2) + list(shape[-2:]) if columns else [*shape]
    axis = len(shape) - 1 if columns else 0
    row_bytes = math.prod(read) // read[axis] * dtype.itemsize
    read[axis] = max(1, min(read[axis], READ_CHUNK // row_bytes))
    blocks = max(1, block_bytes // (read[axis] * row_bytes))
    write = [*read]
    write[axis] *= min(blocks, -(-shape[axis] // read[axis]))
    whole = names.stacked(row) and not columns
    self.block = shape[-1] if whole else write[axis]
    metadata = _zarr_metadata(shape, dtype, write, read)
    spec = {
      "driver": "zarr3",
      "kvstore": {"driver": "file", "path": f"{folder}/"},
      # building.py puts every file on the disk before it names them.
      "context": {"file_io_sync": False},
    }
    self._array = tensorstore.open(spec, open=True).result()
    if self._array.shape != shape:
      shutil.rmtree(folder)
      self._array = tensorstore.open(
        {**spec, "metadata": metadata}, create=True
      ).result()

  def write(self, layer: int | None, start: int, stop: int, ours: np.ndarray):
    """Starts to write a block, in our orientation; the future of it."""
    index: tuple[Any, ...] = () if layer is None else (layer,)
    index += (slice(None),) if self._columns else ()
    return self._array[(*index, slice(start, stop))].write(ours)


def _zarr_metadata(shape, dtype, write, read) -> dict[str, Any]:
  """Zarr 3: files of chunks `write`, of checked parts `read`."""
  plain = {"name": "bytes", "configuration": {"endian": "little"}}
  checked = [plain, {"name": "crc32c"}]
  sharding = {
    "chunk_shape": read,
    "codecs": checked,
    "index_codecs": checked,
  }
  return {
    "shape": list(shape),
    "data_type": dtype.name,
    "fill_value": 0.0,
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": write}},
    "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
  }


def write(path: str | os.PathLike, config, params, tokenizer) -> None:
  """Writes params in memory as a model's folder, whole or not at all."""
  source = weights.from_params(config, params, "hf")
  with building.building(path) as site:
    write_into(site, config, source, tokenizer)
