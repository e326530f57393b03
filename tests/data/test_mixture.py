"""Which row comes when, against counting."""

import collections

import pytest

from llama_jax import errors
from llama_jax.data import mixture as mixture_lib

SIZES = {"books": 30, "code": 7, "maths": 100}
WEIGHTS = {"books": 0.5, "code": 0.2, "maths": 0.3}


def make(sizes=SIZES, stages=((0, WEIGHTS),), seed=0):
  return mixture_lib.Mixture(sizes, stages, seed)


def drawn(mixture, numbers):
  """Source -> the rows drawn of it, in order."""
  rows = collections.defaultdict(list)
  for number in numbers:
    draw = mixture.draw(number)
    rows[mixture.names[draw.source]].append(draw.index)
  return rows


def test_shares_hold_in_any_stretch():
  mixture = make()
  for start in (0, 37, 9_950, 25_000):
    counts = {
      name: len(rows)
      for name, rows in drawn(mixture, range(start, start + 200)).items()
    }
    for name, weight in WEIGHTS.items():
      # Even spacing: never more than two rows from its share.
      assert abs(counts[name] - 200 * weight) <= 2, (start, counts)


def test_each_epoch_sees_each_row_of_a_source_once():
  rows = drawn(make(), range(700))
  for name, size in SIZES.items():
    epochs = [
      tuple(rows[name][i : i + size])
      for i in range(0, len(rows[name]) - size + 1, size)
    ]
    assert epochs
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)  # each in an order of its own


def test_epochs_are_told_as_they_were():
  mixture = make(stages=[(0, WEIGHTS), (333, {"code": 1.0, "books": 1.0})])
  for number in (0, 1, 100, 333, 500):
    rows = drawn(mixture, range(number))
    told = mixture.epochs(number)
    for name, size in SIZES.items():
      assert told[name] == len(rows[name]) / size
  assert {mixture.draw(n).epoch for n in range(20)} == {0}


def test_another_source_leaves_the_orders_alone():
  before = drawn(make(), range(300))
  more = make({"web": 50, **SIZES}, [(0, {**WEIGHTS, "web": 3.0})])
  after = drawn(more, range(1_200))
  for name in SIZES:
    count = min(len(before[name]), len(after[name]))
    assert count > 50
    assert before[name][:count] == after[name][:count]


def test_a_later_stage_goes_on_in_each_source():
  """An annealing stage: other shares, the same orders, nothing again."""
  alone = drawn(make(), range(1_310))
  staged = drawn(
    make(stages=[(0, WEIGHTS), (250, {"maths": 0.9, "code": 0.1})]), range(600)
  )
  assert len(staged["books"]) == 125
  assert len(staged["maths"]) == 75 + 315
  for name in ("code", "maths"):
    assert staged[name] == alone[name][: len(staged[name])]


def test_a_source_that_joins_later():
  """Data prepared anew with one more source: what was read stays read."""
  before = drawn(make(), range(200))
  joined = make(
    {**SIZES, "new": 9}, [(0, WEIGHTS), (200, {**WEIGHTS, "new": 1.0})]
  )
  assert drawn(joined, range(200)) == before
  assert drawn(joined, range(200, 300))["new"]


def test_no_weights_means_one_epoch_of_everything():
  mixture = make(stages=[(0, {})])
  told = mixture.epochs(137 * 40)
  assert all(abs(passes - 40) < 0.5 for passes in told.values()), told


def test_seeds_and_names_make_the_order():
  assert drawn(make(seed=1), range(99)) == drawn(make(seed=1), range(99))
  assert drawn(make(seed=1), range(99)) != drawn(make(seed=2), range(99))
  twins = drawn(make({"a": 50, "b": 50}, [(0, {})]), range(100))
  assert twins["a"] != twins["b"]


@pytest.mark.parametrize(
  "stages, said",
  [
    ([(0, {"bocks": 1.0})], r"data\.mixture\.bocks.*books"),
    ([(0, {"books": -1.0})], r"data\.mixture\.books=-1"),
    ([(0, {"books": 0.0})], "all weights are 0"),
    ([(0, {"books": 1.0, "code": 1e-6})], "code is below one row"),
    ([(0, {}), (9, {}), (3, {})], "order"),
  ],
)
def test_refusals(stages, said):
  with pytest.raises(errors.ConfigError, match=said):
    make(stages=stages)
  with pytest.raises(
    errors.ConfigError, match=r"data\.mixture\.none=1.*no row"
  ):
    make({**SIZES, "none": 0}, [(0, {"none": 1.0})])
