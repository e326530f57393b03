"""Records of one file, and what in it is none: lines, Parquet, plain text.

A record is a text, or where no field is named the whole JSON object.

Whatever is wrong with a record is handed out in its place, so the caller
decides how much of it to bear. No record takes more memory than the limit.
"""

import dataclasses
import gzip
import io
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

FORMATS = ("jsonl", "text", "parquet")
_SUFFIXES = {".jsonl": "jsonl", ".parquet": "parquet"}
_PACKED = (".gz", ".zst")
# What a cut or damaged file raises, whichever way it is packed.
_DAMAGE = (OSError, EOFError, zlib.error)
_BUFFER = 1 << 20
_BATCH = 256  # rows of Parquet at a time


@dataclasses.dataclass(frozen=True)
class Bad:
  """A record, or a file's rest, that cannot be had.

  Attributes:
    where: "line 3", "row 7", or "" for the file as a whole.
    binary: it is no text at all, such as a picture in a folder.
  """

  where: str
  problem: str
  binary: bool = False

  def at(self, path: str | os.PathLike) -> str:
    """One line for people."""
    place = f"{path}, {self.where}" if self.where else str(path)
    return f"{place}: {self.problem}."


def format_of(path: pathlib.Path) -> str:
  """One of FORMATS, by the suffix; what is unknown is text."""
  suffixes = [s.lower() for s in path.suffixes]
  while suffixes and suffixes[-1] in _PACKED:
    suffixes.pop()
  return _SUFFIXES.get(suffixes[-1] if suffixes else "", "text")


class _Source(io.RawIOBase):
  """What is unpacked; it ends where that fails.

  Otherwise a buffer over it would lose what it had before.

  Attributes:
    error: why it ended before its end, or None.
  """

  def __init__(self, read: Callable[[int], bytes]):
    super().__init__()
    self._read = read
    self.error: Exception | None = None

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    if self.error is not None:
      return 0
    try:
      content = self._read(len(buffer))
    except _DAMAGE as error:
      self.error = error
      return 0
    buffer[: len(content)] = content
    return len(content)


class Records:
  """The records of a file, each a text (or an object) or Bad, in order.

  Args:
    path: .gz and .zst are unpacked on the way.
    format: one of FORMATS; "" goes by the suffix.
    field: the key or column of the text; a text file has none. None for whole
      objects, which a file that is one JSON array (.json) may hold too.
    limit: most bytes of a record.
  """

  def __init__(
    self,
    path: pathlib.Path,
    format: str = "",
    field: str | None = "text",
    limit: int = 1 << 30,
  ):
    self._path = path
    self._format = format or format_of(path)
    self._field = field
    self._limit = limit
    self._raw: io.BufferedReader | None = None
    self._source: _Source | None = None

  @property
  def position(self) -> int:
    """Bytes of the file that have been read."""
    return self._raw.tell() if self._raw and not self._raw.closed else 0

  def __iter__(self) -> Iterator[str | dict[str, Any] | Bad]:
    read = {"jsonl": self._lines, "text": self._text, "parquet": self._parquet}
    if self._field is None:
      # What is not called .jsonl may hold lines all the same.
      array = ".json" in self._path.suffixes
      read["text"] = self._array if array else self._lines
    try:
      with open(self._path, "rb") as self._raw:
        yield from read[self._format]()
    except _DAMAGE as error:
      yield _unreadable("", error)

  def _unpacked(self) -> io.BufferedReader:
    suffix = self._path.suffix.lower()
    if suffix == ".gz":
      # read1: what one call of zlib gives, not the wait for more.
      self._source = _Source(gzip.GzipFile(fileobj=self._raw).read1)
    elif suffix == ".zst":
      import pyarrow

      stream = pyarrow.CompressedInputStream(self._raw, "zstd")
      self._source = _Source(stream.read)
    else:
      return self._raw
    return io.BufferedReader(self._source, _BUFFER)

  def _whole(self) -> bytes:
    """All of the file, or a byte more than the limit."""
    content = self._unpacked().read(self._limit + 1)
    if len(content) <= self._limit:
      self._check()
    return content

  def _check(self) -> None:
    """Raises what ended the unpacking before the file's end."""
    if self._source is not None and self._source.error is not None:
      raise self._source.error

  def _text(self) -> Iterator[str | Bad]:
    content = self._whole()
    if len(content) > self._limit:
      yield too_long("", self._limit)
      return
    try:
      yield content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
      yield Bad("", f"byte {error.start} is not UTF-8 text", binary=True)

  def _array(self) -> Iterator[dict[str, Any] | Bad]:
    content = self._whole()
    if len(content) > self._limit:
      yield too_long("", self._limit)
      return
    try:
      found = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
      yield Bad("", f"not JSON ({error})")
      return
    if not isinstance(found, list) or not found:
      yield Bad("", "not a JSON array of objects; lines of them are .jsonl")
      return
    for number, row in enumerate(found, 1):
      where = f"element {number}"
      yield row if isinstance(row, dict) else Bad(where, "not a JSON object")

  def _lines(self) -> Iterator[str | dict[str, Any] | Bad]:
    number = 0
    try:
      file = self._unpacked()
      # By bytes: str.splitlines would also cut at U+2028 and its like.
      while line := file.readline(self._limit + 1):
        if not line.endswith(b"\n") and len(line) <= self._limit:
          self._check()  # Else it is the last line.
        number += 1
        if len(line) > self._limit and not line.endswith(b"\n"):
          while line and not line.endswith(b"\n"):
            line = file.readline(_BUFFER)
          yield too_long(f"line {number}", self._limit)
        elif line.strip():
          yield self._row(line, number)
      self._check()
    except _DAMAGE as error:
      place = f"after line {number}, byte {self.position} of the file"
      yield _unreadable(place, error)
      return
    if not number:
      yield Bad("", "is empty")

  def _row(self, line: bytes, number: int) -> str | dict[str, Any] | Bad:
    where = f"line {number}"
    try:
      row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
      return Bad(where, f"not a JSON object ({error})")
    if self._field is None:
      return row if isinstance(row, dict) else Bad(where, "not a JSON object")
    if not isinstance(row, dict) or not isinstance(row.get(self._field), str):
      return Bad(where, f'needs an object with a string "{self._field}"')
    return _checked(row[self._field], where)

  def _parquet(self) -> Iterator[str | dict[str, Any] | Bad]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
      file = parquet.ParquetFile(self._raw)
      if self._field is None:
        for batch in file.iter_batches(_BATCH):
          yield from batch.to_pylist()
        return
      if self._field not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        yield Bad("", f'has no column "{self._field}"; it has {names}')
        return
      for batch in file.iter_batches(_BATCH, columns=[self._field]):
        for value in batch.column(0):
          number += 1
          yield self._value(value, f"row {number}")
    except (pyarrow.ArrowException, *_DAMAGE) as error:
      yield _unreadable(f"after row {number}" if number else "", error)
      return
    if not number:
      yield Bad("", "is empty")

  def _value(self, value, where: str) -> str | Bad:
    try:
      text = value.as_py()
    except UnicodeDecodeError as error:
      return Bad(where, f"byte {error.start} is not UTF-8 text")
    if not isinstance(text, str):
      return Bad(where, f'needs a string "{self._field}"')
    # A character is a byte at least.
    if len(text) > self._limit:
      return too_long(where, self._limit)
    return _checked(text, where)


def too_long(where: str, limit: int) -> Bad:
  return Bad(where, f"longer than the {limit} bytes that are allowed")


def _unreadable(where: str, error: Exception) -> Bad:
  return Bad(where, f"cannot be read, as if cut or damaged ({error})")


def _checked(text: str, where: str) -> str | Bad:
  """Half a surrogate pair passes JSON, and no tokenizer."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    half = text[error.start]
    return Bad(where, f"half a surrogate pair, {half!a}, is no Unicode text")
  return text
