"""Text to rows: what is kept, where it goes, the same however it is made."""

import collections
import dataclasses
import gzip
import hashlib
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llama_jax import errors, text
from llama_jax.data import parts, preparation, prepared

ROOT = pathlib.Path(__file__).parents[2]


def source(paths, **given):
  return parts.SourceConfig(
    **{
      "paths": str(paths),
      "format": "",
      "field": "text",
      "split": "train",
      **given,
    }
  )


def config(tokenizer, sources, **given):
  return parts.PrepareConfig(
    **{
      "tokenizer": str(tokenizer),
      "row_length": 64,
      "seed": 0,
      "heldout": 0.0,
      "infill_rate": 0.0,
      "bad_lines": 0,
      "max_document_mb": 1.0,
      "min_characters": 1,
      "max_characters": 0,
      "shard_mb": 0.02,
      "workers": 1,
      "sources": sources,
      **given,
    }
  )


def write_jsonl(path, texts):
  content = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
  packed = gzip.compress(content, mtime=0)
  path.write_bytes(packed if path.suffix == ".gz" else content)
  return path


def some_texts(python_source, count, seed):
  """Pieces of real text of up to 600 characters, some of them alike."""
  whole = "\n".join(python_source)
  rng = np.random.default_rng(seed)
  starts = rng.integers(0, len(whole) - 600, count)
  texts = [
    whole[s : s + n]
    for s, n in zip(starts, rng.integers(0, 600, count), strict=True)
  ]
  return [texts[i // 2] if i % 7 == 0 else texts[i] for i in range(len(texts))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, python_source):
  """Two sources with duplicates within and between, in several files."""
  folder = tmp_path_factory.mktemp("corpus")
  a = some_texts(python_source, 300, 0)
  b = some_texts(python_source, 200, 1) + a[:50]
  (folder / "b").mkdir()
  write_jsonl(folder / "a.jsonl.gz", a)
  write_jsonl(folder / "b" / "1.jsonl", b[:100])
  write_jsonl(folder / "b" / "2.jsonl", b[100:])
  return folder, {"alpha": a, "beta": b}


def sources_of(folder):
  return {"alpha": source(folder / "a.jsonl.gz"), "beta": source(folder / "b")}


def documents_of(rows):
  """Document -> its tokens, out of all rows of one shard after another."""
  found = collections.defaultdict(list)
  before = None
  for row in (rows[i] for i in range(len(rows))):
    for number, document in enumerate(row["documents"].tolist(), start=1):
      tokens = row["tokens"][row["segments"] == number].tolist()
      # The first of a row may be the last of the row before, once more.
      if number == 1 and document == before:
        assert found[document][-1] == tokens[0]
        tokens = tokens[1:]
      found[document] += tokens
    before = document
  return dict(found)


def folder_bytes(folder):
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def test_rows_hold_what_a_plain_loop_keeps(corpus, tmp_path, tokenizer_folder):
  folder, texts = corpus
  out = tmp_path / "out"
  asked = config(
    tokenizer_folder,
    sources_of(folder),
    heldout=0.2,
    min_characters=20,
    max_characters=500,
  )
  report = preparation.prepare(asked, out)
  tokenizer = text.load_tokenizer(tokenizer_folder)
  data = prepared.read(out)
  assert data.report == json.loads(json.dumps(report))
  seen = set()
  for name, given in texts.items():
    wanted, counts = {}, collections.Counter()
    for index, one in enumerate(given):
      if not 20 <= len(one) <= 500:
        counts["filtered"] += 1
      elif one in seen:
        counts["duplicates"] += 1
      else:
        seen.add(one)
        bos = tokenizer.add_bos
        wanted[index] = (one, tokenizer.encode(one, bos=bos, eos=True))
    train = documents_of(data.sources[name])
    heldout = documents_of(data.heldout[name])
    assert {**train, **heldout} == {i: ids for i, (_, ids) in wanted.items()}
    assert not train.keys() & heldout.keys()
    assert 0.1 < len(heldout) / len(wanted) < 0.3
    counted = report["sources"][name]
    assert counted["records"] == len(given)
    assert counted["filtered"] == counts["filtered"] > 0
    assert counted["duplicates"] == counts["duplicates"] > 0
    assert counted["bad"] == 0
    for side, found in (("train", train), ("heldout", heldout)):
      own = counted[side]
      rows = (data.sources if side == "train" else data.heldout)[name]
      sizes = [len(wanted[i][0].encode()) for i in found]
      assert own["documents"] == len(found)
      assert own["text_bytes"] == sum(sizes)
      assert own["tokens"] == sum(map(len, found.values()))
      assert own["rows"] == len(rows)
      used = sum(int((rows[i]["segments"] > 0).sum()) for i in range(len(rows)))
      assert own["used"] == used
      shards = len(own["shards"])
      # Only the last row of a shard is not full.
      assert used > (len(rows) - shards) * 65
    assert len(counted["train"]["shards"]) > 1


def test_what_is_held_out_is_stable(corpus, tmp_path, tokenizer_folder):
  """By its text alone: neither its place nor other sources matter."""
  folder, texts = corpus
  write_jsonl(tmp_path / "a.jsonl", reversed(texts["alpha"]))
  kept = []
  for number, sources in enumerate(
    (
      {"alpha": source(folder / "a.jsonl.gz")},
      {
        "other": source(folder / "b"),
        "zeta": source(tmp_path / "a.jsonl"),
      },
    )
  ):
    out = tmp_path / str(number)
    asked = config(tokenizer_folder, sources, heldout=0.3, workers=1)
    preparation.prepare(asked, out)
    data = prepared.read(out)
    ids = [
      tuple(ids)
      for rows in data.heldout.values()
      for ids in documents_of(rows).values()
    ]
    kept.append(set(ids))
  assert kept[0] and kept[0] <= kept[1]


def test_any_number_of_workers_writes_the_same(
  corpus, tmp_path, tokenizer_folder
):
  folder, _ = corpus
  written = []
  for workers in (1, 2, 3):
    out = tmp_path / str(workers)
    asked = config(
      tokenizer_folder, sources_of(folder), heldout=0.1, workers=workers
    )
    preparation.prepare(asked, out)
    written.append(folder_bytes(out))
  assert written[0] == written[1] == written[2]
  shards = [name for name in written[0] if "array_record" in name]
  assert len(shards) > 8
  assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
import test_preparation as t
from llama_jax.data import prepared, preparation
write = prepared.write_shard
def slow(*given):
  time.sleep(0.05)
  write(*given)
prepared.write_shard = slow
sources = {{"alpha": t.source({folder!r} + "/a.jsonl.gz"),
            "beta": t.source({folder!r} + "/b")}}
config = t.config({tokenizer!r}, sources, heldout=0.1, workers={workers})
if __name__ == "__main__":
  import pathlib
  preparation.prepare(config, pathlib.Path({out!r}))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_gone_on_with(corpus, tmp_path, tokenizer_folder, workers):
  """SIGKILL; what was done is not done again, and the bytes are the same."""
  folder, _ = corpus
  whole, out = tmp_path / "whole", tmp_path / "out"
  asked = config(tokenizer_folder, sources_of(folder), heldout=0.1)
  preparation.prepare(asked, whole)
  content = tmp_path / ".out.unfinished" / "content"
  script = tmp_path / "run.py"
  script.write_text(
    KILLED.format(
      tests=str(pathlib.Path(__file__).parent),
      folder=str(folder),
      tokenizer=str(tokenizer_folder),
      workers=workers,
      out=str(out),
    )
  )

  def done():
    return {p.name for p in content.glob("*.json")}

  before = set()
  for _ in range(4 - workers):
    process = subprocess.Popen([sys.executable, str(script)], cwd=ROOT)
    limit = time.monotonic() + 60
    while len(done() - before) < 2 and time.monotonic() < limit:
      assert process.poll() is None
      time.sleep(0.005)
    children = pathlib.Path(
      f"/proc/{process.pid}/task/{process.pid}/children"
    ).read_text()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert before < done() and not out.exists()
    before = done()
    # Its workers do not stay behind.
    limit = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{p}") for p in children.split()):
      assert time.monotonic() < limit, children
      time.sleep(0.05)
  inodes = {
    name: (content / name.removesuffix(".json")).stat().st_ino
    for name in done()
  }
  preparation.prepare(asked, out)
  assert folder_bytes(out) == folder_bytes(whole)
  for name, inode in inodes.items():
    assert (out / name.removesuffix(".json")).stat().st_ino == inode
  print(f"{workers} workers: {len(inodes)} shards were not written again")


def test_text_that_changed_is_made_again(corpus, tmp_path, tokenizer_folder):
  """Between a stop and going on; no row of the old text stays."""
  _, texts = corpus
  moved = tmp_path / "a.jsonl"
  asked = config(
    tokenizer_folder,
    {"alpha": source(moved), "beta": source(tmp_path / "bad.jsonl")},
  )
  (tmp_path / "bad.jsonl").write_text("no JSON\n")
  write_jsonl(moved, texts["alpha"])
  with pytest.raises(errors.BadFileError, match=r"bad\.jsonl, line 1"):
    preparation.prepare(asked, tmp_path / "out")
  assert not (tmp_path / "out").exists()
  changed = [f"{t}!" if i == 150 else t for i, t in enumerate(texts["alpha"])]
  write_jsonl(moved, changed)
  write_jsonl(tmp_path / "bad.jsonl", ["good now"])
  preparation.prepare(asked, tmp_path / "out")
  preparation.prepare(asked, tmp_path / "fresh")
  assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "fresh")


def test_a_second_call(corpus, tmp_path, tokenizer_folder):
  folder, _ = corpus
  out = tmp_path / "out"
  asked = config(tokenizer_folder, sources_of(folder))
  first = preparation.prepare(asked, out)
  stamp = out.stat().st_mtime_ns
  same = dataclasses.replace(asked, workers=2)
  assert preparation.prepare(same, out) == json.loads(json.dumps(first))
  assert out.stat().st_mtime_ns == stamp
  other = dataclasses.replace(asked, row_length=65)
  with pytest.raises(
    errors.ConfigError, match=r"config\.row_length=64, not 65"
  ):
    preparation.prepare(other, out)
  renamed = tmp_path / "words"
  shutil.copytree(tokenizer_folder, renamed)
  asked = dataclasses.replace(asked, tokenizer=str(renamed))
  shutil.rmtree(out)
  preparation.prepare(asked, out)
  words = (renamed / "tokenizer.json").read_text()
  (renamed / "tokenizer.json").write_text(words.replace("</s>", "<end>"))
  names = {"bos_token": "<s>", "eos_token": "<end>"}
  (renamed / "tokenizer_config.json").write_text(json.dumps(names))
  with pytest.raises(errors.ConfigError, match="with another tokenizer"):
    preparation.prepare(asked, out)


def test_the_budget_for_bad_lines(corpus, tmp_path, tokenizer_folder):
  """R14: bad UTF-8, a line that is too long, one without text, no line."""
  _, texts = corpus
  file = write_jsonl(tmp_path / "a.jsonl", texts["alpha"][1:9])
  good = file.read_bytes()
  long = b'{"text": "' + b"x" * 2_000_000 + b'"}\n'
  file.write_bytes(good + b'{"text": "\xff"}\n' + long + good + b"{}\n")
  (tmp_path / "empty.jsonl").write_bytes(b"")
  (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
  asked = config(tokenizer_folder, {"x": source(tmp_path)})
  for budget, said in ((0, r"line 9: not"), (1, "line 10: longer"), (2, "19")):
    refused = dataclasses.replace(asked, bad_lines=budget)
    with pytest.raises(errors.BadFileError, match=said) as caught:
      preparation.prepare(refused, tmp_path / ".out")
    assert f"config.bad_lines={budget}" in str(caught.value)
    assert str(file) in str(caught.value)
  allowed = dataclasses.replace(asked, bad_lines=4)
  report = preparation.prepare(allowed, tmp_path / ".out")
  counted = report["sources"]["x"]
  assert (counted["bad"], counted["passed_over"]) == (4, 1)
  assert len(counted["bad_named"]) == 4
  assert "empty.jsonl: is empty" in counted["bad_named"][3]
  print(f"R14: {counted['bad']} bad records skipped of a budget of 4, or named")
  # A document keeps its number in the file: bad ones count.
  kept = documents_of(prepared.read(tmp_path / ".out").sources["x"])
  assert set(kept) <= set(range(8)) and len(kept) >= 6


def test_a_source_of_nothing_is_refused(corpus, tmp_path, tokenizer_folder):
  folder, texts = corpus
  file = write_jsonl(tmp_path / "again.jsonl", texts["alpha"])
  sources = {"a": source(folder / "a.jsonl.gz"), "b": source(file)}
  with pytest.raises(errors.BadFileError, match=r"sources\.b\.paths.* no text"):
    preparation.prepare(config(tokenizer_folder, sources), tmp_path / "out")
  # What is held out or bad is told.
  bad = tmp_path / "bad.jsonl"
  bad.write_text("[]\n")
  one = config(tokenizer_folder, {"b": source(bad)}, bad_lines=1, heldout=0.5)
  said = r"held out \(config\.heldout=0\.5\)\. .*bad\.jsonl, line 1: needs"
  with pytest.raises(errors.BadFileError, match=said):
    preparation.prepare(one, tmp_path / "out")


def test_a_killed_worker_is_one_line(
  corpus, tmp_path, tokenizer_folder, monkeypatch
):
  folder, _ = corpus
  asked = config(tokenizer_folder, sources_of(folder), workers=2)
  monkeypatch.setattr(preparation.Maker, "work", _die)
  with pytest.raises(errors.UserError, match="a worker process was killed"):
    preparation.prepare(asked, tmp_path / "out")


def _die(*given):
  os._exit(9)


def test_seen_is_a_set():
  rng = np.random.default_rng(0)
  seen, plain = parts.Seen(), set()
  for number in rng.integers(0, 3000, 6000):
    digest = hashlib.blake2b(bytes(number), digest_size=16).digest()
    # Few buckets, so that many lie in one.
    digest = b"\0" + digest[1:2] + digest[2:]
    assert seen.add(digest) == (digest not in plain)
    plain.add(digest)
  # Found only where a digest begins.
  seen = parts.Seen()
  first, second = bytes(16), bytes(2) + bytes(range(1, 15))
  assert seen.add(second) and seen.add(first)
  middle = bytes(2) + second[9:] + first[2:9]
  assert seen.add(middle) and not seen.add(middle)


@pytest.mark.parametrize(
  "given,said",
  [
    ({"tokenizer": ""}, "config.tokenizer=''"),
    ({"row_length": 1}, "config.row_length=1 must be 2 or more"),
    ({"heldout": 1.0}, "config.heldout=1.0"),
    ({"infill_rate": -0.1}, "config.infill_rate=-0.1"),
    ({"bad_lines": -1}, "config.bad_lines=-1"),
    ({"shard_mb": 0}, "config.shard_mb=0"),
    ({"max_document_mb": math.inf}, "config.max_document_mb=inf"),
    ({"sources": {}}, "config.sources is empty"),
    ({"sources": {"a-b": source("x")}}, "config.sources.a-b"),
    ({"sources": {"a": source("")}}, "config.sources.a.paths is empty"),
    ({"sources": {"a": source("x", format="csv")}}, "a.format=csv"),
  ],
)
def test_configs_that_are_refused(tokenizer_folder, given, said):
  with pytest.raises(errors.ConfigError) as caught:
    dataclasses.replace(config(tokenizer_folder, {"a": source("x")}), **given)
  assert said in str(caught.value)


def test_a_tokenizer_without_infilling(corpus, tmp_path, tokenizer_folder):
  folder, _ = corpus
  asked = config(tokenizer_folder, sources_of(folder), infill_rate=0.9)
  with pytest.raises(errors.ConfigError, match=r"infill_rate=0\.9"):
    preparation.prepare(asked, tmp_path / "out")
  assert not list(tmp_path.iterdir())
