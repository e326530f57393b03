"""Files of every form, whole and damaged: what is had, what is named."""

import gzip
import json
import tracemalloc

import pyarrow
import pytest
from pyarrow import parquet

from llama_jax.data import records

TEXTS = ["first", "zwei\nlines", "ünï\u2028code", "", "last"]


def jsonl(texts, field="text"):
  rows = [json.dumps({field: t}, ensure_ascii=False) for t in texts]
  return "".join(row + "\n" for row in rows).encode()


def write(path, content):
  if path.suffix == ".gz":
    content = gzip.compress(content)
  elif path.suffix == ".zst":
    content = pyarrow.compress(content, codec="zstd", asbytes=True)
  path.write_bytes(content)
  return path


def write_parquet(path, texts, field="text"):
  table = pyarrow.table({"n": list(range(len(texts))), field: texts})
  parquet.write_table(table, path, row_group_size=2)
  return path


def bad(found):
  return [r for r in found if isinstance(r, records.Bad)]


def good(found):
  return [r for r in found if not isinstance(r, records.Bad)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines(tmp_path, suffix):
  path = write(tmp_path / f"a.jsonl{suffix}", jsonl(TEXTS) + b"\n \n")
  assert list(records.Records(path)) == TEXTS
  path = write(tmp_path / f"b.data{suffix}", jsonl(TEXTS, "body"))
  assert list(records.Records(path, "jsonl", "body")) == TEXTS


def test_parquet(tmp_path):
  path = write_parquet(tmp_path / "a.parquet", TEXTS)
  assert list(records.Records(path)) == TEXTS
  [problem] = records.Records(path, field="body")
  assert 'no column "body"; it has n, text' in problem.at(path)
  path = write_parquet(tmp_path / "b.parquet", ["a", None, "b"])
  first, none, last = records.Records(path)
  assert (first, last) == ("a", "b") and none.where == "row 2"
  found = list(records.Records(write_parquet(tmp_path / "c.parquet", [1, 2])))
  assert len(found) == 2 and 'needs a string "text"' in found[0].at(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_is_one_record(tmp_path, suffix):
  path = write(tmp_path / f"a.txt{suffix}", "a\nb ü".encode())
  assert list(records.Records(path)) == ["a\nb ü"]


LINES = {
  b'{"text": "cut': "line 2: not a JSON object",
  b"[1]": "line 2: needs an object",
  b'{"txet": "x"}': 'line 2: needs an object with a string "text"',
  b'{"text": "\xff"}': "line 2: not a JSON object ('utf-8'",
  b'{"text": "\\ud800"}': "line 2: half a surrogate pair, '\\ud800'",
  b"[" * 900: "line 2: not a JSON object",
  b'{"text": "' + b"x" * 2000 + b'"}': "line 2: longer than the 1000 bytes",
}


@pytest.mark.parametrize("line", LINES)
def test_a_bad_line_is_named_and_the_rest_read(tmp_path, line):
  path = write(tmp_path / "a.jsonl", jsonl("a") + line + b"\n" + jsonl("bc"))
  found = list(records.Records(path, limit=1000))
  assert good(found) == ["a", "b", "c"]
  [problem] = bad(found)
  assert problem.at(path).startswith(f"{path}, {LINES[line]}")
  assert not problem.binary and len(problem.at(path)) < 1000


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl"])
def test_a_long_line_takes_little_memory(tmp_path, name):
  """R14: 100 MB in one line."""
  content = jsonl("a") + b'{"text": "' + b"x" * 100_000_000 + b'"}\n'
  path = write(tmp_path / name, content + jsonl("b"))
  del content
  tracemalloc.start()
  found = list(records.Records(path, limit=1_000_000))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  print(f"{name}: peak {peak / 1e6:.1f} MB")
  assert good(found) == ["a", "b"]
  assert "line 2: longer than the 1000000 bytes" in bad(found)[0].at(path)
  assert peak < 20e6


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_cut_file_gives_what_it_has_and_is_named(tmp_path, name):
  texts = [f"{n * 7919 % 10_007} is number {n}" for n in range(50_000)]
  path = write(tmp_path / name, jsonl(texts))
  whole = path.read_bytes()
  for cut in (len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:cut])
    found = list(records.Records(path))
    [problem] = bad(found)
    had = good(found)
    assert had == texts[: len(had)] and found[-1] is problem
    assert f"after line {len(had)}, byte " in problem.at(path)
    assert "cannot be read" in problem.at(path)
  # Of the gzipped one the sum at its end was cut, and no line.
  assert had == texts or path.suffix == ".zst"
  path.write_bytes(b"nothing of the kind")
  [problem] = records.Records(path)
  assert "cannot be read" in problem.at(path)


def test_a_cut_parquet_is_named(tmp_path):
  path = write_parquet(tmp_path / "a.parquet", TEXTS)
  whole = path.read_bytes()
  for content in (whole[: len(whole) // 2], b"junk", b""):
    path.write_bytes(content)
    [problem] = records.Records(path)
    assert "cannot be read" in problem.at(path)


def test_what_is_no_text(tmp_path):
  path = write(tmp_path / "a.png", b"\x89PNG\xff")
  [problem] = records.Records(path)
  assert problem.binary and "byte 0 is not UTF-8" in problem.at(path)
  path = write(tmp_path / "a.txt", b"x" * 101)
  [problem] = records.Records(path, limit=100)
  assert "longer than the 100 bytes" in problem.at(path)
  [problem] = records.Records(write(tmp_path / "a.jsonl", b""))
  assert problem.at("a") == "a: is empty."
  [problem] = records.Records(tmp_path / "none")
  assert "cannot be read" in problem.problem


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_position_grows_to_the_files_size(tmp_path, name):
  texts = [f"text {n * 7919 % 10_007}" for n in range(50_000)]
  path = write(tmp_path / name, jsonl(texts))
  found = records.Records(path)
  places = [found.position for _ in found]
  # The gzipped one is read at one go.
  assert places == sorted(places) and places[0] > 0
  assert places[-1] == path.stat().st_size
