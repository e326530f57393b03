"""A .pth file of known tensors while it is being written.

The tensors' shapes fix every byte but the numbers and their checksums, so
tensors can be written in any order, each in blocks of rows, and one that is
whole stays so if the process ends. The bytes are laid out as torch does
(torch_zip.py).
"""

import itertools
import math
import operator
import pathlib
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoint import building, torch_pickle, torch_zip, weights

_FOLDER = "consolidated"
_ALIGNMENT = 64
_VERSION = 45  # of the format, which large sizes ask for
_DAY = 0x21  # 1 January 1980: the first there is
# From here on a number goes where there is room for 64 bits.
_LARGE = torch_zip.FULL_32


class Draft:
  """Of use in a with statement, whose end closes the file."""

  def __init__(self, path: pathlib.Path, tensors: Mapping[str, weights.Tensor]):
    """Opens the file; one that is there keeps its bytes.

    Args:
      path: of the file.
      tensors: what it will hold, in their order.
    """
    self._path = path
    views, sizes = {}, {}
    for number, (name, tensor) in enumerate(tensors.items()):
      length = math.prod(tensor.shape)
      storage = torch_pickle.Storage(str(number), tensor.stored, length)
      steps = itertools.accumulate(tensor.shape[:0:-1], operator.mul, initial=1)
      strides = tuple(steps)[::-1]
      views[name] = torch_pickle.View(storage, 0, tensor.shape, strides)
      sizes[f"data/{number}"] = tensor.num_bytes
    # torch looks for its pickle at the beginning.
    small = {
      "data.pkl": torch_pickle.dump(views),
      "byteorder": b"little",
      "version": b"3\n",
    }
    self._entries = {name: f"data/{i}" for i, name in enumerate(tensors)}
    self._extents: dict[str, torch_zip.Extent] = {}
    at = 0
    for entry, size in {
      **{k: len(v) for k, v in small.items()},
      **sizes,
    }.items():
      data = at + len(_local_header(entry, at, size, 0))
      self._extents[entry] = torch_zip.Extent(at, data, size, 0)
      at = data + size
    self._list_start = at
    # Checksums change no length.
    size = at + len(self._list(dict.fromkeys(self._extents, 0)))
    self._file = building.RowFile(path, size)
    self._written: dict[str, tuple[int, int]] = {}
    for entry, content in small.items():
      self._append(entry, content)

  def append(self, name: str, rows: np.ndarray) -> None:
    """Writes the next rows of a tensor, C-contiguous."""
    self._append(self._entries[name], rows.reshape(-1).view(np.uint8).data)

  def finish(self) -> None:
    """Writes what makes a file of the tensors, which are all there."""
    checksums = {}
    with self._path.open("rb") as file:
      for entry, extent in self._extents.items():
        file.seek(extent.start)
        header = torch_zip.LOCAL.unpack(file.read(torch_zip.LOCAL.size))
        checksums[entry] = header[6]
    self._file.write(self._list(checksums), self._list_start)

  def _append(self, entry: str, content: Any) -> None:
    extent = self._extents[entry]
    done, crc = self._written.get(entry, (0, 0))
    self._file.write(content, extent.data + done)
    done, crc = done + len(content), zlib.crc32(content, crc)
    self._written[entry] = done, crc
    if done == extent.size:
      header = _local_header(entry, extent.start, extent.size, crc)
      self._file.write(header, extent.start)

  def _list(self, checksums: Mapping[str, int]) -> bytes:
    """The end of the archive: its entries, and where their list is."""
    parts = []
    for entry, extent in self._extents.items():
      parts.append(_listed(entry, extent, checksums[entry]))
    size, start, count = sum(map(len, parts)), self._list_start, len(parts)
    if start + size < _LARGE and count < torch_zip.FULL_16:
      end = (b"PK\5\6", 0, 0, count, count, size, start, 0)
      return b"".join((*parts, torch_zip.END.pack(*end)))
    large = torch_zip.END_64.pack(
      b"PK\6\6", torch_zip.END_64.size - 12, _VERSION, _VERSION, 0, 0,
      count, count, size, start,
    )  # fmt: skip
    locator = torch_zip.LOCATOR.pack(b"PK\6\7", 0, start + size, 1)
    full = (torch_zip.FULL_16,) * 2 + (torch_zip.FULL_32,) * 2
    end = torch_zip.END.pack(b"PK\5\6", 0, 0, *full, 0)
    return b"".join((*parts, large, locator, end))

  def __enter__(self) -> "Draft":
    return self

  def __exit__(self, *error) -> None:
    self._file.__exit__(*error)


def _local_header(entry: str, start: int, size: int, crc: int) -> bytes:
  """What precedes an entry's content, padded so that that is aligned."""
  name = f"{_FOLDER}/{entry}".encode()
  extra = b""
  if size >= _LARGE:
    extra = struct.pack("<2H2Q", 1, 16, size, size)
  unpadded = start + torch_zip.LOCAL.size + len(name) + len(extra) + 4
  padding = -unpadded % _ALIGNMENT
  extra += b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
  short = _short(size)
  fixed = torch_zip.LOCAL.pack(
    b"PK\3\4", _VERSION, 0, 0, 0, _DAY, crc, short, short,
    len(name), len(extra),
  )  # fmt: skip
  return fixed + name + extra


def _listed(entry: str, extent: torch_zip.Extent, crc: int) -> bytes:
  """An entry's line in the list at the end."""
  name = f"{_FOLDER}/{entry}".encode()
  large = [extent.size] * 2 if extent.size >= _LARGE else []
  large += [extent.start] if extent.start >= _LARGE else []
  extra = b""
  if large:
    extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large)
  size = _short(extent.size)
  line = torch_zip.ENTRY.pack(
    b"PK\1\2", _VERSION, 0, _VERSION, 0, 0, 0, 0, _DAY, crc, size, size,
    len(name), len(extra), 0, 0, 0, 0, _short(extent.start),
  )  # fmt: skip
  return line + name + extra


def _short(number: int) -> int:
  """What stands where there is room for 32 bits."""
  return number if number < _LARGE else torch_zip.FULL_32
