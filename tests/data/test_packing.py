"""Packing against a slow packer written here, token by token."""

import collections
import itertools

import numpy as np
import pytest

from llama_jax.data import packing

KEYS = ("tokens", "targets", "positions", "segments", "loss_mask")


def slow_rows(documents, T):
  """The rows as the module's docstring defines them."""
  line = [(d, token) for d, doc in enumerate(documents) for token in doc]
  rows = []
  for start in range(0, len(line) - 1, T):
    row = {name: [] for name in KEYS}
    segment = position = 0
    before = None
    for at in range(start, start + T):
      if at + 1 >= len(line):
        for name in KEYS:
          row[name].append(0)
        continue
      owner, token = line[at]
      if owner != before:
        segment, position, before = segment + 1, 0, owner
      row["tokens"].append(token)
      row["targets"].append(line[at + 1][1])
      row["positions"].append(position)
      row["segments"].append(segment)
      row["loss_mask"].append(float(line[at + 1][0] == owner))
      position += 1
    rows.append(row)
  return rows


def corpora():
  rng = np.random.default_rng(0)
  yield [[7]]
  yield [[1, 2]]
  yield [[], [1, 2, 3], [], [], [4], [5, 6], []]
  yield [list(range(1, 41))]
  for _ in range(60):
    count = rng.integers(1, 9)
    yield [
      rng.integers(1, 99, size=rng.integers(0, 15)).tolist()
      for _ in range(count)
    ]


@pytest.mark.parametrize("T", [1, 2, 5, 8, 100])
def test_equals_the_slow_packer(T):
  for documents in corpora():
    rows = packing.PackedRows(documents, T)
    want = slow_rows(documents, T)
    assert len(rows) == len(want)
    for index, slow in enumerate(want):
      row = rows[index]
      assert row.keys() == slow.keys()
      for name in KEYS:
        kind = np.float32 if name == "loss_mask" else np.int32
        assert row[name].dtype == kind and row[name].shape == (T,)
        assert row[name].tolist() == slow[name], (name, documents)


@pytest.mark.parametrize("T", [1, 3, 8])
def test_every_token_is_predicted_once_from_its_own_document(T):
  for documents in corpora():
    # Every token of the corpus is another word.
    fresh = iter(range(1, 10_000))
    documents = [[next(fresh) for _ in doc] for doc in documents]
    rows = packing.PackedRows(documents, T)
    scored = collections.Counter()
    pairs = set()
    for row in (rows[i] for i in range(len(rows))):
      for t in np.flatnonzero(row["loss_mask"]):
        assert row["segments"][t] > 0
        scored[int(row["targets"][t])] += 1
        pairs.add((int(row["tokens"][t]), int(row["targets"][t])))
    want = [token for doc in documents for token in doc[1:]]
    assert scored == collections.Counter(want)
    assert pairs == {
      pair for doc in documents for pair in itertools.pairwise(doc)
    }


def test_documents_can_be_read_back():
  documents = [[5, 6, 7, 8, 9], [1, 2], [3, 4, 5, 6, 7, 8, 9, 10, 11]]
  rows = packing.PackedRows(documents, 4)
  tokens = np.concatenate(
    [rows[i]["tokens"][rows[i]["segments"] > 0] for i in range(len(rows))]
  )
  # All but the very last token, which is only ever a target.
  assert tokens.tolist() == [*itertools.chain(*documents)][:-1]


def test_no_row_beyond_the_last():
  rows = packing.PackedRows([[1, 2, 3]], 4)
  for index in (1, -1):
    with pytest.raises(IndexError):
      rows[index]
  assert len(packing.PackedRows([], 4)) == 0
