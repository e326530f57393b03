"""Sampling against distributions worked out in NumPy, word by word."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy import special

from llama_jax import errors
from llama_jax.decoding import sampling

V = 11
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, V)).astype(np.float32) * 2
# What the rows have read and said: some words in both, some in neither.
PROMPTS = [RNG.integers(V, size=4).tolist() for _ in LOGITS]
ANSWERS = [RNG.integers(V, size=5).tolist() for _ in LOGITS]


def by_hand(logits, config, prompt=(), answer=()):
  """(kept words, logits of the distribution) of one row, word by word."""
  logits = logits.astype(np.float64).copy()
  for word, added in config.logit_bias:
    logits[word] += added
  for word in range(len(logits)):
    times = list(answer).count(word)
    if word in prompt or times:
      r = config.repetition_penalty
      logits[word] = logits[word] / r if logits[word] > 0 else logits[word] * r
    logits[word] -= config.frequency_penalty * times
    logits[word] -= config.presence_penalty * (times > 0)
  logits /= config.temperature or 1
  ranking = np.argsort(-logits)[: config.top_k or None]
  probs = np.exp(logits[ranking] - logits.max())
  mass, held, kept = probs.sum(), 0.0, []
  for word, prob in zip(ranking, probs, strict=True):
    if config.top_p < 1 and held >= config.top_p * mass:
      break
    if prob >= config.min_p and np.isfinite(logits[word]):
      kept.append(int(word))
    held += prob
  return sorted(kept), logits


def shaped(logits, configs, prompts=None, answers=None):
  knobs, features = sampling.knobs(configs)
  seen = None
  if features.penalties:
    seen = sampling.seen(prompts, answers, V)
  drawn = np.zeros(len(logits), np.int32)
  function = jax.jit(sampling.shape, static_argnames="features")
  return np.asarray(
    function(logits, knobs, drawn, features=features, seen_=seen)
  )


WARM = {"temperature": 1.0}
COMBINATIONS = [
  WARM,
  {"temperature": 1.7},
  *({"top_k": k} | WARM for k in (1, 4, V, 50)),
  *({"top_p": p} | WARM for p in (0.9, 0.5, 1e-6)),
  *({"min_p": p} | WARM for p in (0.02, 0.5, 1.0)),
  {"repetition_penalty": 1.5} | WARM,
  {"repetition_penalty": 0.6} | WARM,
  {"presence_penalty": 0.7} | WARM,
  {"frequency_penalty": 0.4} | WARM,
  {"frequency_penalty": -0.4} | WARM,
  {"logit_bias": ((3, 2.0), (5, -1.5), (9, float("-inf")))} | WARM,
  {"temperature": 0.5, "top_k": 6, "top_p": 0.8},
  {"temperature": 0.8, "top_p": 0.95, "min_p": 0.1},
  {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.05}
  | {"repetition_penalty": 1.2, "presence_penalty": 0.3}
  | {"frequency_penalty": 0.2, "logit_bias": ((0, 1.0),)},
]


@pytest.mark.parametrize("settings", COMBINATIONS, ids=str)
def test_the_distribution(settings):
  config = sampling.SamplingConfig(**settings)
  out = shaped(LOGITS, [config] * len(LOGITS), PROMPTS, ANSWERS)
  for row, logits, prompt, answer in zip(
    out, LOGITS, PROMPTS, ANSWERS, strict=True
  ):
    kept, want = by_hand(logits, config, prompt, answer)
    assert np.flatnonzero(row > -np.inf).tolist() == kept
    # Float32 against float64.
    np.testing.assert_allclose(row[kept], want[kept], rtol=1e-5, atol=1e-6)


def test_a_row_does_not_feel_the_knobs_of_others():
  """Bit for bit what it is alone, whatever the program is compiled for."""
  configs = [sampling.SamplingConfig(**one) for one in COMBINATIONS[-6:]]
  together = shaped(LOGITS, configs, PROMPTS, ANSWERS)
  for row, config in enumerate(configs):
    one = slice(row, row + 1)
    alone = shaped(LOGITS[one], [config], PROMPTS[one], ANSWERS[one])
    np.testing.assert_array_equal(together[one], alone)


def test_the_border_keeps_equals():
  logits = np.log(np.asarray([[0.4, 0.2, 0.2, 0.1, 0.1]], np.float32))
  for knob, value, kept in (
    ("top_k", 2, [0, 1, 2]),
    ("top_k", 4, [0, 1, 2, 3, 4]),
    ("top_p", 0.5, [0, 1, 2]),
  ):
    config = sampling.SamplingConfig(temperature=1.0, **{knob: value})
    row = shaped(logits, [config])[0]
    assert np.flatnonzero(row > -np.inf).tolist() == kept


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4])
def test_top_k_at_any_scale(scale):
  """Exactly k of many different logits, negative ones and zeros among them."""
  logits = np.random.default_rng(1).permutation(np.linspace(-1, 1, 501))[None]
  logits = (logits * scale).astype(np.float32)
  for k in (1, 77, 250, 251, 252, 500):
    config = sampling.SamplingConfig(temperature=1.0, top_k=k)
    row = shaped(logits, [config])[0]
    assert set(np.flatnonzero(row > -np.inf)) == set(np.argsort(-logits[0])[:k])


def choose(logits, configs, drawn, seen=None, **rest):
  knobs, features = sampling.knobs(configs, **rest)
  function = jax.jit(sampling.choose, static_argnames="features")
  return np.asarray(
    function(logits, knobs, drawn, features=features, seen_=seen)
  )


def probabilities(logits, config, prompt=(), answer=()) -> np.ndarray:
  """Of each word to be drawn next, by hand."""
  kept, shaped_logits = by_hand(logits, config, prompt, answer)
  probs = np.zeros(len(logits))
  probs[kept] = np.exp(shaped_logits[kept] - shaped_logits[kept].max())
  return probs / probs.sum()


def check_frequencies(drawn, probs):
  """Chi-square: worse than this is one in 100,000."""
  got, want = np.bincount(drawn, minlength=len(probs)), len(drawn) * probs
  assert got[probs == 0].sum() == 0
  # The rarest count together, as so few are not distributed normally.
  order = np.argsort(want)
  rare = np.searchsorted(np.cumsum(want[order]), 5)
  cells = [0, *range(rare + 1, len(want))]
  got, want = (np.add.reduceat(one[order], cells) for one in (got, want))
  if len(want) > 1:
    statistic = ((got - want) ** 2 / want).sum()
    chance = special.gammaincc((len(want) - 1) / 2, statistic / 2)
    assert chance > 1e-5, (got, want)


PENALTIES = (
  {"repetition_penalty": 1.6},
  {"presence_penalty": 0.8},
  {"frequency_penalty": 0.5},
)
OTHERS = (
  {"temperature": 0.6},
  {"top_k": 5},
  {"top_p": 0.8},
  {"min_p": 0.08},
  {"logit_bias": ((3, 2.0), (5, -1.5))},
)
PAIRS = [
  WARM | one | two
  for one, two in itertools.combinations((*PENALTIES, *OTHERS), 2)
  if one in PENALTIES
]


@pytest.mark.parametrize("settings", [*COMBINATIONS, *PAIRS], ids=str)
def test_frequencies(settings):
  """Over 4,000 answers to one request that has said some words already."""
  config = sampling.SamplingConfig(**settings, seed=3)
  count, logits = 4000, LOGITS[0]
  # Words in both, in one of them, thrice in the answer, and in neither.
  prompt, answer = [0, 3, 3, 7], [7, 7, 2, 5, 7]
  drawn = choose(
    np.tile(logits, (count, 1)),
    [config] * count,
    np.full(count, 5),
    sampling.seen([prompt] * count, [answer] * count, V),
    samples=list(range(count)),
  )
  check_frequencies(drawn, probabilities(logits, config, prompt, answer))


@pytest.mark.parametrize(
  "settings",
  [*PENALTIES, PENALTIES[0] | PENALTIES[1] | PENALTIES[2] | {"top_k": 3}],
  ids=str,
)
def test_a_penalty_is_for_what_was_just_drawn(settings):
  """Over 4,000 pairs of draws, the second after the first was noted."""
  config = sampling.SamplingConfig(**WARM | settings, seed=5)
  count, logits, prompt = 4000, LOGITS[0][:5], [1, 4]
  knobs, features = sampling.knobs([config] * count, samples=list(range(count)))

  @jax.jit
  def twice(logits_BV, said):
    found = []
    for drawn in range(2):
      drawn_B = jnp.full(count, drawn)
      found.append(
        sampling.choose(logits_BV, knobs, drawn_B, features, seen_=said)
      )
      said = said.add(found[-1])
    return found

  first, second = twice(
    np.tile(logits, (count, 1)),
    sampling.seen([prompt] * count, [()] * count, 5),
  )
  joint = np.concatenate(
    [
      chance * probabilities(logits, config, prompt, [word])
      for word, chance in enumerate(probabilities(logits, config, prompt))
    ]
  )
  check_frequencies(np.asarray(5 * first + second), joint)


@pytest.mark.parametrize("apart", ["place", "sample", "seed"])
def test_draws_are_independent(apart):
  """Neighbours by place, sample or seed: pairs are as frequent as products."""
  count = 4000
  numbers = list(range(count))
  configs = [
    sampling.SamplingConfig(temperature=1.0, seed=i if apart == "seed" else 7)
    for i in numbers
  ]
  drawn = choose(
    jnp.zeros((count, 2)),
    configs,
    np.asarray(numbers if apart == "place" else [3] * count, np.int32),
    samples=numbers if apart == "sample" else None,
  )
  pairs = np.bincount(2 * drawn[:-1] + drawn[1:], minlength=4) / (count - 1)
  # Standard deviation of each is 0.007.
  np.testing.assert_allclose(pairs, 0.25, atol=0.035)


def test_greedy_rows_among_drawn_ones():
  greedy, warm = sampling.SamplingConfig(), sampling.SamplingConfig(1.0)
  mixed = choose(LOGITS, [greedy, warm] * 3, np.zeros(6, np.int32))
  np.testing.assert_array_equal(mixed[::2], LOGITS.argmax(-1)[::2])
  assert mixed.dtype == jnp.int32


def test_a_stop_is_held_back_until_the_least():
  config = sampling.SamplingConfig()
  order = np.argsort(-LOGITS[0])
  stops = [order[:2].tolist(), order[:1].tolist(), []]
  hold = functools.partial(
    choose, np.tile(LOGITS[0], (3, 1)), [config] * 3, stop_ids=stops
  )
  for drawn, want in ((4, order[[2, 1, 0]]), (5, order[[0, 0, 0]])):
    got = hold(np.full(3, drawn), least=[5, 5, 5])
    np.testing.assert_array_equal(got, want)


def test_what_is_not_allowed_is_never_drawn():
  config = sampling.SamplingConfig(temperature=3.0)
  vocab, count = 70, 500
  allowed = {3, 31, 32, 69}
  words = np.zeros((1, 3), np.uint32)
  for word in allowed:
    words[0, word // 32] |= np.uint32(1) << np.uint32(word % 32)
  knobs, features = sampling.knobs([config] * count, samples=list(range(count)))
  drawn = sampling.choose(
    jnp.zeros((count, vocab)),
    knobs,
    np.zeros(count, np.int32),
    features,
    allowed_BW=np.repeat(words, count, 0),
  )
  assert set(np.asarray(drawn).tolist()) == allowed


def test_log_probabilities_are_the_models_own():
  token = np.asarray([2, 0, 1, 4, 7, 10], np.int32)
  out = sampling.logprobs(LOGITS, token, 3)
  exact = LOGITS.astype(np.float64)
  exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
  np.testing.assert_allclose(out.chosen_B, exact[np.arange(6), token], 1e-5)
  order = np.argsort(-exact, -1)[:, :3]
  np.testing.assert_array_equal(out.top_ids_BE, order)
  np.testing.assert_allclose(
    out.top_BE, np.take_along_axis(exact, order, -1), 1e-5
  )


def test_neutral_knobs_ask_for_nothing():
  assert not any(sampling.knobs([sampling.SamplingConfig()] * 2)[1])


@pytest.mark.parametrize(
  "settings",
  [
    {"temperature": -0.1},
    {"temperature": float("inf")},
    {"temperature": float("nan")},
    {"top_k": -1},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"min_p": 1.1},
    {"min_p": -0.1},
    {"repetition_penalty": 0.0},
    {"presence_penalty": float("nan")},
    {"frequency_penalty": float("inf")},
    {"logit_bias": ((-1, 1.0),)},
    {"logit_bias": ((1, float("nan")),)},
  ],
  ids=str,
)
def test_refusals_name_the_flag(settings):
  with pytest.raises(errors.UserError, match=f"--{next(iter(settings))}="):
    sampling.SamplingConfig(**settings)


@pytest.mark.parametrize("words", [128, 384, 300])
def test_the_first_of_the_likeliest(words):
  """Of equals the first, as argmax has it; words that fill vectors or not."""
  rng = np.random.default_rng(0)
  logits = rng.integers(-4, 5, size=(64, words)).astype(np.float32)
  logits[0] = -np.inf
  logits[1, -1] = 9
  got = jax.jit(sampling.likeliest)(logits)
  np.testing.assert_array_equal(got, logits.argmax(-1))
