"""The order of rows: shuffled, seeded, and a function of the step alone."""

import collections
import dataclasses

import numpy as np
import pytest

from llama_jax import errors, text
from llama_jax.data import batches

CONFIG = batches.DataConfig(text="x", sequence_length=16, seed=0, tokenizer="")


class Rows:
  """Row i holds i."""

  def __init__(self, count):
    self.count = count

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    return {"row": np.array([index])}


def order(rows, size, steps, seed=0, start=0):
  source = batches.Batches(Rows(rows), size, seed)
  got = [source.get(step)["row"][:, 0] for step in range(start, start + steps)]
  return np.concatenate(got).tolist()


def test_an_epoch_sees_each_row_once():
  # 12 batches of 5 are 6 epochs of 10 rows.
  got = np.reshape(order(10, 5, 12), (6, 10))
  for epoch in got:
    assert sorted(epoch) == list(range(10))
  assert len({tuple(epoch) for epoch in got}) == 6
  assert tuple(got[0]) != tuple(range(10))


def test_batches_that_do_not_divide_the_epoch_lose_nothing():
  # 10 batches of 3 are 3 epochs of 10 rows.
  counts = collections.Counter(order(10, 3, 10))
  assert counts == {row: 3 for row in range(10)}


@pytest.mark.parametrize("start", [0, 1, 3, 17])
def test_any_step_can_be_resumed(start):
  whole = order(10, 3, 25)
  assert order(10, 3, 25 - start, start=start) == whole[3 * start :]


def test_the_seed_matters():
  assert order(50, 5, 10, seed=1) == order(50, 5, 10, seed=1)
  assert order(50, 5, 10, seed=1) != order(50, 5, 10, seed=2)


def test_hosts_share_a_batch():
  source = batches.Batches(Rows(20), 6, 0)
  whole = source.get(4)["row"]
  parts = [source.get(4, slice(i, i + 2))["row"] for i in (0, 2, 4)]
  np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_too_little_text_is_refused():
  with pytest.raises(errors.ConfigError) as caught:
    batches.Batches(Rows(3), 4, 0)
  for said in ("3 rows", "training.batch_size=4", "data.sequence_length"):
    assert said in str(caught.value)


def test_documents_end_with_eos(tmp_path, tokenizer_folder):
  tokenizer = text.load_tokenizer(tokenizer_folder)
  for name, content in (("a.txt", "import json"), ("b.txt", "return None")):
    (tmp_path / name).write_text(content)
  config = dataclasses.replace(CONFIG, text=str(tmp_path), sequence_length=100)
  rows = batches.load_rows(config, tokenizer)
  row = rows[0]
  size = int((row["segments"] > 0).sum())
  got = [*row["tokens"][:size].tolist(), int(row["targets"][size - 1])]
  bos = [tokenizer.bos_id] if tokenizer.add_bos else []
  want = []
  for content in ("import json", "return None"):
    want += [*bos, *tokenizer.encode(content), tokenizer.eos_id]
  assert got == want


def test_config_refusals():
  with pytest.raises(errors.ConfigError, match=r"data\.sequence_length=0"):
    dataclasses.replace(CONFIG, sequence_length=0)
  with pytest.raises(errors.ConfigError, match=r"data\.text is empty"):
    dataclasses.replace(CONFIG, text="")
