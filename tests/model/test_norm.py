"""RMSNorm against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model import norm

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 16)) * np.array([1e-3, 1.0, 50.0])[None, :, None]
SCALE = RNG.normal(size=16)
rms_norm = jax.jit(norm.rms_norm, static_argnums=2)


def plain(x, scale, eps):
  mean_square = (x**2).mean(-1, keepdims=True)
  return x / np.sqrt(mean_square + eps) * scale


def test_equals_the_definition_for_any_eps():
  x, scale = X.astype(np.float32), SCALE.astype(np.float32)
  for eps in (1e-5, 1e-2):
    ours = rms_norm(x, scale, eps)
    np.testing.assert_allclose(ours, plain(X, SCALE, eps), rtol=1e-5)


def test_bfloat16_is_normalised_in_float32():
  # Squares of 1e20 overflow nothing, and 4096 equal ones sum exactly.
  x = jnp.full((1, 4096), 3e4, jnp.bfloat16)
  out = rms_norm(x, jnp.ones(4096, jnp.float32), 1e-5)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(out, np.float32), 1.0)
