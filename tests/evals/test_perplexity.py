"""Windows by brute force; packed scoring equals each window alone."""

import functools

import jax
import numpy as np
import pytest

from llama_jax import errors, text
from llama_jax.evals import perplexity
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes

NANO = sizes.get("nano")
DECODER = decoder_lib.Decoder(NANO)
BOS = 999


def cut(documents, window, stride, bos=None):
  return list(perplexity.windows(documents, window, stride, bos))


def scored(windows):
  """(document, context, token) of each scored token."""
  return [
    (one.document, tuple(one.tokens[:i]), one.tokens[i])
    for one in windows
    for i in range(one.first_scored, len(one.tokens))
  ]


def brute_force(document, window, stride, bos):
  """For each token: the window that scores it first, if any does."""
  room = window - (bos is not None)
  stride = min(stride, room)
  found = []
  for at, token in enumerate(document):
    start = 0
    while start + room <= at:
      start += stride
    context = document[start:at]
    if bos is not None:
      context = [bos, *context]
    if context:
      found.append((tuple(context), token))
  return found


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize(
  "window, stride", [(4, 4), (4, 1), (5, 3), (8, 8), (8, 2), (100, 100)]
)
def test_each_token_is_scored_once_where_first_seen(window, stride, bos):
  for length in range(25):
    document = list(range(1, length + 1))
    got = scored(cut([document], window, stride, bos))
    want = brute_force(document, window, stride, bos)
    assert [(context, token) for _, context, token in got] == want
    if bos is not None:
      assert len(got) == length
  for one in cut([list(range(1, 25))], window, stride, bos):
    assert len(one.tokens) <= window


def test_without_bos_a_windows_first_token_is_not_scored():
  windows = cut([list(range(10))], 4, 4)
  assert [one.tokens for one in windows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
  assert [token for *_, token in scored(windows)] == [1, 2, 3, 5, 6, 7, 9]


def test_with_overlap_only_the_first_token_is_not_scored():
  windows = cut([list(range(10))], 4, 2)
  assert [token for *_, token in scored(windows)] == list(range(1, 10))
  # With two tokens of context at least.
  assert all(len(context) >= 2 for _, context, _ in scored(windows)[2:])


def test_documents_stay_apart():
  windows = cut([[1, 2, 3], [], [4], [5, 6]], 8, 8, BOS)
  assert [(one.document, one.tokens) for one in windows] == [
    (0, [BOS, 1, 2, 3]),
    (2, [BOS, 4]),
    (3, [BOS, 5, 6]),
  ]


@pytest.mark.parametrize(
  "window, stride, bos, said",
  [
    (1, 1, None, "--window=1"),
    (1, 1, BOS, "--window=1"),
    (8, 0, None, "--stride=0"),
    (8, 9, None, "--stride=9"),
  ],
)
def test_refusals(window, stride, bos, said):
  with pytest.raises(errors.UserError, match=said):
    cut([[1, 2, 3]], window, stride, bos)


def test_rows_hold_every_window_in_order():
  windows = cut([list(range(n)) for n in (3, 9, 1, 8, 2, 2, 30)], 10, 10)
  rows = perplexity.pack(windows, 10)
  assert [one for row in rows for one in row] == windows
  assert max(sum(len(one.tokens) for one in row) for row in rows) <= 10
  assert len(rows) < len(windows)


@functools.partial(jax.jit, static_argnames="decoder")
def logits(params, ids, positions, *, decoder):
  return decoder.apply(
    {"params": params}, ids, positions, jax.numpy.ones_like(ids)
  )[0]


def alone(params, tokens):
  """Losses of tokens 1, 2, ... of one window, float64."""
  # Padded behind to one length, so that one program serves.
  ids = np.zeros((1, 32), np.int32)
  ids[0, : len(tokens)] = tokens
  positions = np.arange(32, dtype=np.int32)[None]
  out = np.float64(logits(params, ids, positions, decoder=DECODER)[0])
  logprobs = out - np.log(np.exp(out).sum(-1, keepdims=True))
  return -logprobs[np.arange(len(tokens) - 1), tokens[1:]]


def test_packed_scoring_equals_each_window_alone(random_params):
  params = random_params(NANO)
  rng = np.random.default_rng(0)
  documents = [
    rng.integers(512, size=size).tolist() for size in (40, 7, 1, 19, 3, 28, 12)
  ]
  windows = cut(documents, 32, 20, 1)
  got = list(perplexity.losses(DECODER, params, windows, 32))
  assert [one for one, _ in got] == windows
  # More rows than one call holds, and more windows than rows.
  assert len(windows) > len(perplexity.pack(windows, 32)) > perplexity.ROWS
  for one, nll in got:
    want = alone(params, one.tokens)[one.first_scored - 1 :]
    np.testing.assert_allclose(nll, want, atol=1e-4)


@pytest.mark.parametrize("bos", [False, True])
def test_evaluate_by_hand(random_params, tokenizer_folder, bos):
  params = random_params(NANO)
  tokenizer = text.load_tokenizer(tokenizer_folder)
  texts = ["def decode(self, s):", "", "é", "return None\n" * 12]
  results = dict(
    perplexity.evaluate(
      DECODER, params, texts, tokenizer, window=32, stride=32, bos=bos
    )
  )
  ids = [tokenizer.encode(one) for one in texts]
  room = 31 if bos else 32
  sums, counts = np.zeros(4), np.zeros(4, int)
  for index, tokens in enumerate(ids):
    for start in range(0, len(tokens), room):
      part = tokens[start : start + room]
      nll = alone(params, [tokenizer.bos_id, *part] if bos else part)
      sums[index] += nll.sum()
      counts[index] += len(nll)
  assert len(ids[3]) > 32
  np.testing.assert_allclose(
    results["mean_loss"], sums.sum() / counts.sum(), rtol=1e-5
  )
  np.testing.assert_allclose(
    results["perplexity"], np.exp(results["mean_loss"]), rtol=1e-9
  )
  assert results["scored_tokens"] == counts.sum()
  assert results["tokens"] == sum(map(len, ids))
  assert results["bytes"] == 20 + 0 + 2 + 144
  assert results["bytes_per_token"] == 166 / sum(map(len, ids))
  for index, one in enumerate(results["documents"]):
    assert one["scored_tokens"] == counts[index]
    if counts[index]:
      want = sums[index] / counts[index]
      np.testing.assert_allclose(one["mean_loss"], want, rtol=1e-5)
    else:
      assert one["mean_loss"] is None


def test_evaluate_refuses(random_params, tokenizer_folder):
  tokenizer = text.load_tokenizer(tokenizer_folder)

  def run(texts, window):
    return dict(
      perplexity.evaluate(
        DECODER, {}, texts, tokenizer, window=window, stride=8, bos=False
      )
    )

  with pytest.raises(errors.UserError, match="context of 256"):
    run(["some text"], 257)
  with pytest.raises(errors.UserError, match="no token"):
    run([""], 16)
