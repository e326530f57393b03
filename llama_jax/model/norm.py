"""RMSNorm (arXiv:1910.07467)."""

import jax
import jax.numpy as jnp


def rms_norm(x, scale_D, eps: float) -> jax.Array:
  """Normalises the last axis in float32, casts back to x's dtype, scales."""
  x32 = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  scale = scale_D.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
  return (x32 * inverse).astype(x.dtype) * scale
