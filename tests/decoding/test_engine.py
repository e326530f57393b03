"""The engine against the plain forward, one request at a time."""

import jax
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.decoding import engine as engine_lib
from llama_jax.decoding import placement, sampling
from llama_jax.decoding import request as request_lib
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes
from llama_jax.model import unrolled as unrolled_lib
from llama_jax.parallel import mesh as mesh_lib

NANO = sizes.get("nano")
DECODER = decoder_lib.Decoder(NANO, scan=False)
GREEDY = sampling.SamplingConfig()
WARM = sampling.SamplingConfig(temperature=1.0, top_k=50, seed=4)
SMALL = {
  "cache_tokens": 1024,
  "page_size": 32,
  "max_batch": 8,
  "chunk": 32,
  "tokens_per_call": 4,
}


@pytest.fixture(scope="module")
def stacked(random_params):
  return random_params(NANO)


@pytest.fixture(scope="module")
def params(stacked):
  return jax.tree.map(jax.numpy.asarray, unrolled_lib.unstack(stacked))


@pytest.fixture(scope="module")
def forward(stacked):
  """ids -> log-probabilities [T, V] of one plain forward over all."""

  @jax.jit
  def full(params, ids_1T):
    where = np.arange(ids_1T.shape[1], dtype=np.int32)[None]
    decoder = DECODER.clone(scan=True)
    ones = np.ones_like(where)
    return decoder.apply({"params": params}, ids_1T, where, ones)[0][0]

  def logprobs(ids):
    padded = np.zeros((1, NANO.context_length), np.int32)
    padded[0, : len(ids)] = ids
    exact = np.asarray(full(stacked, padded))[: len(ids)].astype(np.float64)
    return exact - np.log(np.exp(exact).sum(-1, keepdims=True))

  return logprobs


def make(params, **settings):
  config = engine_lib.EngineConfig(**(SMALL | settings))
  return engine_lib.Engine(DECODER, params, config)


def ask(prompt, new=12, config=GREEDY, **rest):
  return request_lib.Request(prompt, new, config, **rest)


def prompts(count, longest=100, seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, longest, count)
  return [rng.integers(NANO.vocab_size, size=n).tolist() for n in lengths]


def check_greedy(forward, request, completion):
  """Each token is the argmax after those before it, up to ties."""
  tokens = completion.tokens
  exact = forward([*request.prompt, *tokens])[len(request.prompt) - 1 :]
  for place, token in enumerate(tokens):
    best = exact[place].max()
    assert exact[place, token] >= best - 1e-4, place
    if completion.logprobs:
      told = completion.logprobs[place]
      np.testing.assert_allclose(told.chosen, exact[place, token], atol=1e-4)
      for word, value in told.top:
        np.testing.assert_allclose(value, exact[place, word], atol=1e-4)
      assert len(told.top) == request.logprobs


def test_many_mixed_requests_equal_the_plain_forward(params, forward):
  """200 of any length through 8 rows, with preemption, all counted back."""
  engine = make(params, cache_tokens=384)
  rng = np.random.default_rng(1)
  requests = [
    ask(
      prompt,
      int(rng.integers(1, 70)),
      stop_ids=rng.integers(NANO.vocab_size, size=10).tolist(),
      logprobs=3,
    )
    for prompt in prompts(200)
  ]
  found = engine.run(requests)
  reasons = set()
  for request, (completion,) in zip(requests, found, strict=True):
    check_greedy(forward, request, completion)
    reasons.add(completion.finish_reason)
    stops = [token in request.stop_ids for token in completion.tokens]
    assert not any(stops[:-1])
    if completion.finish_reason == request_lib.STOP:
      assert stops[-1]
    else:
      assert len(stops) == request.max_new_tokens
      assert not stops[-1]
  assert reasons == {"stop", "length"}
  assert engine.counts.preempted > 0
  assert engine.pages.held == 0
  assert not engine.busy


@pytest.fixture(scope="module")
def alone(params):
  """A request -> its answers, of an engine that has nothing else to do."""

  def run(request):
    return make(params).run([request])[0]

  return run


def test_a_warm_answer_does_not_depend_on_its_company(params, alone):
  """Seeds, penalties and biases beside rows that have others or none."""
  warm = {"temperature": 0.9}
  configs = [
    sampling.SamplingConfig(**warm | one)
    for one in (
      {"seed": 3},
      {"seed": 3, "top_p": 0.9, "repetition_penalty": 1.3},
      {"seed": 4, "top_k": 20, "logit_bias": ((5, 4.0), (7, 2.0))},
      {"seed": 5, "min_p": 0.01, "frequency_penalty": 0.5},
    )
  ]
  requests = [
    ask(prompt, 10, config, samples=2, min_new_tokens=3, stop_ids=(5, 9))
    for prompt, config in zip(prompts(4), configs, strict=True)
  ]
  requests += [ask(prompt, 10) for prompt in prompts(3, seed=2)]
  together = make(params).run(requests)
  for request, answers in zip(requests, together, strict=True):
    want = alone(request)
    assert [a.tokens for a in answers] == [a.tokens for a in want]
    for answer in answers:
      assert not {5, 9} & set(answer.tokens[: request.min_new_tokens - 1])
  assert together[0][0].tokens != together[0][1].tokens


def test_answers_to_one_prompt_share_its_pages(params, forward):
  """Read once: later ones begin with what is there; all equal the forward."""
  (prompt,) = [p for p in prompts(20) if 70 < len(p) < 90][:1]
  engine = make(params)
  request = ask(prompt, 6, samples=5, logprobs=0)
  (answers,) = engine.run([request])
  for answer in answers:
    check_greedy(forward, request, answer)
  whole = len(prompt) // 32 * 32
  assert engine.counts.shared_tokens == 4 * whole
  # And what another conversation began with is found again later.
  again = ask([*prompt, *answers[0].tokens, 1, 2], 6)
  before = engine.counts.shared_tokens
  check_greedy(forward, again, engine.run([again])[0][0])
  assert engine.counts.shared_tokens - before >= whole


def test_log_probabilities_of_a_prompt(params, forward):
  """Read in several chunks, beside others."""
  requests = [
    ask(prompt, 2, prompt_logprobs=top)
    for prompt, top in zip(prompts(4), (2, None, 0, 3), strict=True)
  ]
  for request, (answer,) in zip(
    requests, make(params).run(requests), strict=True
  ):
    told = answer.prompt_logprobs
    if request.prompt_logprobs is None:
      assert told == []
      continue
    assert len(told) == len(request.prompt) - 1
    exact = forward(request.prompt)
    for place, one in enumerate(told):
      want = exact[place, request.prompt[place + 1]]
      np.testing.assert_allclose(one.chosen, want, atol=1e-4)
      best = np.sort(exact[place])[::-1][: request.prompt_logprobs]
      np.testing.assert_allclose([v for _, v in one.top], best, atol=1e-4)


class Alternating:
  """A constraint: even and odd ids in turn, seven in all."""

  def __init__(self, said=()):
    self.said = list(said)

  @property
  def done(self):
    return len(self.said) == 7

  def mask(self):
    bits = np.arange(NANO.vocab_size) % 2 == len(self.said) % 2
    return np.packbits(bits, bitorder="little").view(np.uint32)

  def accept(self, tokens):
    self.said += tokens

  def copy(self):
    return Alternating(self.said)


def test_a_constraint_holds_for_its_own_rows(params, forward):
  free = ask(prompts(1)[0], 9)
  bound = ask(prompts(1)[0], 9, WARM, samples=2, constraint=Alternating())
  (plain,), answers = make(params).run([free, bound])
  check_greedy(forward, free, plain)
  for answer in answers:
    assert [token % 2 for token in answer.tokens] == [0, 1, 0, 1, 0, 1, 0]
    assert answer.finish_reason == request_lib.STOP


def test_a_cancelled_request_gives_its_pages_back_at_once(params):
  engine = make(params)
  number = engine.submit(ask(prompts(1)[0], 100))
  while not any(one.tokens for one in engine.step()):
    pass
  assert engine.pages.held > 0
  engine.cancel(number)
  assert engine.pages.held == 0
  (last,) = engine.step()
  assert last.completion.finish_reason == request_lib.CANCELLED
  assert not engine.busy


@pytest.mark.parametrize(
  "settings, said",
  [
    ({"prompt": []}, ["prompt is empty"]),
    ({"prompt": [1] * 250, "new": 7}, ["context of 256"]),
    (
      {"prompt": [1] * 35, "new": 99},
      ["35 tokens", "5 pages", "are 4", "cache_tokens=134"],
    ),
    ({"prompt": [1, 512]}, ["out of range", "0 to 511"]),
    ({"new": 0}, ["--max_new_tokens=0", "1 or more"]),
    ({"samples": 0}, ["--n=0", "1 or more"]),
    ({"min_new_tokens": 6}, ["--min_new_tokens=6", "--max_new_tokens=5"]),
    ({"logprobs": -1}, ["--logprobs=-1", "0 or more"]),
    ({"prompt_logprobs": 513}, ["--prompt_logprobs=513", "512 at most"]),
  ],
  ids=str,
)
def test_what_can_never_be_answered_is_refused(params, settings, said):
  engine = make(params, cache_tokens=128)
  with pytest.raises(errors.UserError) as caught:
    engine.submit(ask(**{"prompt": [1], "new": 5, **settings}))
  for words in said:
    assert words in str(caught.value)
  assert not engine.busy


@pytest.mark.parametrize(
  "settings",
  [{"page_size": 0}, {"max_batch": True}, {"cache_dtype": "int7"}],
  ids=str,
)
def test_refused_settings(settings):
  with pytest.raises(errors.UserError, match=next(iter(settings))):
    engine_lib.EngineConfig(**settings)


def test_memory_is_what_was_planned(params):
  """The pool from the start; the copy of the rows that run never above."""
  settings = {"cache_dtype": "bfloat16", "cache_tokens": 640}
  engine = make(params, **settings)
  config = engine_lib.EngineConfig(**SMALL | settings)
  planned = engine_lib.cache_bytes(config, NANO, "float32")

  def held(tree):
    arrays = (leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 4)
    return sum(leaf.nbytes for leaf in arrays)

  def copied():
    caches = [one for one in engine._copies.caches if one is not None]
    return sum(a.nbytes for one in caches for a in (*one.keys, *one.values))

  pool = held(engine._pools)
  for prompt in prompts(12):
    engine.submit(ask(prompt, 20))
  most = 0
  while engine.busy:
    engine.step()
    most = max(most, copied())
    assert held(engine._pools) == pool
  assert most > 0 and pool + most <= planned
  # Of several rows at once, or it would be no test.
  assert most > planned / 4


def test_a_row_too_long_to_copy_is_read_page_by_page(params, forward):
  """Pages of a request that leaves no room for a copy of them."""
  engine = make(params, cache_tokens=224)
  requests = [ask(prompt, 20) for prompt in prompts(2)] + [ask([5] * 190, 20)]
  for request, (answer,) in zip(requests, engine.run(requests), strict=True):
    check_greedy(forward, request, answer)


def test_sharded_equals_one_device(params, alone):
  """Rows and heads split (weights too: test_batch.py); one prompt is longer
  than a chunk."""
  sizes_ = {"data": 2, "fsdp": 1, "tensor": 2}
  mesh = mesh_lib.make(mesh_lib.ParallelConfig(**sizes_), jax.devices()[:4])
  engine = engine_lib.Engine(
    DECODER,
    placement.place(DECODER, params, mesh),
    engine_lib.EngineConfig(**SMALL),
    mesh=mesh,
  )
  asked = [
    ask(prompt, 9, samples=n)
    for prompt, n in zip(prompts(3), (1, 2, 1), strict=True)
  ]
  (key,) = {leaf.sharding for leaf in jax.tree.leaves(engine._pools)}
  assert key.spec[1] == "tensor"
  for request, found in zip(asked, engine.run(asked), strict=True):
    want = alone(request)
    assert [a.tokens for a in found] == [a.tokens for a in want]
