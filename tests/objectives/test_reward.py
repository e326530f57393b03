"""Reward models' loss, term by term in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.data import dialogs
from llama_jax.objectives import pairs, reward

# Two rows: three ranked answers and one more pair; one pair and padding.
BATCH = {
  "tokens": jnp.zeros((2, 8), jnp.int32),
  "positions": jnp.zeros((2, 8), jnp.int32),
  "segments": jnp.zeros((2, 8), jnp.int32),
  "last": jnp.array([[1, 2, 4, 5, 7], [3, 6, 0, 0, 0]]),
  "safe": jnp.array([[1, -1, 0, -1, 1], [0, 1, -1, -1, -1]]),
  "pairs": jnp.array(
    [[[1, 2], [1, 3], [2, 3], [4, 5]], [[2, 1], [0, 0], [0, 0], [0, 0]]]
  ),
  "ratings": jnp.array([[-1, -1, 0, 2], [1, -1, -1, -1]]),
}
SCORES = jnp.array(
  [
    [9.0, 2.0, 0.5, 9.0, -1.0, 0.25, 9.0, 0.75],
    [9.0, 9.0, 9.0, 1.5, 9.0, 9.0, 1.0, 9.0],
  ]
)
# (better, other, rating) of each pair, in SCORES by hand.
PAIRS = [
  (2.0, 0.5, -1),
  (2.0, -1.0, -1),
  (0.5, -1.0, 0),
  (0.25, 0.75, 2),
  (1.0, 1.5, 1),
]
SAFE = [(2.0, 1), (-1.0, 0), (0.75, 1), (1.5, 0), (1.0, 1)]


def rewards(params, ids, positions, segments):
  del ids, positions, segments
  return params


def told(config):
  loss, (count, sums) = reward.make(config, rewards)(SCORES, BATCH)
  means = {
    name: total if many is None else total / many
    for name, (total, many) in sums.items()
  }
  return loss, count, means


def minus_log_sigmoid(x):
  return np.log1p(np.exp(-x))


@pytest.mark.parametrize("margins", reward.MARGINS)
@pytest.mark.parametrize("safety_weight", [0.0, 0.5])
def test_loss_by_hand(margins, safety_weight):
  loss, count, _ = told(reward.Reward(margins, safety_weight))
  table = [*reward.MARGINS[margins], 0.0]  # -1, not rated, is the last
  expected = sum(
    minus_log_sigmoid(better - other - table[rating])
    for better, other, rating in PAIRS
  )
  expected += safety_weight * sum(
    minus_log_sigmoid(score if safe else -score) for score, safe in SAFE
  )
  assert count == len(PAIRS)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_margins_are_the_papers():
  """arXiv:2307.09288, table 27."""
  assert reward.MARGINS["small"] == (1, 2 / 3, 1 / 3, 0)
  assert reward.MARGINS["large"] == (3, 2, 1, 0)
  assert reward.RATINGS == dialogs.RATINGS


def test_what_it_tells():
  _, _, means = told(reward.Reward("none", 1.0))
  assert means["accuracy"] == pytest.approx(3 / 5)
  assert means["accuracy/significantly_better"] == 1
  assert means["accuracy/better"] == means["accuracy/slightly_better"] == 0
  assert np.isnan(means["accuracy/unsure"])
  assert means["margin"] == pytest.approx(
    np.mean([better - other for better, other, _ in PAIRS])
  )
  scores = [2.0, 0.5, -1.0, 0.25, 0.75, 1.5, 1.0]
  assert means["reward"] == pytest.approx(np.mean(scores))
  # sigmoid(2), not of -1, of 0.75, 1.0 right; of 1.5 wrong.
  assert means["safety_accuracy"] == pytest.approx(4 / 5)


def test_calibration_by_hand():
  _, _, means = told(reward.Reward("none", 0.0))
  sure = [1 / (1 + np.exp(-abs(b - o))) for b, o, _ in PAIRS]
  bins = [int((2 * p - 1) * pairs.BINS) for p in sure]
  for number in range(pairs.BINS):
    inside = [
      b > o for (b, o, _), k in zip(PAIRS, bins, strict=True) if k == number
    ]
    assert means["calibration_pairs"][number] == len(inside)
    if inside:
      assert means["calibration"][number] == np.mean(inside)


def test_only_last_tokens_have_a_gradient():
  objective = reward.make(reward.Reward("small", 1.0), rewards)
  gradient = jax.grad(lambda s: objective(s, BATCH)[0])(SCORES)
  assert np.array_equal(gradient != 0, SCORES != 9)
  # The better of a pair is drawn up, the other down.
  assert gradient[0, 5] < 0 < gradient[1, 3]


@pytest.mark.parametrize(
  ("knob", "value"), [("margins", "huge"), ("safety_weight", -1.0)]
)
def test_a_wrong_knob_is_named(knob, value):
  settings = {"margins": "none", "safety_weight": 0.0, knob: value}
  with pytest.raises(errors.ConfigError, match=f"objective.{knob}="):
    reward.Reward(**settings)
