"""The standard library as text: split by module, the same everywhere."""

import gzip
import json

from llama_jax.data import standard_library


def _rows(path):
  with gzip.open(path, "rt") as file:
    return [json.loads(line) for line in file]


def _top(row):
  return row["source"].split("/")[0].removesuffix(".py")


def _library(root):
  """A small library: 60 modules, two of them of one family, and no prose."""
  for i in range(60):
    root.mkdir(exist_ok=True)
    (root / f"module{i}.py").write_text(f'"""Module {i}."""\n' * 200)
  package = root / "package"
  (package / "test").mkdir(parents=True)
  (package / "__init__.py").write_text("x = 1\n")
  (package / "latin.py").write_bytes(
    "# coding: latin-1\n# é\n".encode("latin-1")
  )
  (package / "broken.py").write_bytes(b"\xff\xfe")
  (package / "test" / "test_it.py").write_text("assert 1\n")
  (root / "site-packages").mkdir()
  (root / "site-packages" / "theirs.py").write_text("y = 2\n")
  return root


def test_no_module_is_on_both_sides(tmp_path):
  train, heldout = tmp_path / "train.jsonl.gz", tmp_path / "heldout.jsonl.gz"
  split = standard_library.write(train, heldout)
  train_side = {_top(row) for row in _rows(train)}
  heldout_side = {_top(row) for row in _rows(heldout)}
  assert train_side == set(split.train_modules)
  assert heldout_side <= set(split.heldout_modules)
  assert not train_side & heldout_side
  assert len(heldout_side) >= 5
  assert split.train_bytes > 3e6
  assert 48_000 <= split.heldout_bytes <= 60_000
  sources = [row["source"] for row in _rows(train)]
  assert not [s for s in sources if "/test/" in f"/{s}"]


def test_accelerated_twins_share_a_side():
  for name in ("decimal", "io", "datetime", "json", "abc"):
    side = standard_library.is_held_out(name)
    assert standard_library.is_held_out(f"_{name}") == side
    assert standard_library.is_held_out(f"_py{name}") == side


def test_same_library_same_bytes(tmp_path):
  root = _library(tmp_path / "root")
  for run in ("a", "b"):
    folder = tmp_path / run
    standard_library.write(folder / "train.gz", folder / "other.gz", root, 9000)
  for name in ("train.gz", "other.gz"):
    a, b = ((tmp_path / run / name).read_bytes() for run in ("a", "b"))
    assert a == b
  assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
    "other.gz",
    "train.gz",
  ]


def test_what_is_no_text_of_the_library_stays_out(tmp_path):
  root = _library(tmp_path / "root")
  standard_library.write(tmp_path / "t.gz", tmp_path / "h.gz", root)
  rows = _rows(tmp_path / "t.gz") + _rows(tmp_path / "h.gz")
  texts = {row["source"]: row["text"] for row in rows}
  assert "é" in texts["package/latin.py"]
  assert not {"package/broken.py", "package/test/test_it.py"} & set(texts)
  assert "site-packages/theirs.py" not in texts


def test_cap_is_shared_out_in_whole_lines(tmp_path):
  root = _library(tmp_path / "root")
  split = standard_library.write(
    tmp_path / "t.gz", tmp_path / "h.gz", root, heldout_bytes=6000
  )
  rows = _rows(tmp_path / "h.gz")
  assert {_top(row) for row in rows} == set(split.heldout_modules)
  assert split.heldout_bytes <= 6000
  for row in rows:
    whole = (root / row["source"]).read_text()
    assert whole.startswith(row["text"])
    assert row["text"].endswith("\n")
