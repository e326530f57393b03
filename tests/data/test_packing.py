"""Rows against the documents they were made of, put together again by hand."""

import collections
import dataclasses

import numpy as np
import pytest

from llama_jax import errors
from llama_jax.data import packing


def corpora(rows):
  """Documents of every mix of plain and whole; every token is another."""
  rng = np.random.default_rng(0)
  for share in (0.0, 0.5, 0.9, 1.0):
    for most in (3, 20, 90):
      fresh = 1
      documents = []
      for index in range(int(rng.integers(1, 60))):
        size = int(rng.integers(0, most))
        ids = list(range(fresh, fresh + size))
        fresh += size
        whole = bool(rng.random() < share and size <= rows)
        documents.append(packing.Document(ids, 10 * index, whole))
      yield documents


def parts(row):
  """(document, tokens) of each segment, its form checked."""
  size = len(row["tokens"])
  for name in ("tokens", "segments", "positions"):
    assert row[name].dtype == np.int32 and row[name].shape == (size,)
  assert row["documents"].dtype == np.int64
  used = int((row["segments"] > 0).sum())
  assert not row["segments"][used:].any() and not row["tokens"][used:].any()
  assert not row["positions"][used:].any()
  found = []
  for number, document in enumerate(row["documents"].tolist(), start=1):
    where = np.flatnonzero(row["segments"] == number)
    assert (np.diff(where) == 1).all() and len(where)
    assert row["positions"][where].tolist() == list(range(len(where)))
    found.append((document, row["tokens"][where].tolist()))
  assert sum(len(tokens) for _, tokens in found) == used
  return found


@pytest.mark.parametrize("R", [1, 2, 5, 8, 40])
def test_rows_give_every_document_back(R):
  for documents in corpora(R):
    got = collections.defaultdict(list)
    plain_order = []
    goes_on = None
    plain = {d.index for d in documents if not d.whole}
    for row in packing.pack(documents, R):
      segments = parts(row)
      assert len(row["tokens"]) == R + 1
      if goes_on is not None:
        # The last token of the row before, once more.
        assert segments[0][0] == goes_on
        assert segments[0][1][0] == got[goes_on].pop()
      for document, tokens in segments:
        got[document] += tokens
        if document in plain and plain_order[-1:] != [document]:
          plain_order.append(document)
      last = segments[-1][0]
      whole_ids = next(d.ids for d in documents if d.index == last)
      goes_on = last if got[last] != list(whole_ids) else None
    assert goes_on is None
    wanted = {d.index: list(d.ids) for d in documents if len(d.ids)}
    assert got == wanted
    assert plain_order == [i for i in wanted if i in plain]


@pytest.mark.parametrize("R", [2, 5, 40])
def test_a_whole_document_lies_in_one_row(R):
  for documents in corpora(R):
    whole = {d.index: list(d.ids) for d in documents if d.whole and len(d.ids)}
    for row in packing.pack(documents, R):
      for document, tokens in parts(row):
        if document in whole:
          assert tokens == whole.pop(document)
    assert not whole


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("R", [1, 5, 40])
def test_every_token_but_the_first_is_predicted_once(R, separate):
  for documents in corpora(R):
    scored = collections.Counter()
    pairs = set()
    for row in packing.pack(documents, R):
      piece = packing.inputs(row, 0, R, separate)
      for t in np.flatnonzero(piece["loss_mask"]):
        assert piece["segments"][t] > 0
        scored[int(piece["targets"][t])] += 1
        pairs.add((int(piece["tokens"][t]), int(piece["targets"][t])))
    want = collections.Counter(t for d in documents for t in d.ids[1:])
    within = {
      pair for d in documents for pair in zip(d.ids, d.ids[1:], strict=False)
    }
    assert within <= pairs
    if separate:
      assert scored == want and pairs == within
    else:
      # First tokens too, where they are not the first of a row.
      firsts = {d.ids[0] for d in documents if len(d.ids)}
      assert set(scored.values()) <= {1} and want.keys() <= scored.keys()
      assert scored.keys() - want.keys() <= firsts


def slow_inputs(row, start, length, separate):
  piece = collections.defaultdict(list)
  before, position = 0, 0
  for t in range(start, start + length):
    segment, after = row["segments"][t], row["segments"][t + 1]
    position = position + 1 if segment == before else 0
    before = segment
    piece["tokens"].append(row["tokens"][t])
    piece["targets"].append(row["tokens"][t + 1])
    padded = segment == 0
    if separate:
      piece["segments"].append(segment)
      piece["positions"].append(0 if padded else position)
      piece["loss_mask"].append(float(segment == after and not padded))
    else:
      piece["segments"].append(0 if padded else 1)
      piece["positions"].append(0 if padded else t - start)
      piece["loss_mask"].append(float(after != 0))
  return piece


@pytest.mark.parametrize("separate", [True, False])
def test_any_piece_of_a_row(separate):
  R = 12
  for documents in corpora(R):
    for row in list(packing.pack(documents, R))[-2:]:
      for start in range(R):
        for length in range(1, R - start + 1):
          got = packing.inputs(row, start, length, separate)
          want = slow_inputs(row, start, length, separate)
          assert got.keys() == want.keys()
          for name, values in want.items():
            kind = np.float32 if name == "loss_mask" else np.int32
            assert got[name].dtype == kind, name
            assert got[name].tolist() == values, name
  with pytest.raises(ValueError):
    packing.inputs(row, 1, R, separate)


@pytest.mark.parametrize(
  "share,least", [(0.0, 0.998), (0.9, 0.99), (1.0, 0.985)]
)
def test_rows_are_full(share, least):
  rng = np.random.default_rng(1)
  R = 256
  sizes = np.minimum(rng.lognormal(4.5, 1, 4000).astype(int) + 1, 3000)
  documents = [
    packing.Document(np.ones(n, np.int32), i, bool(rng.random() < share))
    for i, n in enumerate(sizes)
  ]
  documents = [
    dataclasses.replace(d, whole=d.whole and len(d.ids) <= R)
    for d in documents
    if share < 1 or len(d.ids) <= R
  ]
  rows = list(packing.pack(documents, R))
  used = sum(int((row["segments"] > 0).sum()) for row in rows)
  fill = used / (len(rows) * (R + 1))
  print(f"whole {share:.0%}: fill {fill:.4f}")
  assert fill > least


def test_documents_are_read_as_they_are_needed():
  read = []

  def documents():
    for index in range(1000):
      read.append(index)
      yield packing.Document([1] * 10, index, whole=index % 2 == 0)

  rows = packing.pack(documents(), 100)
  next(rows)
  assert len(read) <= packing.WAITING + 20


def test_what_cannot_be_packed():
  assert list(packing.pack([], 4)) == []
  assert list(packing.pack([packing.Document([], 0, True)], 4)) == []
  with pytest.raises(errors.ConfigError, match="row_length=0"):
    next(packing.pack([], 0))
  long = packing.Document([1] * 5, 7, whole=True)
  with pytest.raises(errors.ConfigError, match=r"document 7 .* 5 tokens"):
    next(packing.pack([long], 4))
