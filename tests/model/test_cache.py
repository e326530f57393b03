"""Cached decoding equals the full forward, however the tokens come."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from llama_jax.model import cache as cache_lib
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes
from llama_jax.model import unrolled as unrolled_lib

HEADS = {"GQA": (4, 2), "MHA": (4, 4), "MQA": (4, 1)}
SLOTS = 40


@functools.partial(jax.jit, static_argnames="decoder")
def apply(params, *batch, decoder):
  return decoder.apply({"params": params}, *batch)


def cached(decoder, params, ids, positions, segments, sizes_of_parts):
  """Logits of all tokens, read part by part into a cache."""
  unrolled = decoder.clone(scan=False)
  cache = cache_lib.empty(decoder.config, len(ids), SLOTS, "float32")
  params = unrolled_lib.unstack(params)
  out, start = [], 0
  for size in sizes_of_parts:
    part = slice(start, start + size)
    batch = (a[:, part] for a in (ids, positions, segments))
    logits, cache = apply(params, *batch, cache, decoder=unrolled)
    out.append(np.asarray(logits))
    start += size
  assert start == ids.shape[1] and int(cache.used) == start
  return np.concatenate(out, axis=1)


@pytest.fixture(scope="module")
def case(random_params):
  """heads -> decoder, params, a left-padded batch and its full forward."""

  @functools.cache
  def make(heads):
    N, K = HEADS[heads]
    config = dataclasses.replace(
      sizes.get("nano"), num_heads=N, num_kv_heads=K, tied_embeddings=False
    )
    decoder = decoder_lib.Decoder(config)
    params = random_params(config)
    rng = np.random.default_rng(0)
    ids = rng.integers(512, size=(3, 24), dtype=np.int32)
    # Row b's text begins at these columns.
    positions, segments = np.zeros_like(ids), np.zeros_like(ids)
    for row, first in enumerate((0, 5, 9)):
      positions[row, first:] = np.arange(24 - first)
      segments[row, first:] = 1
    batch = ids, positions, segments
    return decoder, params, batch, apply(params, *batch, decoder=decoder)[0]

  return make


@pytest.mark.parametrize(
  "parts",
  [[10] + [1] * 14, [1] * 24, [10, 7, 7]],
  ids=["prefill, then one by one", "one by one", "chunks"],
)
def test_parts_equal_the_whole(parts, case):
  decoder, params, batch, want = case("GQA")
  ours = cached(decoder, params, *batch, parts)
  real = batch[2] > 0
  assert np.abs(want[real]).max() > 1
  np.testing.assert_allclose(ours[real], want[real], atol=5e-5)
  assert np.isfinite(ours).all()


@pytest.mark.parametrize("heads", ["MHA", "MQA"])
def test_other_head_counts(heads, case):
  decoder, params, batch, want = case(heads)
  ours = cached(decoder, params, *batch, [10, 14])
  real = batch[2] > 0
  np.testing.assert_allclose(ours[real], want[real], atol=5e-5)


def test_padding_is_not_seen(case):
  """Other ids under the padding change nothing."""
  decoder, params, (ids, positions, segments), _ = case("GQA")
  other = np.where(segments > 0, ids, (ids + 1) % 512)
  parts = [10, 7, 7]
  first = cached(decoder, params, ids, positions, segments, parts)
  second = cached(decoder, params, other, positions, segments, parts)
  real = segments > 0
  np.testing.assert_array_equal(first[real], second[real])


def test_stacked_params_cannot_be_cached(case):
  decoder, params, batch, _ = case("GQA")
  cache = cache_lib.empty(decoder.config, 3, SLOTS, "float32")
  with pytest.raises(ValueError, match="scan=False"):
    decoder.apply({"params": params}, *batch, cache)
