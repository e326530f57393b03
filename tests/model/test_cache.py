"""Cached decoding equals the full forward, however the tokens come."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from llama_jax.model import cache as cache_lib
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes

HEADS = {"GQA": (4, 2), "MHA": (4, 4), "MQA": (4, 1)}
SLOTS = 40


def make(heads):
  N, K = HEADS[heads]
  config = dataclasses.replace(
    sizes.get("nano"), num_heads=N, num_kv_heads=K, tied_embeddings=False
  )
  decoder = decoder_lib.Decoder(config)
  params = jax.jit(
    lambda: nn.unbox(decoder_lib.init(decoder, jax.random.key(0)))
  )()
  params = jax.tree.map(lambda leaf: np.asarray(leaf) * 4, params)
  return decoder, params


def full(decoder, params, ids, positions, segments):
  return np.asarray(
    jax.jit(lambda p, *b: decoder.apply({"params": p}, *b)[0])(
      params, ids, positions, segments
    )
  )


def cached(decoder, params, ids, positions, segments, sizes_of_parts):
  """Logits of all tokens, read part by part into a cache."""
  unrolled = decoder.clone(scan=False)
  step = jax.jit(
    lambda p, *b: unrolled.apply({"params": p}, *b), static_argnames=()
  )
  cache = cache_lib.empty(decoder.config, len(ids), SLOTS, "float32")
  params = decoder_lib.unstack(params)
  out, start = [], 0
  for size in sizes_of_parts:
    part = slice(start, start + size)
    logits, cache = step(
      params, ids[:, part], positions[:, part], segments[:, part], cache
    )
    out.append(np.asarray(logits))
    start += size
  assert start == ids.shape[1] and int(cache.used) == start
  return np.concatenate(out, axis=1)


@functools.cache
def case(heads):
  decoder, params = make(heads)
  rng = np.random.default_rng(0)
  ids = rng.integers(512, size=(3, 24), dtype=np.int32)
  # Left padding: row b's text begins at these columns.
  positions, segments = np.zeros_like(ids), np.zeros_like(ids)
  for row, first in enumerate((0, 5, 9)):
    positions[row, first:] = np.arange(24 - first)
    segments[row, first:] = 1
  batch = ids, positions, segments
  return decoder, params, batch, full(decoder, params, *batch)


@pytest.mark.parametrize(
  "parts",
  [[10] + [1] * 14, [1] * 24, [10, 7, 7], [24]],
  ids=["prefill, then one by one", "one by one", "chunks", "prefill alone"],
)
def test_parts_equal_the_whole(parts):
  decoder, params, batch, want = case("GQA")
  ours = cached(decoder, params, *batch, parts)
  real = batch[2] > 0
  assert np.abs(want[real]).max() > 1
  np.testing.assert_allclose(ours[real], want[real], atol=5e-5)
  assert np.isfinite(ours).all()


@pytest.mark.parametrize("heads", ["MHA", "MQA"])
def test_other_head_counts(heads):
  decoder, params, batch, want = case(heads)
  ours = cached(decoder, params, *batch, [11, 1, 1, 11])
  real = batch[2] > 0
  np.testing.assert_allclose(ours[real], want[real], atol=5e-5)


def test_padding_is_not_seen():
  """Other ids under the padding change nothing."""
  decoder, params, (ids, positions, segments), _ = case("GQA")
  other = np.where(segments > 0, ids, (ids + 1) % 512)
  parts = [12, 1, 11]
  first = cached(decoder, params, ids, positions, segments, parts)
  second = cached(decoder, params, other, positions, segments, parts)
  real = segments > 0
  np.testing.assert_array_equal(first[real], second[real])


def test_stacked_params_cannot_be_cached():
  decoder, params, batch, _ = case("GQA")
  cache = cache_lib.empty(decoder.config, 3, SLOTS, "float32")
  with pytest.raises(ValueError, match="scan=False"):
    decoder.apply({"params": params}, *batch, cache)
