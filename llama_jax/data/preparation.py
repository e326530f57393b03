"""Parts of text into packed rows on disk, by all processes there are.

One process deals the text out (`parts`). A part becomes one shard, by whichever
process is free: tokenized, infilled, packed by itself. So the shards are the
same for any number of processes, and one that is done, and was made of the
same text in the same way, is not done again.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from llama_jax import cores, errors
from llama_jax import text as text_lib
from llama_jax.data import documents, packing, prepared, processes
from llama_jax.data import parts as parts_lib
from llama_jax.text import files

# Rows made otherwise than before must change it: what is left of an earlier
# call is taken for done by this and the text.
_MADE_BY = 1


class Maker:
  """Makes parts into shards."""

  def __init__(self, config: parts_lib.PrepareConfig, folder: pathlib.Path):
    self._config = config
    self._folder = folder
    self.tokenizer = text_lib.load_tokenizer(config.tokenizer)

  def work(
    self, part: parts_lib.Part | None
  ) -> tuple[Any, dict[str, Any]] | None:
    """A part's (split, number) and note; of None the tokenizer is saved."""
    if part is None:
      self.tokenizer.save(self._folder / prepared.TOKENIZER)
      return None
    return (part.split, part.number), self.make(part)

  def make(self, part: parts_lib.Part) -> dict[str, Any]:
    """Writes a part's shard, then its note, which is what is returned."""
    config = self._config
    encoder = documents.Encoder(
      self.tokenizer,
      config.row_length,
      # What is held out is measured on as it is.
      0.0 if part.heldout else config.infill_rate,
      config.seed,
    )
    counted = {
      "digest": part.digest,
      "documents": len(part.texts),
      "text_bytes": 0,
      "tokens": 0,
      "rows": 0,
      "used": 0,
    }

    def encoded() -> Iterator[packing.Document]:
      for index, text in part.texts:
        document = encoder.document(text, index, part.source)
        counted["text_bytes"] += len(text.encode())
        counted["tokens"] += len(document.ids)
        yield document

    def rows() -> Iterator[dict[str, np.ndarray]]:
      for row in packing.pack(encoded(), config.row_length):
        counted["rows"] += 1
        counted["used"] += int(np.count_nonzero(row["segments"]))
        yield row

    shard = self._folder / prepared.shard_name(part.split, part.number)
    prepared.write_shard(shard, rows())
    counted |= {
      "psm": encoder.psm,
      "spm": encoder.spm,
      "bytes": shard.stat().st_size,
    }
    files.write_json(self._folder / part.note, counted)
    return counted

  def made(self, part: parts_lib.Part) -> dict[str, Any] | None:
    """The note of a part that an earlier call has made into its shard."""
    note = self._folder / part.note
    shard = self._folder / prepared.shard_name(part.split, part.number)
    if not note.exists() or not shard.exists():
      return None
    counted = files.read_json(note)
    whole = counted.get("bytes") == shard.stat().st_size
    return counted if whole and counted["digest"] == part.digest else None


def _make_all(
  parts: Iterator[parts_lib.Part],
  config: parts_lib.PrepareConfig,
  folder: pathlib.Path,
  tell: Callable[[int], None],
) -> dict[tuple[str, int], dict[str, Any]]:
  """(split, number) -> note of every part; tell hears of the new tokens."""
  maker = Maker(config, folder)
  notes: dict[tuple[str, int], dict[str, Any]] = {}

  def left() -> Iterator[parts_lib.Part | None]:
    # Saving takes as long as a part does.
    yield None
    for part in parts:
      counted = maker.made(part)
      if counted is None:
        yield part
      else:
        notes[part.split, part.number] = counted

  workers = config.workers or cores.usable()
  with contextlib.ExitStack() as stack:
    if workers == 1:
      made = map(maker.work, left())
    else:
      pool = processes.Pool(
        workers,
        Maker,
        (config, folder),
        "the same command goes on. Take fewer --config.workers or a smaller"
        " --config.shard_mb.",
      )
      made = stack.enter_context(pool).map(Maker.work, left())
    for found in made:
      if found is not None:
        key, counted = found
        notes[key] = counted
        tell(counted["tokens"])
  return notes


def fingerprint(tokenizer: text_lib.Tokenizer) -> str:
  """A hash of all that a tokenizer is."""
  whole = hashlib.sha256()
  model = tokenizer.model_file()
  if model is None:
    with tempfile.TemporaryDirectory() as folder:
      tokenizer.save(folder)
      for path in sorted(pathlib.Path(folder).rglob("*.json")):
        whole.update(path.read_bytes())
  else:
    # Saving Llama 3's takes seconds; these say the same.
    rest = (tokenizer.special_tokens, tokenizer.eos_id, tokenizer.add_bos)
    whole.update(model + repr(rest).encode())
  return whole.hexdigest()


def prepare(
  config: parts_lib.PrepareConfig,
  out: pathlib.Path,
  tick: Callable[[str, int, int], None] = lambda name, position, total: None,
  tell: Callable[[int], None] = lambda tokens: None,
) -> Mapping[str, Any]:
  """Makes the folder `out`, or goes on with it; its report.

  Args:
    tick: told of (source, what has been read of it, its size).
    tell: told of new tokens as they are made.

  Raises:
    ConfigError: out was made with another config, or the tokenizer does not
      serve.
    BadFileError: more is bad than config.bad_lines, or a source is empty.
  """
  tokenizer = text_lib.load_tokenizer(config.tokenizer)
  documents.Encoder(tokenizer, config.row_length, config.infill_rate)
  content = config.content()
  made_of = {"config": content, "tokenizer": fingerprint(tokenizer)}
  if (out / prepared.REPORT).exists():
    report = prepared.read(out).report
    _check_same(report, made_of, out)
    return report
  # What is not there is missed now, not hours later.
  for name, source in config.sources.items():
    parts_lib.opened(name, source, 0)
  made_by = {
    **{key: content[key] for key in ("row_length", "seed", "infill_rate")},
    "tokenizer": made_of["tokenizer"],
    "version": _MADE_BY,
  }
  with prepared.unfinished(out) as folder:
    reader = parts_lib.Reader(config, json.dumps(made_by).encode(), tick)
    notes = _make_all(reader.parts(), config, folder, tell)
    report = {
      **made_of,
      "row_length": config.row_length,
      "vocab_size": tokenizer.vocab_size,
      "sources": {
        name: _report(name, counts, notes)
        for name, counts in reader.counts.items()
      },
    }
    splits = {
      name + suffix: [shard["rows"] for shard in counted[side]["shards"]]
      for name, counted in report["sources"].items()
      for side, suffix in (("train", ""), ("heldout", prepared.HELDOUT))
      if counted[side]["shards"]
    }
    prepared.finish(folder, splits, report)
  return report


def _report(name: str, counts: parts_lib.Counts, notes) -> dict[str, Any]:
  """What is known of a source: of its text, and of each side's rows."""
  report = dataclasses.asdict(counts)
  for side, split in (("train", name), ("heldout", name + prepared.HELDOUT)):
    own = [notes[key] for key in sorted(notes) if key[0] == split]
    summed = {
      key: sum(note[key] for note in own)
      for key in ("documents", "text_bytes", "tokens", "rows", "psm", "spm")
    }
    used = sum(note["used"] for note in own)
    report[side] = {
      **summed,
      "used": used,
      "shards": [{k: note[k] for k in ("rows", "bytes")} for note in own],
    }
  return report


def _check_same(
  report: Mapping[str, Any], made_of: Mapping[str, Any], out: pathlib.Path
) -> None:
  made_of = json.loads(json.dumps(made_of))
  for key, value in made_of["config"].items():
    was = report["config"].get(key)
    if was != value:
      raise errors.ConfigError(
        f"--out={out} is there, made with config.{key}={was!r}, not"
        f" {value!r}; name another folder or remove it."
      )
  if report["tokenizer"] != made_of["tokenizer"]:
    raise errors.ConfigError(
      f"--out={out} is there, made with another tokenizer than"
      f" {made_of['config']['tokenizer']} holds now; name another folder or"
      " remove it."
    )
