"""Sampling against sets and probabilities worked out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.decoding import sampling

V = 11
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, V)).astype(np.float32) * 2


def kept_words(logits, top_k, top_p):
  """The words of one row that may be drawn, by going down the ranking."""
  ranking = np.argsort(-logits)[: top_k or V]
  probs = np.exp(logits[ranking] - logits.max())
  probs /= probs.sum()
  kept, held = set(), 0.0
  for word, prob in zip(ranking, probs, strict=True):
    kept.add(int(word))
    held += prob
    if held >= top_p:
      break
  return kept


keep = jax.jit(sampling.keep_likeliest, static_argnums=(1, 2))


@pytest.mark.parametrize("top_k", [0, 1, 4, V, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_the_kept_words(top_k, top_p):
  out = np.asarray(keep(LOGITS, top_k, top_p))
  for row, logits in zip(out, LOGITS, strict=True):
    kept = {int(w) for w in np.flatnonzero(row > -np.inf)}
    assert kept == kept_words(logits, top_k, top_p)
    # What is kept is not changed.
    np.testing.assert_array_equal(row[list(kept)], logits[list(kept)])


@pytest.mark.parametrize(
  "settings",
  [
    {"temperature": 1.0},
    {"temperature": 0.5, "top_k": 4},
    {"temperature": 1.7, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 6, "top_p": 0.7},
  ],
  ids=str,
)
def test_frequencies(settings):
  """Chi-square over 4000 rows with keys of their own."""
  config = sampling.SamplingConfig(**settings, seed=3)
  count, logits = 4000, LOGITS[0]
  choose = jax.jit(sampling.choose, static_argnums=3)
  drawn = choose(
    np.tile(logits, (count, 1)), sampling.keys(config, count), 5, config
  )
  got = np.bincount(drawn, minlength=V)
  scaled = logits.astype(np.float64) / config.temperature
  kept = sorted(kept_words(scaled, config.top_k, config.top_p))
  probs = np.zeros(V)
  probs[kept] = np.exp(scaled[kept] - scaled.max())
  probs *= count / probs.sum()
  assert got[probs == 0].sum() == 0
  statistic = ((got - probs)[kept] ** 2 / probs[kept]).sum()
  # Mean df and variance 2 df: five deviations above is one in a million.
  df = max(len(kept) - 1, 1)
  assert statistic < df + 5 * (2 * df) ** 0.5, (got, probs)


def test_draws_of_a_row_are_independent():
  """Token after token, of one key: pairs are as frequent as their product."""
  config = sampling.SamplingConfig(temperature=1.0)
  keys = sampling.keys(config, 1)
  logits = jnp.zeros((1, 2))
  draw = functools.partial(sampling.choose, logits, keys, config=config)
  drawn = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(4000)))[:, 0]
  pairs = np.bincount(2 * drawn[:-1] + drawn[1:], minlength=4) / 3999
  # Standard deviation of each is 0.007.
  np.testing.assert_allclose(pairs, 0.25, atol=0.035)


def test_greedy_is_argmax_and_needs_no_key():
  config = sampling.SamplingConfig()
  chosen = sampling.choose(LOGITS, None, 0, config)
  np.testing.assert_array_equal(chosen, LOGITS.argmax(-1))
  assert chosen.dtype == jnp.int32


def test_keys_are_those_of_their_own_seed():
  config = sampling.SamplingConfig(temperature=1.0, seed=5)
  many = jax.random.key_data(sampling.keys(config, 4))
  for row in range(4):
    alone = sampling.SamplingConfig(temperature=1.0, seed=5 + row)
    one = jax.random.key_data(sampling.keys(alone, 1))
    np.testing.assert_array_equal(many[row], one[0])


@pytest.mark.parametrize(
  "settings",
  [
    {"temperature": -0.1},
    {"temperature": float("inf")},
    {"temperature": float("nan")},
    {"top_k": -1},
    {"top_p": 0.0},
    {"top_p": 1.1},
  ],
  ids=str,
)
def test_refusals_name_the_flag(settings):
  with pytest.raises(errors.UserError, match=f"--{next(iter(settings))}="):
    sampling.SamplingConfig(**settings)
