"""What stands before the weights of a GGUF file, as plain Python values.

The gguf package's reader takes seconds for a tokenizer's string arrays, trusts
every count it reads and raises whatever NumPy raises. This one believes no
count before it has seen that the file is long enough.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import os
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

from llama_jax import errors
from llama_jax.text import files

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_NAME_BYTES = 1024
_MAX_DIMS = 4
# What a header may cost as Python values. The largest vocabularies known have
# 262,144 tokens and half a million merges, in some 15 MB; Llama 405B has 1,138
# tensors.
_MAX_ENTRIES = 1 << 16
_MAX_ITEMS = 4 << 20
_MAX_HEADER_BYTES = 128 << 20

_STRING, _ARRAY = 8, 9
_SCALARS = {  # type number -> struct code
  0: "B",
  1: "b",
  2: "H",
  3: "h",
  4: "I",
  5: "i",
  6: "f",
  7: "?",
  10: "Q",
  11: "q",
  12: "d",
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """What the header says of one tensor; nothing of it is checked yet.

  Attributes:
    type: number of its ggml type.
    shape: as NumPy sees it, the reverse of the file's order.
    offset: bytes from the start of the data.
  """

  type: int
  shape: tuple[int, ...]
  offset: int


@dataclasses.dataclass(frozen=True)
class Header:
  """A header, walked to its end.

  Attributes:
    metadata: key -> number, bool, string or list of them.
    tensors: name -> TensorInfo, in the order of the file.
    data_start: byte of the file at which the data begins.
    alignment: bytes; every tensor begins at a multiple, counted in the data.
    file_size: bytes.
  """

  metadata: Mapping[str, Any]
  tensors: Mapping[str, TensorInfo]
  data_start: int
  alignment: int
  file_size: int


def read(path: str | os.PathLike) -> Header:
  """Walks the header of a GGUF file.

  Raises:
    BadFileError: no such file, not GGUF, or its header is cut off or damaged.
  """
  with files.opened(path) as file:
    return _Walk(os.fspath(path), file).header()


def damaged(path: str, why: str) -> errors.BadFileError:
  """The error for a file that contradicts itself."""
  return errors.BadFileError(f"{path} is damaged: {why}. Fetch it again.")


class _Walk:
  """Reads a header front to back."""

  def __init__(self, path: str, file: BinaryIO):
    self._path = path
    self._file = file
    self._size = os.fstat(file.fileno()).st_size
    self._at = 0
    self._items = 0

  def header(self) -> Header:
    if self._size == 0:
      raise errors.BadFileError(f"{self._path} is empty.")
    magic = self._take(4, "its first word")
    if magic != MAGIC:
      raise errors.BadFileError(
        f"{self._path} is not a GGUF file: it starts with {magic!r}."
      )
    self._check_version(self._number("I"))
    num_tensors, num_keys = self._number("Q"), self._number("Q")
    if max(num_tensors, num_keys) > _MAX_ENTRIES:
      raise self._damaged(f"it claims {num_tensors} tensors, {num_keys} keys")
    # The least that an entry takes: an empty name, its type, a byte of value;
    # for a tensor an empty name, one dimension, its type and offset.
    self._room(num_keys * 13, f"{num_keys} metadata keys")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
      key = self._name()
      if key in metadata:
        raise self._damaged(f"the key {key} occurs twice")
      metadata[key] = self._value(key)
    self._room(num_tensors * 32, f"{num_tensors} tensors")
    tensors: dict[str, TensorInfo] = {}
    for _ in range(num_tensors):
      name = self._name()
      if name in tensors:
        raise self._damaged(f"the tensor {name} occurs twice")
      tensors[name] = self._tensor_info(name)
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1 or align & (align - 1):
      raise self._damaged("general.alignment is no power of 2")
    start = -(-self._at // align) * align
    return Header(metadata, tensors, start, align, self._size)

  def _check_version(self, version: int) -> None:
    if version in _VERSIONS:
      return
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    big = swapped in _VERSIONS
    what = "a big-endian GGUF file" if big else f"GGUF version {version}"
    raise errors.BadFileError(
      f"{self._path} is {what}; little-endian versions 2 and 3 are read."
    )

  def _tensor_info(self, name: str) -> TensorInfo:
    num_dims = self._number("I")
    if not 1 <= num_dims <= _MAX_DIMS:
      raise self._damaged(f"the tensor {name} has {num_dims} dimensions")
    dims = self._numbers("Q", num_dims, name)
    return TensorInfo(self._number("I"), tuple(dims[::-1]), self._number("Q"))

  def _value(self, key: str) -> Any:
    kind = self._number("I")
    if kind == _STRING:
      return self._text(self._number("Q"), key)
    if kind != _ARRAY:
      return self._number(self._code(kind, key))
    kind, count = self._number("I"), self._number("Q")
    self._items += count
    if self._items > _MAX_ITEMS:
      raise self._damaged(f"its arrays claim {self._items} items up to {key}")
    if kind == _STRING:
      # Eight bytes say the length of each.
      self._room(count * 8, f"{count} strings of {key}")
      return [self._text(self._number("Q"), key) for _ in range(count)]
    return self._numbers(self._code(kind, key), count, key)

  def _code(self, kind: int, key: str) -> str:
    if kind not in _SCALARS:
      raise self._damaged(f"the key {key} has the unknown type {kind}")
    return _SCALARS[kind]

  def _name(self) -> str:
    length = self._number("Q")
    if length > _MAX_NAME_BYTES:
      raise self._damaged(f"a name claims {length} bytes")
    name = self._text(length, "a name")
    # Messages quote names: no line ends or terminal codes in them.
    if not name.isprintable():
      raise self._damaged(f"a name is {name[:40]!r}")
    return name

  def _text(self, length: int, what: str) -> str:
    try:
      return self._take(length, what).decode()
    except UnicodeDecodeError:
      raise self._damaged(f"{what} is not UTF-8") from None

  def _number(self, code: str) -> Any:
    form = "<" + code
    return struct.unpack(form, self._take(struct.calcsize(form), "a number"))[0]

  def _numbers(self, code: str, count: int, what: str) -> list[Any]:
    size = count * struct.calcsize("<" + code)
    self._room(size, f"{count} numbers of {what}")
    return list(struct.unpack(f"<{count}{code}", self._take(size, what)))

  def _take(self, count: int, what: str) -> bytes:
    self._room(count, what)
    found = self._file.read(count)
    if len(found) != count:
      raise self._damaged("it shrank while it was read")
    self._at += count
    return found

  def _room(self, count: int, what: str) -> None:
    """Refuses to go on if the rest of the file is shorter than count."""
    if count > self._size - self._at:
      raise errors.BadFileError(
        f"{self._path} is cut off or damaged: at byte {self._at}, {what} should"
        f" reach byte {self._at + count} or beyond, the file has {self._size}."
        " Fetch it again."
      )
    if self._at + count > _MAX_HEADER_BYTES:
      raise self._damaged(
        f"{what} would make its header {_MAX_HEADER_BYTES} bytes long or more"
      )

  def _damaged(self, why: str) -> errors.BadFileError:
    return damaged(self._path, f"{why} (before byte {self._at})")
