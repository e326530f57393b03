"""Rotary embedding against the paper's formula and complex numbers."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from llama_jax import kernels
from llama_jax.checkpoint import proof
from llama_jax.model import config as config_lib
from llama_jax.model import rope, sizes

NANO = sizes.get("nano")


def by_hand(head_dim, theta, scaling=None):
  """Wavelength by wavelength, as the Llama 3.1 report's rule is stated."""
  out = []
  for pair in range(head_dim // 2):
    frequency = 1.0 / theta ** (2 * pair / head_dim)
    if scaling is not None:
      factor, low, high, context = scaling
      wavelength = 2 * math.pi / frequency
      if wavelength > context / low:
        frequency /= factor
      elif wavelength > context / high:
        smooth = (context / wavelength - low) / (high - low)
        frequency = (1 - smooth) * frequency / factor + smooth * frequency
    out.append(frequency)
  return np.array(out)


@pytest.mark.parametrize("head_dim, theta", [(24, 1e4), (64, 1e5), (128, 5e5)])
def test_plain_frequencies(head_dim, theta):
  config = dataclasses.replace(NANO, head_dim=head_dim, rope_theta=theta)
  want = by_hand(head_dim, theta)
  np.testing.assert_allclose(rope.frequencies(config), want, rtol=1e-12)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scaled_frequencies(factor, head_dim):
  scaling = (factor, 1.0, 4.0, 8192)
  config = dataclasses.replace(
    NANO,
    head_dim=head_dim,
    rope_theta=5e5,
    rope_scaling=config_lib.RopeScaling("llama3", *scaling),
  )
  ours = rope.frequencies(config)
  np.testing.assert_allclose(ours, by_hand(head_dim, 5e5, scaling), rtol=1e-12)
  # All three regimes are there: kept, between, slowed.
  ratio = by_hand(head_dim, 5e5) / ours
  assert ratio[0] == 1 and np.isclose(ratio[-1], factor)
  assert ((ratio > 1.001) & (ratio < factor - 0.001)).any()


@pytest.mark.parametrize("factor", [1.0, 4.0, 2.5])
def test_linear_scaling_is_slower_positions(factor):
  """arXiv:2306.15595: position m is seen where m / factor was trained."""
  scaling = config_lib.RopeScaling("linear", factor, None, None, None)
  config = dataclasses.replace(NANO, rope_scaling=scaling)
  positions = np.array([0, 1, 100, 1000])
  ours = np.outer(positions, rope.frequencies(config))
  want = np.outer(positions / factor, by_hand(NANO.head_dim, NANO.rope_theta))
  np.testing.assert_allclose(ours, want, rtol=1e-12)
  # The proof of conversions has a formula of its own.
  proofs = proof.inverse_frequencies(config)
  np.testing.assert_allclose(proofs, rope.frequencies(config), rtol=1e-12)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_rotation_is_complex_multiplication(platform, monkeypatch):
  monkeypatch.setattr(kernels, "platform", lambda: platform)
  H = 24
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 3, H)).astype(np.float32)
  positions = np.array([[0, 1, 2, 3, 4], [7, 250, 3, 100, 0]], np.int32)

  @jax.jit
  def ours(x, positions):
    return rope.rotate(x, *rope.table(NANO, positions))

  turns = np.exp(1j * positions[..., None] * by_hand(H, 1e4))[:, :, None]
  pairs = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * turns
  want = np.concatenate([pairs.real, pairs.imag], axis=-1)
  np.testing.assert_allclose(ours(x, positions), want, atol=5e-5)


def test_scores_depend_on_distance_alone():
  rng = np.random.default_rng(1)
  q, k = rng.normal(size=(2, 1, 1, 1, 24)).astype(np.float32)

  @jax.jit
  def score(q_at, k_at):
    at = [np.zeros((1, 1), np.int32) + one for one in (q_at, k_at)]
    turned = [
      rope.rotate(x, *rope.table(NANO, one))
      for x, one in zip((q, k), at, strict=True)
    ]
    return (turned[0] * turned[1]).sum()

  same = [float(score(3 + shift, shift)) for shift in (0, 9, 200)]
  np.testing.assert_allclose(same, same[0], atol=1e-4)
  assert abs(float(score(9, 0)) - same[0]) > 1e-2
