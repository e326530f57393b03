"""Packed rows on disk: a folder that tensorflow-datasets opens too.

  dataset_info.json, features.json     what tfds.builder_from_directory reads
  rows-SOURCE.array_record-00000 ...   training rows, a split of each source
  rows-SOURCE_heldout.array_record-... rows of documents that are held out
  tokenizer/                           as `load_tokenizer` reads it
  report.json                          what was counted, and the config

A record is a row as `packing` makes them. Its arrays are stored as bytes,
which are read ten times as fast as lists of numbers. While it is written, the
folder lies in .NAME.unfinished beside its place.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import re
import resource
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax import errors
from llama_jax.text import files

REPORT = "report.json"
TOKENIZER = "tokenizer"
HELDOUT = "_heldout"
_NAME = "rows"
_SHARD = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
_FORMAT = "array_record"
# Rows are read one at a time, in any order.
_OPTIONS = "group_size:1,zstd:1"
_reader: int | None = None  # the process whose array_record has threads


def _features(row_length: int):
  """What tfds is told of a row."""
  import tensorflow_datasets as tfds

  def array(size: int | None, dtype):
    return tfds.features.Tensor(shape=(size,), dtype=dtype, encoding="bytes")

  tokens = {
    name: array(row_length + 1, np.int32)
    for name in ("tokens", "segments", "positions")
  }
  return {**tokens, "documents": array(None, np.int64)}


def _record(row: dict[str, np.ndarray]) -> bytes:
  """A row as the tf.train.Example that tfds writes of it, keys in order.

  protobuf's own order of keys is another in each process, and the same text
  is to give the same bytes.
  """
  entries = b""
  for name in sorted(row):
    values = _field(1, row[name].astype(row[name].dtype.newbyteorder("<")))
    feature = _field(1, values)  # a BytesList
    entries += _field(1, _field(1, name.encode()) + _field(2, feature))
  return _field(1, entries)


def _field(number: int, content: bytes | np.ndarray) -> bytes:
  """A field of a protobuf message, its length before it."""
  content = bytes(content)
  size = len(content)
  head = [number << 3 | 2]
  while size > 0x7F:
    head.append(size & 0x7F | 0x80)
    size >>= 7
  return bytes((*head, size)) + content


def shard_name(split: str, number: int) -> str:
  return f"{_NAME}-{split}.{_FORMAT}-{number:05d}"


def write_shard(
  path: pathlib.Path, rows: Iterable[dict[str, np.ndarray]]
) -> None:
  """Writes rows whole or not at all; on the disk when it returns."""
  from array_record.python import array_record_module

  part = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    writer = array_record_module.ArrayRecordWriter(str(part), _OPTIONS)
    try:
      for row in rows:
        writer.write(_record(row))
    finally:
      writer.close()
    with open(part, "rb") as file:
      os.fsync(file.fileno())
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)


@contextlib.contextmanager
def unfinished(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """The folder to fill; it becomes `out` when the block ends well.

  Otherwise it stays, if it holds anything for the next call to go on with.

  Raises:
    UserError: another process fills it, or out is there.
  """
  out = out.absolute()
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise errors.UserError(
      f"--out={out} exists and is not an empty folder; name another or remove"
      " it."
    )
  room = out.with_name(f".{out.name}.unfinished")
  content = room / "content"
  content.mkdir(parents=True, exist_ok=True)
  with open(room / "lock", "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise errors.UserError(
        f"--out={out} is being written by another process; wait for it, or"
        " name another folder."
      ) from None
    try:
      yield content
    except Exception:
      if not any(content.iterdir()):
        shutil.rmtree(room)
      raise
    if out.exists():
      out.rmdir()
    content.rename(out)
    shutil.rmtree(room)


def finish(
  folder: pathlib.Path,
  splits: Mapping[str, Sequence[int]],
  report: Mapping[str, Any],
) -> None:
  """Makes a dataset of the shards in a folder; removes what is not of it.

  splits: name -> rows of each of its shards.
  """
  import tensorflow_datasets as tfds

  named = {TOKENIZER}
  infos = []
  for split, lengths in splits.items():
    names = [shard_name(split, number) for number in range(len(lengths))]
    named |= set(names)
    template = tfds.core.ShardedFileTemplate(
      data_dir=folder,
      template=_SHARD,
      dataset_name=_NAME,
      split=split,
      filetype_suffix=_FORMAT,
    )
    infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=list(lengths),
        num_bytes=sum((folder / name).stat().st_size for name in names),
        filename_template=template,
      )
    )
  for path in folder.iterdir():
    if path.name not in named:
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=_features(report["row_length"]),
    split_infos=infos,
    filename_template=_SHARD,
    check_data=False,
    description="Token rows for llama_jax; report.json says of what.",
  )
  files.write_json(folder / REPORT, report)


class Source:
  """Rows of one split by number; from any thread, pickled with its place.

  Raises:
    BadFileError: a row is damaged.
    RuntimeError: this process was forked from one that had read.
  """

  def __init__(self, folder: pathlib.Path, split: str, length: int):
    self._folder = folder
    self._split = split
    self._length = length
    self._rows = None
    self._lock = threading.Lock()

  def __getstate__(self):
    return (self._folder, self._split, self._length)

  def __setstate__(self, state):
    self.__init__(*state)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    index = int(index)
    if not 0 <= index < self._length:
      raise IndexError(f"row {index} of {self._length}")
    _refuse_fork()
    rows = self._open()
    try:
      return rows[index]
    except (OSError, RuntimeError, ValueError, LookupError) as error:
      raise errors.BadFileError(
        f"{self._folder}: row {index} of {self._split} cannot be read"
        f" ({error}); a shard is damaged. Prepare the folder again."
      ) from error

  def _open(self):
    if self._rows is None:
      with self._lock:
        if self._rows is None:
          import tensorflow_datasets as tfds

          try:
            builder = tfds.builder_from_directory(self._folder)
            self._rows = builder.as_data_source(self._split)
          except Exception as error:  # of many kinds, protobuf's among them
            raise errors.BadFileError(
              f"{self._folder}: split {self._split} cannot be opened"
              f" ({type(error).__name__}: {error}); dataset_info.json or"
              " features.json is damaged. Copy or prepare the folder again."
            ) from error
    return self._rows


def _refuse_fork() -> None:
  global _reader
  _reader = _reader or os.getpid()
  if _reader != os.getpid():
    raise RuntimeError(
      "rows were read before this process was forked, and array_record does"
      " not survive that; start processes with spawn, or read with threads."
    )


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What a prepared folder holds.

  Attributes:
    row_length: R; rows have R + 1 tokens.
    sources: name -> training rows, in the order of the config.
    heldout: name -> rows that are held out, where there are any.
    report: what was counted, and the config it was made with.
  """

  folder: pathlib.Path
  row_length: int
  vocab_size: int
  sources: Mapping[str, Source]
  heldout: Mapping[str, Source]
  report: Mapping[str, Any]

  @property
  def tokenizer(self) -> pathlib.Path:
    """The folder of the tokenizer that it was made with."""
    return self.folder / TOKENIZER


def read(folder: str | os.PathLike) -> Prepared:
  """Opens what `prepare` wrote; rows are read when they are asked for.

  Raises:
    BadFileError: it is no such folder, or a shard is missing or cut off.
  """
  folder = pathlib.Path(folder).expanduser().absolute()
  for name in (REPORT, "dataset_info.json", "features.json"):
    if not (folder / name).is_file():
      raise errors.BadFileError(
        f"{folder} is no prepared folder (it has no {name}); make one with"
        " python -m llama_jax.prepare --config=configs/data/... --out=DIR."
      )
  report = files.read_json(folder / REPORT)
  try:
    splits = {"train": {}, "heldout": {}}
    opened = 0
    for name, counted in report["sources"].items():
      for kind, found in splits.items():
        shards = counted[kind]["shards"]
        split = name + (HELDOUT if kind == "heldout" else "")
        for number, shard in enumerate(shards):
          path = folder / shard_name(split, number)
          size = path.stat().st_size if path.is_file() else None
          if size != shard["bytes"]:
            raise errors.BadFileError(
              f"{path} has {size or 'no'} bytes, not {shard['bytes']}; it is"
              " missing or cut off. Copy or prepare the folder again."
            )
        opened += len(shards)
        if shards:
          found[name] = Source(
            folder, split, sum(shard["rows"] for shard in shards)
          )
    _allow_open(opened, folder)
    return Prepared(
      folder,
      int(report["row_length"]),
      int(report["vocab_size"]),
      splits["train"],
      splits["heldout"],
      report,
    )
  except (AttributeError, KeyError, TypeError) as error:
    raise errors.BadFileError(
      f"{folder / REPORT} is not what prepare writes ({error!r}); prepare the"
      " folder again."
    ) from error


def _allow_open(shards: int, folder: pathlib.Path) -> None:
  """Lets this process hold all shards open: readers are never closed."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = shards + 256
  if hard != resource.RLIM_INFINITY and needed > hard:
    raise errors.UserError(
      f"{folder} has {shards} shards, more files than this process may open"
      f" (ulimit -Hn is {hard}); raise that, or prepare with a larger"
      " --config.shard_mb."
    )
  if soft != resource.RLIM_INFINITY and needed > soft:
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def is_source_name(name: str) -> bool:
  """Whether a source can be called that: the name becomes one of a split."""
  return bool(re.fullmatch(r"[a-z][a-z0-9_]*", name)) and not (
    name.endswith(HELDOUT) or name == "all"
  )
