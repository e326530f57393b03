"""Orbax set up as we need it, its complaints turned into ours."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator

import jax

from llama_jax import errors

# Small chunks let a restore onto many shards read only what each one needs.
CHUNK_BYTES = 64 << 20
READ_BYTES = 2 << 30


@contextlib.contextmanager
def context() -> Iterator:
  """Orbax's v1 module, within our settings."""
  ocp = _load()
  settings = ocp.Context()
  saving = settings.array.saving
  saving.storage_options.chunk_byte_size = CHUNK_BYTES
  # Trained float32 hardly compresses; trying costs seconds of every core and
  # as much memory as the state again.
  saving.use_compression = False
  settings.memory.read_concurrent_bytes = READ_BYTES
  # Where that fails in the background, other threads of orbax wait for 20
  # minutes for what will not come, and the process with them.
  settings.asynchronous.create_directories_asynchronously = False
  if jax.process_count() == 1:
    # Sharing a copy's write-out among its replicas pays between hosts; within
    # one it only compiles a slice for every array (5 s on eight devices).
    saving.use_replica_parallel = False
  with settings:
    yield ocp


def _load():
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


def barrier(name: str) -> None:
  """Waits for all processes; from any thread. A name serves once."""
  if jax.process_count() > 1:
    from orbax.checkpoint import multihost

    everyone = set(range(jax.process_count()))
    multihost.sync_global_processes(name, processes=everyone)


@contextlib.contextmanager
def readable(path: pathlib.Path) -> Iterator[None]:
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
def writable(path: pathlib.Path) -> Iterator[None]:
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
