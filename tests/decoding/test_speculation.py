"""Guessed tokens change how fast an answer comes and nothing else."""

import jax
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.decoding import engine as engine_lib
from llama_jax.decoding import request as request_lib
from llama_jax.decoding import sampling, speculation
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes
from llama_jax.model import unrolled as unrolled_lib

NANO = sizes.get("nano")
DECODER = decoder_lib.Decoder(NANO, scan=False)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def models(random_params):
  """The model and a draft that is near it."""
  params = random_params(NANO)
  near = jax.tree.map(
    lambda a: (a + 0.003 * RNG.normal(size=a.shape)).astype(a.dtype), params
  )
  return [
    jax.tree.map(jax.numpy.asarray, unrolled_lib.unstack(one))
    for one in (params, near)
  ]


def make(models, guesses, draft=False, **rest):
  config = engine_lib.EngineConfig(
    cache_tokens=640,
    page_size=32,
    max_batch=4,
    chunk=64,
    guesses=guesses,
    **rest,
  )
  return engine_lib.Engine(
    DECODER,
    models[0],
    config,
    draft=(DECODER, models[1]) if draft else None,
  )


def requests():
  """Greedy and warm ones, with penalties, with what repeats and what not."""
  configs = (
    sampling.SamplingConfig(),
    sampling.SamplingConfig(temperature=0.7, seed=1),
    sampling.SamplingConfig(repetition_penalty=1.2, frequency_penalty=0.3),
    sampling.SamplingConfig(temperature=1.0, top_p=0.8, seed=2),
    sampling.SamplingConfig(),
  )
  motif = RNG.integers(NANO.vocab_size, size=9).tolist()
  prompts = [motif * 6, motif * 3, motif, [3], motif * 4]
  return [
    request_lib.Request(prompt, 37, config, logprobs=2, stop_ids=(11,))
    for prompt, config in zip(prompts, configs, strict=True)
  ]


@pytest.mark.parametrize("draft", [False, True], ids=["look_up", "draft"])
def test_the_answers_are_those_without(models, draft):
  asked = requests()
  plain = make(models, 0).run(asked)
  found = make(models, 3, draft).run(asked)
  for (want,), (got,) in zip(plain, found, strict=True):
    assert got.tokens == want.tokens
    assert got.finish_reason == want.finish_reason
    for a, b in zip(got.logprobs, want.logprobs, strict=True):
      np.testing.assert_allclose(a.chosen, b.chosen, atol=1e-4)
  assert {one.finish_reason for (one,) in found} <= {"stop", "length"}


def steps(models, guesses, draft, request):
  engine = make(models, guesses, draft, tokens_per_call=1)
  engine.submit(request)
  count = 0
  while engine.busy:
    engine.step()
    count += 1
  return count


@pytest.mark.parametrize("warm", [0.0, 0.5])
def test_a_near_draft_saves_steps(models, warm):
  """Of the same model every guess is right; of a near one most are."""
  config = sampling.SamplingConfig(temperature=warm, seed=3)
  request = request_lib.Request([5, 6, 7], 60, config)
  alone = steps(models, 0, False, request)
  assert alone >= 60
  same = steps([models[0], models[0]], 3, True, request)
  assert same <= 60 / 4 + 2
  assert steps(models, 3, True, request) < alone / 2


def test_looking_up_saves_steps_where_words_repeat(models):
  """A model of zeros but for its biases says one word again and again."""
  flat = jax.tree.map(jax.numpy.zeros_like, models[0])
  request = request_lib.Request([5, 6, 7], 60, sampling.SamplingConfig())
  assert steps([flat], 3, False, request) <= 60 / 4 + 4


@pytest.mark.parametrize(
  "history, want",
  [
    # The last three stood before; what followed them then.
    ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1]),
    # Two did, later than one alone.
    ([9, 2, 3, 7, 8, 3, 6, 1, 2, 3], [7, 8, 3]),
    # Of two places alike the last.
    ([2, 3, 4, 2, 3, 5, 2, 3], [5, 2, 3]),
  ],
)
def test_what_followed_before(history, want):
  padded = np.full((1, 16), 7, np.int32)
  padded[0, : len(history)] = history
  last = np.asarray([len(history) - 1], np.int32)
  assert speculation.look_up(padded, last, 3).tolist() == [want]


def test_refusals(models):
  with pytest.raises(errors.UserError, match="guesses=1"):
    make(models, 0, draft=True)
  with pytest.raises(errors.UserError, match="guesses=-1"):
    make(models, -1)
