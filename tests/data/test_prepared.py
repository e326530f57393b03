"""The folder on disk: read back here and by tensorflow-datasets, or refused."""

import multiprocessing
import os
import pickle
import shutil
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds

from llama_jax import errors, text
from llama_jax.data import packing, prepared

R = 30


def rows_of(seed, count):
  rng = np.random.default_rng(seed)
  documents = [
    packing.Document(rng.integers(1, 400, size=int(n)), 1000 * seed + i)
    for i, n in enumerate(rng.integers(1, 90, size=count))
  ]
  return list(packing.pack(documents, R))


def build(out, tokenizer):
  """A folder of two sources, one with rows held out; rows of each split."""
  shards = {
    "code": [rows_of(1, 9), rows_of(2, 3)],
    "code_heldout": [rows_of(3, 2)],
    "maths": [rows_of(4, 1)],
  }
  report = {"row_length": R, "vocab_size": 500, "sources": {}}
  with prepared.unfinished(out) as folder:
    tokenizer.save(folder / prepared.TOKENIZER)
    (folder / "of an older attempt").write_text("x")
    for split, parts in shards.items():
      sizes = []
      for number, rows in enumerate(parts):
        path = folder / prepared.shard_name(split, number)
        prepared.write_shard(path, iter(rows))
        sizes.append({"rows": len(rows), "bytes": path.stat().st_size})
      name, _, heldout = split.partition("_")
      empty = {"train": {"shards": []}, "heldout": {"shards": []}}
      counted = report["sources"].setdefault(name, empty)
      counted[heldout or "train"]["shards"] = sizes
    lengths = {s: [len(p) for p in parts] for s, parts in shards.items()}
    prepared.finish(folder, lengths, report)
    assert not out.exists()
  return {s: [r for p in parts for r in p] for s, parts in shards.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer_folder):
  out = tmp_path_factory.mktemp("made") / "data"
  return out, build(out, text.load_tokenizer(tokenizer_folder))


def same(row, want):
  return row.keys() == want.keys() and all(
    row[k].dtype == want[k].dtype and row[k].tolist() == want[k].tolist()
    for k in want
  )


def test_rows_come_back(made):
  out, splits = made
  data = prepared.read(out)
  assert (data.row_length, data.vocab_size) == (R, 500)
  assert list(data.sources) == ["code", "maths"]
  assert list(data.heldout) == ["code"]
  for source, want in (
    (data.sources["code"], splits["code"]),
    (data.sources["maths"], splits["maths"]),
    (data.heldout["code"], splits["code_heldout"]),
  ):
    assert len(source) == len(want)
    for index in reversed(range(len(want))):
      assert same(source[index], want[index])
    for index in (-1, len(want)):
      with pytest.raises(IndexError):
        source[index]
  tokenizer = text.load_tokenizer(out / prepared.TOKENIZER)
  assert tokenizer.vocab_size == 500
  assert not (out / "of an older attempt").exists()
  assert os.listdir(out.parent) == ["data"]


def test_tensorflow_datasets_opens_it(made):
  out, splits = made
  builder = tfds.builder_from_directory(out)
  assert set(builder.info.splits) == set(splits)
  for split, want in splits.items():
    rows = builder.as_data_source(split)
    assert len(rows) == builder.info.splits[split].num_examples == len(want)
    assert all(same(row, one) for row, one in zip(rows, want, strict=True))


def test_it_can_be_moved(made, tmp_path):
  out, splits = made
  moved = tmp_path / "moved here"
  moved.mkdir()
  for path in out.iterdir():
    target = moved / path.name
    if path.is_file():
      target.write_bytes(path.read_bytes())
  assert same(prepared.read(moved).sources["code"][0], splits["code"][0])


def _child(source, want, queue):
  try:
    queue.put(all(same(source[i], want[i]) for i in range(len(want))))
  except RuntimeError as error:
    queue.put(str(error))


@pytest.mark.parametrize("start", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_from_threads_and_processes(made, start):
  out, splits = made
  source, want = prepared.read(out).sources["code"], splits["code"]
  wrong = []

  def read(seed):
    for index in np.random.default_rng(seed).permutation(len(want)):
      if not same(source[index], want[index]):
        wrong.append(index)

  threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong
  context = multiprocessing.get_context(start)
  queue = context.Queue()
  child = context.Process(target=_child, args=(source, want, queue))
  child.start()
  answer = queue.get(timeout=60)
  child.join()
  # array_record crashes in a fork, so that is refused.
  assert answer is True if start == "spawn" else "was forked" in answer
  assert same(pickle.loads(pickle.dumps(source))[1], want[1])


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_damaged_descriptions_are_named(made, tmp_path, name):
  out, _ = made
  copy = tmp_path / "data"
  shutil.copytree(out, copy)
  whole = (copy / name).read_bytes()
  (copy / name).write_bytes(whole[: len(whole) // 2])
  with pytest.raises(errors.BadFileError, match=f"{name}.*damaged") as caught:
    prepared.read(copy).sources["code"][0]
  assert str(copy) in str(caught.value)


def test_damage_is_named(made, tmp_path, tokenizer_folder):
  out = tmp_path / "data"
  build(out, text.load_tokenizer(tokenizer_folder))
  shard = out / prepared.shard_name("code", 0)
  whole = shard.read_bytes()
  # Near the start, where the rows are; files are padded to 64 kB.
  for place in (200, 1500):
    flipped = bytearray(whole)
    flipped[place] ^= 0x40
    shard.write_bytes(flipped)
    source = prepared.read(out).sources["code"]
    with pytest.raises(errors.BadFileError, match=r"row \d+ of code cannot"):
      for index in range(len(source)):
        source[index]
  shard.write_bytes(whole[:-1])
  with pytest.raises(errors.BadFileError, match="missing or cut off"):
    prepared.read(out)
  shard.unlink()
  with pytest.raises(errors.BadFileError, match="no bytes, not"):
    prepared.read(out)
  (out / prepared.REPORT).write_text("{}")
  with pytest.raises(errors.BadFileError, match="not what prepare writes"):
    prepared.read(out)
  (out / prepared.REPORT).unlink()
  with pytest.raises(errors.BadFileError, match="is no prepared folder"):
    prepared.read(out)


def test_one_process_at_a_time_and_no_overwriting(made, tmp_path):
  out = tmp_path / "data"
  with prepared.unfinished(out):
    taken = pytest.raises(errors.UserError, match="by another process")
    with taken, prepared.unfinished(out):
      pass
  full = pytest.raises(errors.UserError, match="not an empty folder")
  with full, prepared.unfinished(made[0]):
    pass


def test_a_failure_leaves_no_shard(tmp_path):
  def rows():
    yield from rows_of(1, 2)
    raise RuntimeError("stop")

  with pytest.raises(RuntimeError, match="stop"):
    prepared.write_shard(tmp_path / "shard", rows())
  assert not list(tmp_path.iterdir())


def test_shards_beyond_what_may_be_open(made, monkeypatch):
  calls = []
  limit = [256 + 2, 256 + 4]
  monkeypatch.setattr(prepared.resource, "getrlimit", lambda _: limit)
  monkeypatch.setattr(
    prepared.resource, "setrlimit", lambda _, new: calls.append(new)
  )
  prepared.read(made[0])  # has four
  assert calls == [(256 + 4, 256 + 4)]
  limit[1] = 256 + 3
  with pytest.raises(errors.UserError, match="4 shards, more files"):
    prepared.read(made[0])


def test_names_of_sources():
  assert prepared.is_source_name("common_crawl2")
  for name in ("", "A", "a b", "a/b", "code_heldout", "all", "1a", "a-b"):
    assert not prepared.is_source_name(name)
