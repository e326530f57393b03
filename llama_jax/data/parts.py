"""Text of all sources, read in order and dealt out in parts of a set size.

What is bad is counted, the rest filtered, freed of exact duplicates, and held
out or not by a hash of its text. The parts hang on the input alone.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llama_jax import errors
from llama_jax.data import catalogue, documents, prepared, records, sources

_NAMED_BAD = 20  # of a source, in the report


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """Where the text of one source is.

  Attributes:
    paths: files and folders, with commas between; or the name or the folder
      of a dataset of tensorflow-datasets.
    format: "jsonl", "text", "parquet", "" for by suffix, or "tfds".
    field: key of the text in JSONL, Parquet and tfds.
    split: of a tfds dataset.
  """

  paths: str
  format: str
  field: str
  split: str


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  """What is made of it.

  Attributes:
    tokenizer: its file or folder.
    row_length: tokens of a row; training cuts shorter sequences out of it.
    seed: of infilling.
    heldout: share of the documents, by a hash of their text.
    infill_rate: share of those that are cut for infilling.
    bad_lines: bad lines, rows or files of a source that are skipped.
    max_document_mb: a longer document is a bad one.
    min_characters, max_characters: others are filtered out; 0 is no bound.
    shard_mb: text of a shard; each process holds some three of them.
    workers: processes; 0 takes one for each core.
    sources: name -> where it is; they are read in the order of their names,
      and of exact duplicates the first stays.
  """

  tokenizer: str
  row_length: int
  seed: int
  heldout: float
  infill_rate: float
  bad_lines: int
  max_document_mb: float
  min_characters: int
  max_characters: int
  shard_mb: float
  workers: int
  sources: Mapping[str, SourceConfig]

  def __post_init__(self):
    self._check(bool(self.tokenizer), "tokenizer", "a tokenizer's path")
    self._check(self.row_length >= 2, "row_length", "2 or more")
    self._check(0 <= self.heldout < 1, "heldout", "from 0 to below 1")
    self._check(0 <= self.infill_rate <= 1, "infill_rate", "from 0 to 1")
    for name in ("bad_lines", "min_characters", "max_characters", "workers"):
      self._check(getattr(self, name) >= 0, name, "0 or more")
    for name in ("max_document_mb", "shard_mb"):
      finite = 0 < getattr(self, name) < float("inf")
      self._check(finite, name, "more than 0, and finite")
    if not self.sources:
      raise errors.ConfigError("config.sources is empty; name one or more.")
    for name, source in self.sources.items():
      if not prepared.is_source_name(name):
        raise errors.ConfigError(
          f"config.sources.{name} is no name for a source; use small letters,"
          " digits and _, and neither all nor an end in _heldout."
        )
      if not source.paths:
        raise errors.ConfigError(
          f"config.sources.{name}.paths is empty; give"
          f" --config.sources.{name}.paths=FILE_OR_FOLDER."
        )
      if source.format not in ("", "tfds", *records.FORMATS):
        raise errors.ConfigError(
          f"config.sources.{name}.format={source.format} is not one of"
          f" {', '.join(records.FORMATS)}, tfds, or empty for by suffix."
        )

  def _check(self, right: bool, name: str, allowed: str) -> None:
    if not right:
      raise errors.ConfigError(
        f"config.{name}={getattr(self, name)!r} must be {allowed}."
      )

  def content(self) -> dict[str, Any]:
    """What the rows hang on, as JSON."""
    content = dataclasses.asdict(self)
    del content["workers"]
    return content


class Seen:
  """Which digests have been before, in some 20 bytes each."""

  def __init__(self):
    self._buckets: dict[bytes, bytearray] = {}

  def add(self, digest: bytes) -> bool:
    """Whether this one is new."""
    bucket = self._buckets.setdefault(digest[:2], bytearray())
    rest = digest[2:]
    at = bucket.find(rest)
    while at > 0 and at % len(rest):
      at = bucket.find(rest, at + 1)
    if at < 0:
      bucket += rest
    return at < 0


@dataclasses.dataclass
class Counts:
  """What was met in reading one source; bad_named: the first few, in words."""

  records: int = 0
  duplicates: int = 0
  filtered: int = 0
  bad: int = 0
  passed_over: int = 0
  bad_named: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Part:
  """Documents that make one shard.

  Attributes:
    texts: (index in its source, text) of each.
    digest: of these and of how they are made into rows.
  """

  source: str
  heldout: bool
  number: int
  texts: list[tuple[int, str]]
  digest: str

  @property
  def split(self) -> str:
    return self.source + (prepared.HELDOUT if self.heldout else "")

  @property
  def note(self) -> str:
    """Name of the file that says the shard is done."""
    return f"{prepared.shard_name(self.split, self.number)}.json"


class _Open:
  """A part that is being filled."""

  def __init__(self, made_by: bytes):
    self.texts: list[tuple[int, str]] = []
    self.bytes = 0
    self._hash = hashlib.blake2b(made_by, digest_size=documents.DIGEST_BYTES)

  def add(self, index: int, text: str, digest: bytes, size: int) -> None:
    self.texts.append((index, text))
    self.bytes += size
    self._hash.update(index.to_bytes(8, "big") + digest)

  @property
  def digest(self) -> str:
    return self._hash.hexdigest()


class Reader:
  """Deals all sources out in parts, and counts."""

  def __init__(
    self,
    config: PrepareConfig,
    made_by: bytes,
    tick: Callable[[str, int, int], None],
  ):
    self._config = config
    self._made_by = made_by
    self._tick = tick
    self._seen = Seen()
    self.counts = {name: Counts() for name in sorted(config.sources)}

  def parts(self) -> Iterator[Part]:
    for name in sorted(self._config.sources):
      yield from self._source(name, self._config.sources[name])

  def _source(self, name: str, source: SourceConfig) -> Iterator[Part]:
    config, counts = self._config, self.counts[name]
    filling = {heldout: _Open(self._made_by) for heldout in (False, True)}
    made = {heldout: 0 for heldout in filling}

    def close(heldout: bool) -> Part:
      full, filling[heldout] = filling[heldout], _Open(self._made_by)
      made[heldout] += 1
      return Part(name, heldout, made[heldout] - 1, full.texts, full.digest)

    for text in self._texts(name, source):
      index = counts.records
      counts.records += 1
      if text is None:
        counts.bad += 1
        continue
      most = config.max_characters or len(text)
      if not text or not config.min_characters <= len(text) <= most:
        counts.filtered += 1
        continue
      content = text.encode()
      digest = documents.digest(content)
      if not self._seen.add(digest):
        counts.duplicates += 1
        continue
      heldout = documents.is_held_out(digest, config.heldout)
      filling[heldout].add(index, text, digest, len(content))
      if filling[heldout].bytes >= config.shard_mb * 1e6:
        yield close(heldout)
    if not filling[False].texts and not made[False]:
      raise errors.BadFileError(
        f"config.sources.{name}.paths={source.paths} holds no text to train"
        f" on: of {counts.records} records {counts.bad} are bad,"
        f" {counts.filtered} filtered out, {counts.duplicates} duplicates and"
        f" the others held out (config.heldout={config.heldout})."
        f" {' '.join(counts.bad_named)}".rstrip()
      )
    for heldout in filling:
      if filling[heldout].texts:
        yield close(heldout)

  def _texts(self, name: str, source: SourceConfig) -> Iterator[str | None]:
    """A source's records in order, None for a bad one."""
    by_name = {pathlib.Path(path) for path in sources.named(source.paths)}
    files = opened(name, source, int(self._config.max_document_mb * 1e6))
    total = sum(size for _, _, size in files)
    before = 0
    for path, found, size in files:
      for record in found:
        binary = isinstance(record, records.Bad) and record.binary
        if binary and path not in by_name:
          self.counts[name].passed_over += 1
        else:
          yield self._good(name, path, record)
        self._tick(name, before + found.position, total)
      before += size

  def _good(self, name: str, path, record: str | records.Bad) -> str | None:
    if not isinstance(record, records.Bad):
      return record
    counts = self.counts[name]
    if counts.bad >= self._config.bad_lines:
      raise errors.BadFileError(
        f"{record.at(path)} Mend it, or let more than"
        f" config.bad_lines={self._config.bad_lines} of a source be skipped."
      )
    if counts.bad < _NAMED_BAD:
      counts.bad_named.append(record.at(path))
    return None


def opened(
  name: str, source: SourceConfig, limit: int
) -> list[tuple[pathlib.Path, records.Records | catalogue.Records, int]]:
  """(path, its records, its size) of each file of a source, or its dataset.

  Raises:
    UserError: it is not there.
  """
  if source.format == "tfds":
    found = catalogue.Records(source.paths, source.split, source.field, limit)
    return [(pathlib.Path(source.paths), found, len(found))]
  return [
    (
      path,
      records.Records(path, source.format, source.field, limit),
      path.stat().st_size,
    )
    for path in sources.expand(source.paths, f"config.sources.{name}.paths")
  ]
