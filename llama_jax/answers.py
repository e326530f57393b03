"""A file of answers while several processes make it.

Until it is whole, the answers lie in FILE.parts: the rows in blocks, one file a
block, a line for each row as soon as its answers are there. Whoever works on a
block holds an flock on its file, so that any number of processes share the
rows, and what a dead one leaves is free at once. Who finds all blocks whole
joins them, in the order of the input, and the folder goes. FILE.settings.json
stays beside the file and tells how it was made.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from llama_jax import errors
from llama_jax.checkpoint import atomic

# Rows of a block at least, and blocks of a file at most.
_BLOCK, _BLOCKS = 16, 1000


@contextlib.contextmanager
def _disk(path: pathlib.Path) -> Iterator[None]:
  """What the disk refuses, as an error of ours."""
  try:
    yield
  except OSError as error:
    raise errors.UserError(
      f"{path} cannot be written ({error.strerror or error}). What is answered"
      " already is kept: typed again, the command goes on."
    ) from error


def _parse(
  path: pathlib.Path, content: bytes, rows: range
) -> dict[int, dict[str, Any]]:
  """Row -> what came of it, of whole lines of a part.

  Raises BadFileError where a line is not one of these rows, once.
  """
  found: dict[int, dict[str, Any]] = {}
  for number, line in enumerate(content.splitlines(), 1):
    try:
      row, answered = json.loads(line)
    except (TypeError, ValueError):
      row = answered = None
    if row not in rows or row in found or not isinstance(answered, dict):
      raise errors.BadFileError(
        f"{path}, line {number} is damaged; take it out, or the whole file, and"
        " its rows are answered again."
      )
    found[row] = answered
  return found


class Output:
  """The file that is being made, and its parts.

  Args:
    target: the file.
    rows: how many there will be.
    identity: what must be alike for it to be the same file; JSON.
  """

  def __init__(self, target: pathlib.Path, rows: int, identity: dict[str, Any]):
    self._target, self._rows = target, rows
    self._parts = target.with_name(target.name + ".parts")
    self._note = target.with_name(target.name + ".settings.json")
    self._identity = identity
    self._size = max(_BLOCK, -(-rows // _BLOCKS))

  @property
  def whole(self) -> bool:
    """Whether the file is there already.

    Raises UserError where it is a folder, or was made otherwise.
    """
    if self._target.is_dir():
      raise errors.UserError(
        f"--out={self._target} is a folder; name a file to write."
      )
    if not self._target.exists():
      return False
    with open(self._target, "rb") as file:
      found = sum(1 for _ in file)
    differing = self._differing(self._note)
    if found != self._rows or differing is None:
      raise errors.UserError(
        f"--out={self._target} is there with {found} rows and was not made of"
        f" these {self._rows} prompts by this command; name another --out, or"
        " remove that file."
      )
    if differing:
      raise errors.UserError(
        f"--out={self._target} is there and was made with other {differing}"
        f" ({self._note}); give the same, name another --out, or remove that"
        " file."
      )
    return True

  def check(self) -> None:
    """Raises UserError where parts are there that were made otherwise."""
    if differing := self._differing(self._parts / "settings.json"):
      raise errors.UserError(
        f"{self._parts} was begun with other {differing}; give the same to go"
        " on, name another --out, or remove that folder."
      )

  def _differing(self, note: pathlib.Path) -> str | None:
    """Names of what is not alike in a note, or None where there is none."""
    try:
      found = json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
      return None
    except (OSError, ValueError) as error:
      raise errors.UserError(f"--out={self._target}: {error}.") from error
    asked = json.loads(json.dumps(self._identity))
    return ", ".join(
      sorted(n for n in {*found, *asked} if found.get(n) != asked.get(n))
    )

  def begin(self) -> None:
    """Makes the folder of the parts, unless it is there; checks it too."""
    note = self._parts / "settings.json"
    try:
      self._parts.mkdir(parents=True, exist_ok=True)
      if not note.exists():
        atomic.write_text(note, json.dumps(self._identity, indent=2))
    except OSError as error:
      raise errors.UserError(f"--out={self._target}: {error}.") from error
    self.check()

  def blocks(self) -> Iterator["Block"]:
    """Those that nobody works on and that are not whole, now held."""
    for path, rows in self._files():
      block = Block(path, rows)
      if block.hold():
        yield block

  def _files(self) -> Iterator[tuple[pathlib.Path, range]]:
    """Each part and the rows that are for it."""
    for number, first in enumerate(range(0, self._rows, self._size)):
      last = min(first + self._size, self._rows)
      yield self._parts / f"{number:05d}.jsonl", range(first, last)

  def done(self) -> int:
    """Rows in all parts."""
    with contextlib.suppress(FileNotFoundError):
      return sum(
        path.read_bytes().count(b"\n") for path in self._parts.glob("*.jsonl")
      )
    return self._rows

  def join(self) -> bool:
    """Makes the file where all parts are whole; says whether it is there."""
    if self._target.exists():
      return True
    with contextlib.ExitStack() as stack:
      stack.enter_context(_disk(self._target))
      try:
        lock = stack.enter_context(open(self._parts / "join.lock", "w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
      except FileNotFoundError:
        return self._target.exists()
      if self._target.exists():
        return True
      if self.done() < self._rows:
        return False
      part = self._parts / "joined"
      with open(part, "wb") as joined:
        for path, rows in self._files():
          found = _parse(path, path.read_bytes(), rows)
          for row in rows:
            joined.write(atomic.json_line(found[row]))
      atomic.flush(part)
      atomic.write_text(self._note, json.dumps(self._identity, indent=2))
      part.replace(self._target)
      atomic.flush(self._target.parent)
      shutil.rmtree(self._parts)
    return True


class Block:
  """Some rows of the file, and the lines that are there of them."""

  def __init__(self, path: pathlib.Path, rows: range):
    self._path, self._rows = path, rows
    self.missing: set[int] = set()

  def hold(self) -> bool:
    """Takes it, unless another has it or it is whole.

    Raises BadFileError where one of its lines is damaged.
    """
    with _disk(self._path):
      try:
        # Unbuffered: what a full disk refused is not tried again at the end.
        file = open(self._path, "a+b", buffering=0)  # noqa: SIM115  (held)
      except FileNotFoundError:
        return False  # Joined meanwhile.
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        file.close()
        return False
      file.seek(0)
      content = file.read()
      # The last line of one that died may be cut.
      content = content[: content.rfind(b"\n") + 1]
      found = _parse(self._path, content, self._rows)
      file.truncate(len(content))
    self.missing = set(self._rows) - set(found)
    if not self.missing:
      file.close()
      return False
    self._file = file
    return True

  def add(self, row: int, content: dict[str, Any]) -> None:
    """A row's answers; the last one closes the block."""
    left = memoryview(atomic.json_line([row, content]))
    with _disk(self._path):
      while left:
        left = left[self._file.write(left) :]
      self.missing.discard(row)
      if not self.missing:
        os.fsync(self._file.fileno())
        self._file.close()
