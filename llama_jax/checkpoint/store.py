"""Orbax behind one file: a model's folder, and a run's checkpoints in it.

  DIR/model.json            the LlamaConfig
  DIR/tokenizer/            as Hugging Face keeps it, where there is one
  DIR/checkpoints/STEP/     params; from a run also optimizer and meta

A step appears under its name only when it is whole (orbax renames it), and a
converted model's DIR likewise (atomic.py).
"""

import contextlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import atomic
from llama_jax.model import config as config_lib

# Small chunks let a restore onto many shards read only what each one needs.
CHUNK_BYTES = 64 << 20
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


def write_model(folder: pathlib.Path, config, tokenizer) -> None:
  """What lies beside the checkpoints: model.json and tokenizer/."""
  atomic.write_text(folder / "model.json", config.to_json() + "\n")
  if tokenizer is not None:
    tokenizer.save(folder / "tokenizer")


def write_into(folder: pathlib.Path, config, params, tokenizer) -> None:
  """Fills an empty folder with a model, as its step 0."""
  write_model(folder, config, tokenizer)
  step = folder / "checkpoints" / "0"
  with _context() as ocp, _writable(step):
    ocp.save_checkpointables(step, {"params": jax.tree.map(np.asarray, params)})


def write(path: str | os.PathLike, config, params, tokenizer) -> None:
  """Writes a model's folder, whole or not at all."""
  with atomic.new_folder(path) as folder:
    write_into(folder, config, params, tokenizer)
