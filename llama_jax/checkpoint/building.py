"""A destination while it is being filled: resumable, never taken for whole.

What will be PATH is built in .NAME.unfinished/content beside it, with a journal
of what is done, and takes its name by one rename at the end. A stopped process
(Ctrl-C, a kill) leaves it; the same job goes on where that stopped. A failure
removes it.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import atomic, weights

_BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")


class Building:
  """What a writer fills.

  Attributes:
    content: becomes the destination, a file or a folder; the writer makes it.
    done: units that an earlier process finished.
  """

  def __init__(
    self,
    content: pathlib.Path,
    done: frozenset[str],
    journal,
    tick: Callable[[str, int], None],
  ):
    self.content = content
    self.done = done
    self._journal = journal
    self._tick = tick

  def finish(self, unit: str, num_bytes: int) -> None:
    """Notes that a unit's bytes are written, for good and for the bar."""
    if unit not in self.done:
      self._journal.write(json.dumps(unit) + "\n")
      self._journal.flush()
    self._tick(unit, num_bytes)

  def fill(
    self,
    source: weights.Source,
    wanted: Iterable[str],
    block_bytes: int,
    put: Callable[[str, int, np.ndarray], None],
    num_bytes: Callable[[str], int] | None = None,
  ) -> None:
    """Writes tensors block by block, each a unit; those done are not read.

    Args:
      source: what to write.
      wanted: names of its tensors, in order.
      block_bytes: most bytes of one block; a longer row is a block.
      put: (name, first row, rows) -> None: writes a block.
      num_bytes: what finish is told of a tensor; its own by default.
    """
    num_bytes = num_bytes or (lambda name: source.tensors[name].num_bytes)
    left = []
    for name in wanted:
      if name in self.done:
        self.finish(name, num_bytes(name))
      else:
        left.append(name)
    spans = source.spans(left, block_bytes)
    for name, start, stop, rows in weights.read_ahead(source, spans):
      put(name, start, rows)
      if stop == source.tensors[name].shape[0]:
        self.finish(name, num_bytes(name))


@contextlib.contextmanager
def building(
  path: str | os.PathLike,
  job: Mapping[str, Any] | None = None,
  tick: Callable[[str, int], None] = lambda unit, num_bytes: None,
) -> Iterator[Building]:
  """Builds what path will name.

  Args:
    path: a new name, or an empty folder.
    job: JSON that says what is being done; an unfinished destination of the
      same job is gone on with, one of another is begun anew. None: always
      anew.
    tick: told of every unit that is finished or was so before, with its bytes.

  Raises:
    UserError: the path is taken, another process builds it, or the disk
      refuses.
  """
  atomic.check_new(path)
  final = pathlib.Path(path).absolute()
  room = final.with_name(f".{final.name}.unfinished")
  try:
    room.mkdir(parents=True, exist_ok=True)
    with open(room / "journal", "a+", encoding="utf-8") as journal:
      try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise errors.UserError(
          f"{final} is being written by another process; wait for it, or name"
          " another destination."
        ) from None
      try:
        yield Building(
          room / "content", _begin(room, journal, job), journal, tick
        )
        _publish(room / "content", final)
      except Exception:
        shutil.rmtree(room, ignore_errors=True)
        raise
      except BaseException:
        if job is None:
          shutil.rmtree(room, ignore_errors=True)
        raise
    shutil.rmtree(room, ignore_errors=True)
  except OSError as error:
    raise errors.UserError(
      f"{final} cannot be written ({error.strerror or error}); nothing was left"
      " behind."
    ) from error


def unfinished(path: str | os.PathLike) -> bool:
  """Whether a stopped process has left something of this destination."""
  final = pathlib.Path(path).absolute()
  return (final.parent / f".{final.name}.unfinished" / "content").exists()


def _begin(
  room: pathlib.Path, journal, job: Mapping[str, Any] | None
) -> frozenset[str]:
  """The units that are done; empties the room if they are of another job."""
  wanted = None
  if job is not None:
    # What the kernel had not put on the disk is lost with a reboot.
    boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
    wanted = json.dumps({**job, "boot": boot}, sort_keys=True)
  journal.seek(0)
  first, *lines = journal.read().split("\n")
  if wanted is not None and first == wanted:
    # The last is what follows the last line end: cut off, or nothing.
    return frozenset(json.loads(line) for line in lines[:-1])
  for entry in room.iterdir():
    if entry.name == "journal":
      continue
    if entry.is_dir():
      shutil.rmtree(entry)
    else:
      entry.unlink()
  journal.truncate(0)
  journal.write(f"{wanted}\n")
  journal.flush()
  return frozenset()


def _publish(content: pathlib.Path, final: pathlib.Path) -> None:
  """Puts the content on the disk and under its name."""
  umask = os.umask(0)
  os.umask(umask)
  for entry in [content, *content.rglob("*")]:
    # Some writers make what only its owner may read.
    entry.chmod((0o777 if entry.is_dir() else 0o666) & ~umask)
    atomic.flush(entry)
  os.rename(content, final)
  atomic.flush(final.parent)


class RowFile:
  """A file of known size whose parts are written at their offsets.

  Opening one that is there keeps its bytes.
  """

  def __init__(self, path: pathlib.Path, size: int):
    self._handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    os.ftruncate(self._handle, size)

  def write(self, content: bytes | np.ndarray, offset: int) -> None:
    """Writes all of the bytes of a buffer or contiguous array."""
    if isinstance(content, np.ndarray):  # bfloat16 is no buffer by itself
      content = content.reshape(-1).view(np.uint8)
    view = memoryview(content)
    while view:
      count = os.pwrite(self._handle, view, offset)
      view, offset = view[count:], offset + count

  def __enter__(self) -> "RowFile":
    return self

  def __exit__(self, *error) -> None:
    os.close(self._handle)
