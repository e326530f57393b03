"""FLOPs against XLA's own count, by hand, and for packed rows."""

import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes
from llama_jax.training import flops

SMOLLM2 = dataclasses.replace(sizes.get("smollm2-135m"), num_layers=3)


def counted_by_xla(config, B, T):
  """FLOPs of forward and backward, before any optimisation.

  Layers are unrolled and nothing is recomputed: XLA counts the body of a scan
  once, whatever its length. Nothing is computed, only shapes are known.
  """
  decoder = decoder_lib.Decoder(
    config, attention="reference", rematerialise="none", scan=False
  )
  params = jax.eval_shape(
    lambda: nn.unbox(decoder_lib.init(decoder, jax.random.key(0)))
  )
  ids = jax.ShapeDtypeStruct((B, T), jnp.int32)

  def loss(params, ids, targets):
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    logits, _ = decoder.apply(
      {"params": params}, ids, positions, jnp.ones_like(ids)
    )
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - chosen).sum()

  lowered = jax.jit(jax.value_and_grad(loss)).lower(params, ids, ids)
  cost = lowered.cost_analysis()
  return (cost[0] if isinstance(cost, list) else cost)["flops"]


@pytest.mark.parametrize(
  "config, B, T",
  [
    (SMOLLM2, 2, 512),
    # Attention is a third of it.
    (SMOLLM2, 1, 4096),
    (dataclasses.replace(sizes.get("llama3.2-1b"), num_layers=2), 1, 2048),
    # Untied, as many kv heads as heads.
    (dataclasses.replace(sizes.get("llama-7b"), num_layers=2), 1, 1024),
  ],
  ids=["smollm2", "smollm2 long", "llama3.2-1b", "llama-7b"],
)
def test_against_xla(config, B, T):
  """XLA counts all of attention's square, ours half: we ask for twice S.

  2 %: XLA also counts what is no matrix product, norms and softmax above all.
  """
  ours = B * T * flops.per_token(config, 2 * T)
  xla = counted_by_xla(config, B, T)
  assert ours == pytest.approx(xla, rel=0.02)
  # Attention is no rounding error here: without it, it would not fit.
  if T == 4096:
    assert B * T * flops.per_token(config, 0) < 0.8 * xla


def test_llama_7b_by_hand():
  """6.74e9 parameters less the embedding, at 2,048 tokens."""
  config = sizes.get("llama-7b")
  assert flops.matmul_weights(config) == (
    32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
  )
  attention = 6 * 32 * 2048 * 4096
  assert flops.per_token(config, 2048) == (
    6 * flops.matmul_weights(config) + attention
  )


def test_a_tied_head_counts_as_an_untied_one():
  config = sizes.get("llama3.2-1b")
  untied = dataclasses.replace(config, tied_embeddings=False)
  assert flops.per_token(config, 8) == flops.per_token(untied, 8)


def test_packed_rows_are_the_sum_of_their_documents():
  """Row by row in a loop, padding left out; ids start again in every row."""
  rng = np.random.default_rng(0)
  segments = np.zeros((2, 3, 40), np.int32)
  for row in segments.reshape(-1, 40):
    at, number = 0, 1
    while at < 33:
      length = min(int(rng.integers(1, 15)), 40 - at)
      row[at : at + length] = number
      at, number = at + length, number + 1
  # Two rows of one document each: both have the id 1, and are not one run.
  segments[0, :2] = 1
  ours = flops.attention_length(segments[1])
  want = [np.unique(row[row > 0], return_counts=True)[1] for row in segments[1]]
  want = np.concatenate(want)
  assert ours == pytest.approx((want**2).sum() / want.sum())
  assert flops.attention_length(segments[0, :2]) == 40
  config = sizes.get("nano")
  parts = sum(n * flops.per_token(config, n) for n in want)
  assert flops.of_batch(config, segments[1]) == pytest.approx(parts)
  assert flops.of_batch(config, np.zeros((2, 8), np.int32)) == 0


@pytest.mark.parametrize(
  "kind, rate",
  [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA L40S", 362e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("cpu", None),
    ("a chip of tomorrow", None),
  ],
)
def test_peaks_of_device_kinds(kind, rate):
  devices = np.array([[types.SimpleNamespace(device_kind=kind)] * 4] * 2)
  mesh = types.SimpleNamespace(devices=devices)
  assert flops.peak(mesh) == (rate and 8 * rate)


def test_frozen_weights_need_two_products_of_three():
  config = sizes.get("llama3.1-8b")
  whole = flops.per_token(config, 0)
  assert 3 * flops.per_token(config, 0, frozen=True) == 2 * whole
