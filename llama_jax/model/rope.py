"""Rotary position embedding (arXiv:2104.09864) with its scalings.

The two halves of a head rotate against each other: dimension i with
i + H / 2, as in Hugging Face weights. Meta's and GGUF's neighbouring pairs are
brought to this layout when they are read (checkpoint/names.py).

B batch, T tokens, N heads, H head dim.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model import config as config_lib


def frequencies(config: config_lib.LlamaConfig) -> np.ndarray:
  """Radians per position, float64 [H / 2]; config.RopeScaling has sources."""
  exponents = np.arange(0, config.head_dim, 2) / config.head_dim
  plain = config.rope_theta**-exponents
  scaling = config.rope_scaling
  if scaling is None:
    return plain
  if scaling.kind == "linear":
    return plain / scaling.factor
  wavelengths = 2 * math.pi / plain
  # 0 where the wavelength is long (slow by factor), 1 where short (keep).
  keep = np.clip(
    (scaling.original_context / wavelengths - scaling.low_freq_factor)
    / (scaling.high_freq_factor - scaling.low_freq_factor),
    0,
    1,
  )
  return keep * plain + (1 - keep) * plain / scaling.factor


def table(config: config_lib.LlamaConfig, positions_BT):
  """cos and sin of every angle, float32 [B, T, H / 2] each."""
  per_position = jnp.asarray(frequencies(config), jnp.float32)
  angles = (
    positions_BT.astype(jnp.float32)[..., None] * per_position[None, None]
  )
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH, cos_BTh, sin_BTh) -> jax.Array:
  """Rotates each head by its position's angles, in float32."""
  dtype = x_BTNH.dtype
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos_BTh[:, :, None], sin_BTh[:, :, None]
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, axis=-1).astype(dtype)
