"""The zip archive that a .pth file is, its tensors read by rows.

torch.save stores data.pkl (torch_pickle.py) and one entry data/KEY for each
storage, uncompressed, so that any numbers of a tensor can be read where they
lie. Nothing is unpacked, and what an honest torch.save never does is refused:
compression, entries that overlap, names that lead elsewhere.

Formats: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT,
https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

import dataclasses
import math
import os
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import torch_pickle
from llama_jax.text import files

# An honest list of entries has some 100 bytes for each tensor.
_MAX_LIST_BYTES = 4 << 20
# Bits of an entry that change nothing here: its sizes follow it; UTF-8.
_HARMLESS = 0x808

# What fills a field too small for its number, and the records of the format.
FULL_16, FULL_32 = 0xFFFF, 0xFFFFFFFF
END = struct.Struct("<4s4H2IH")
END_64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR = struct.Struct("<4sIQI")
ENTRY = struct.Struct("<4s4B4H3I5H2I")
LOCAL = struct.Struct("<4s5H3I2H")


@dataclasses.dataclass(frozen=True)
class Extent:
  """Where an entry's bytes lie in the file.

  Attributes:
    start: of its local header.
    data: of its content.
    size: of its content.
    crc: of its content, or 0 where the writer has left it out.
  """

  start: int
  data: int
  size: int
  crc: int


class Archive:
  """The tensors of a .pth file, unread.

  Attributes:
    path: of the file.
    views: every tensor by name.
  """

  def __init__(self, path: str | os.PathLike):
    """Opens a file; reads its list of entries and its pickle alone.

    Raises:
      BadFileError: it is cut off, damaged, or not what torch.save writes of a
        dict of tensors.
    """
    self.path = os.fspath(path)
    with files.opened(path) as file:
      self._extents = _extents(file, self.path)
      self._check_byte_order(file)
      pickle = self._small(file, "data.pkl", torch_pickle.MAX_BYTES)
    self.views = torch_pickle.load(pickle, f"{self.path}: data.pkl")
    self._check_storages()

  def rows(self, name: str, start: int, stop: int) -> np.ndarray:
    """Rows of axis 0 of a tensor, C-contiguous.

    Raises:
      BadFileError: they cannot be had.
    """
    view = self.views[name]
    shape, strides = (stop - start, *view.shape[1:]), view.strides
    first = view.offset + start * strides[0]
    if not _contiguous(shape[1:], strides[1:]):
      return self._spread(view, first, shape)
    width = math.prod(shape[1:])
    if strides[0] == width or shape[0] == 1:
      return self._numbers(view, first, shape[0] * width).reshape(shape)
    # Columns of a wider tensor.
    found = np.empty((shape[0], width), view.storage.dtype)
    for row in range(shape[0]):
      found[row] = self._numbers(view, first + row * strides[0], width)
    return found.reshape(shape)

  def _spread(
    self, view: torch_pickle.View, first: int, shape: tuple[int, ...]
  ) -> np.ndarray:
    """Numbers that lie far from each other, as those of a transposed tensor."""
    steps = zip(shape, view.strides, strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in steps)
    itemsize = view.storage.dtype.itemsize
    strides = [stride * itemsize for stride in view.strides]
    found = self._numbers(view, first, span)
    return np.ascontiguousarray(
      np.lib.stride_tricks.as_strided(found, shape, strides, writeable=False)
    )

  def _numbers(
    self, view: torch_pickle.View, first: int, count: int
  ) -> np.ndarray:
    """Numbers of a view's storage."""
    dtype = view.storage.dtype
    start = self._extents[f"data/{view.storage.key}"].data
    with files.opened(self.path) as file:
      file.seek(start + first * dtype.itemsize)
      found = np.fromfile(file, dtype, count)
    if found.size != count:
      raise errors.BadFileError(
        f"{self.path} is cut off: {count} numbers are needed at byte"
        f" {start + first * dtype.itemsize}, {found.size} were found."
      )
    return found

  def _small(self, file: BinaryIO, name: str, most: int) -> bytes:
    """The whole of an entry, checked."""
    extent = self._extents.get(name)
    if extent is None:
      raise errors.BadFileError(
        f"{self.path} holds no entry {name}, so torch.save has not written it."
      )
    if extent.size > most:
      raise errors.BadFileError(
        f"{self.path}: {name} has {extent.size} bytes; {most} are allowed."
      )
    file.seek(extent.data)
    content = file.read(extent.size)
    if extent.crc and zlib.crc32(content) != extent.crc:
      raise errors.BadFileError(
        f"{self.path} is damaged: {name} has not the checksum that it had when"
        " it was written. Fetch it again."
      )
    return content

  def _check_byte_order(self, file: BinaryIO) -> None:
    if "byteorder" not in self._extents:
      return  # torch before 2.1
    order = self._small(file, "byteorder", 16)
    if order != b"little":
      raise errors.BadFileError(
        f"{self.path} has the byte order {order!r}; b'little' is supported."
      )

  def _check_storages(self) -> None:
    needed = 0
    seen: dict[str, torch_pickle.Storage] = {}
    for name, view in self.views.items():
      storage = view.storage
      size = storage.length * storage.dtype.itemsize
      extent = self._extents.get(f"data/{storage.key}")
      if extent is None or extent.size != size:
        raise errors.BadFileError(
          f"{self.path}: the tensor {name} is in data/ {storage.key[:40]!r},"
          f" which is to have {size} bytes and"
          f" {'is missing' if extent is None else f'has {extent.size}'}."
        )
      if seen.setdefault(storage.key, storage) != storage:
        raise errors.BadFileError(
          f"{self.path}: the tensor {name} takes data/ {storage.key[:40]!r} for"
          f" {storage.stored}, another tensor for"
          f" {seen[storage.key].stored}."
        )
      _check_span(self.path, name, view)
      needed += math.prod(view.shape) * storage.dtype.itemsize
    total = sum(self._extents[f"data/{key}"].size for key in seen)
    # A tied head may be the embedding again.
    if needed > 2 * total:
      raise errors.BadFileError(
        f"{self.path}: its tensors repeat each other's numbers ({needed} bytes"
        f" of {total}), which no Llama's do."
      )


def _check_span(path: str, name: str, view: torch_pickle.View) -> None:
  """Refuses what would make little of a large reading."""
  pairs = list(zip(view.shape, view.strides, strict=True))
  if _contiguous(view.shape[1:], view.strides[1:]):
    return
  span = 1 + sum((size - 1) * stride for size, stride in pairs)
  count = math.prod(view.shape)
  if span > 2 * count:
    raise errors.BadFileError(
      f"{path}: the tensor {name} {list(view.shape)} lies scattered over {span}"
      " numbers; save it after tensor.contiguous()."
    )


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
  """Whether a tensor's numbers follow each other."""
  step = 1
  for size, stride in zip(reversed(shape), reversed(strides), strict=True):
    if size != 1 and stride != step:
      return False
    step *= size
  return True


def _extents(file: BinaryIO, path: str) -> dict[str, Extent]:
  """The entries by their names within the archive's one folder."""
  size = file.seek(0, os.SEEK_END)

  def damaged(what: str) -> errors.BadFileError:
    return errors.BadFileError(
      f"{path} ({size} bytes) is damaged or cut off: {what}. Fetch it again."
    )

  def part(offset: int, count: int) -> bytes:
    if offset < 0 or offset + count > size:
      raise damaged(f"it should have {count} bytes at {offset}")
    file.seek(offset)
    return file.read(count)

  if size < 4 or part(0, 4) != b"PK\3\4":
    raise errors.BadFileError(
      f"{path} is no zip archive, which torch writes since 1.6 (2020). If it is"
      " an older file that you trust, have torch write it anew:"
      " torch.save(torch.load(FILE, weights_only=True), NEW)."
    )
  count, list_size, list_start = _find_list(part, size, damaged)
  if list_size > _MAX_LIST_BYTES or count * ENTRY.size > list_size:
    raise damaged(f"its list of {count} entries has {list_size} bytes")
  listed = part(list_start, list_size)
  extents: dict[str, Extent] = {}
  folders = set()
  for whole, extent in _entries(listed, count, part, damaged):
    folder, _, name = whole.partition("/")
    if (
      not whole.isprintable()
      or not name
      or "\\" in whole
      or {"", ".", ".."} & set(whole.split("/"))
    ):
      raise damaged(f"it holds an entry of the name {whole[:60]!r}")
    if name in extents:
      raise damaged(f"it holds the entry {whole[:60]!r} twice")
    folders.add(folder)
    extents[name] = extent
  if len(folders) > 1:
    raise damaged("its entries are not of one folder")
  end = 0
  for extent in sorted(extents.values(), key=lambda extent: extent.start):
    if extent.start < end:
      raise damaged("its entries overlap")
    end = extent.data + extent.size
  if end > list_start:
    raise damaged("its entries overlap their list")
  return extents


def _find_list(part, size: int, damaged) -> tuple[int, int, int]:
  """(entries, bytes, offset) of the list at the archive's end."""
  # A comment may follow the record; torch writes none.
  at = size - END.size
  signature, disk, first_disk, here, count, list_size, list_start, _ = (
    END.unpack(part(at, END.size))
  )
  if signature != b"PK\5\6":
    raise damaged("the list of its entries is not at its end")
  if FULL_16 in (here, count) or FULL_32 in (list_size, list_start):
    locator = LOCATOR.unpack(part(at - LOCATOR.size, LOCATOR.size))
    if locator[0] != b"PK\6\7":
      raise damaged("its end record lacks the large offsets")
    at = locator[2]
    signature, *_, disk, first_disk, here, count, list_size, list_start = (
      END_64.unpack(part(at, END_64.size))
    )
    if signature != b"PK\6\6":
      raise damaged("its large end record is not where it should be")
  if disk or first_disk or here != count or list_start + list_size > at:
    raise damaged("its end record contradicts itself")
  return count, list_size, list_start


def _entries(
  listed: bytes, count: int, part, damaged
) -> Iterator[tuple[str, Extent]]:
  at = 0
  for _ in range(count):
    if at + ENTRY.size > len(listed):
      raise damaged("its list of entries is too short")
    (
      signature, _, _, _, _, flags, method, _, _, crc, packed, size,
      name_size, extra_size, comment_size, disk, _, _, start,
    ) = ENTRY.unpack_from(listed, at)  # fmt: skip
    at += ENTRY.size
    raw_name = listed[at : at + name_size]
    extra = listed[at + name_size : at + name_size + extra_size]
    at += name_size + extra_size + comment_size
    if signature != b"PK\1\2" or at > len(listed):
      raise damaged("its list of entries is malformed")
    wide = iter(_large_numbers(extra))
    try:
      # In this order, and only those that have no room above.
      size = next(wide) if size == FULL_32 else size
      packed = next(wide) if packed == FULL_32 else packed
      start = next(wide) if start == FULL_32 else start
      name = raw_name.decode()
    except (StopIteration, UnicodeDecodeError):
      raise damaged("an entry of its list is malformed") from None
    if method or flags & ~_HARMLESS or size != packed or disk:
      raise damaged(
        f"its entry {name[:60]!r} is compressed, encrypted or elsewhere, which"
        " torch.save never does"
      )
    local = part(start, LOCAL.size + name_size)
    signature, _, _, local_method, *_, local_name_size, local_extra_size = (
      LOCAL.unpack_from(local)
    )
    if (
      signature != b"PK\3\4"
      or local_method
      or local_name_size != name_size
      or local[LOCAL.size :] != raw_name
    ):
      raise damaged(f"its entry {name[:60]!r} is not where it should be")
    # The local header may be padded otherwise than the list says.
    data = start + LOCAL.size + name_size + local_extra_size
    part(data + size, 0)
    yield name, Extent(start, data, size, crc)


def _large_numbers(extra: bytes) -> list[int]:
  """The 64-bit numbers of an entry's extra field, if it has some."""
  at = 0
  while at + 4 <= len(extra):
    kind, size = struct.unpack_from("<2H", extra, at)
    body = extra[at + 4 : at + 4 + size]
    if kind == 1:
      return [
        int.from_bytes(body[i : i + 8], "little")
        for i in range(0, len(body) - 7, 8)
      ]
    at += 4 + size
  return []
