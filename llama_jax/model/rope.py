"""Rotary position embedding (arXiv:2104.09864) with its scalings.

The two halves of a head rotate against each other: dimension i with
i + H / 2, as in Hugging Face weights. Meta's and GGUF's neighbouring pairs are
brought to this layout when they are read (checkpoint/names.py).

B batch, T tokens, N heads, H head dim, h = H / 2.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import kernels
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
  """What `rotate` multiplies a head's halves by, float32 [B, T, 2, h] twice.

  First the cosine of every angle, for either half; then the sine, with minus
  for the first half.
  """
  per_position = jnp.asarray(frequencies(config), jnp.float32)
  angles_BTh = (
    positions_BT.astype(jnp.float32)[..., None] * per_position[None, None]
  )
  cos_BTh, sin_BTh = jnp.cos(angles_BTh), jnp.sin(angles_BTh)
  tables = (
    jnp.stack([cos_BTh, cos_BTh], axis=2),
    jnp.stack([-sin_BTh, sin_BTh], axis=2),
  )
  # Made once: else unrolled layers would each form them anew.
  return jax.lax.optimization_barrier(tables)


def rotate(x_BTNH, cos_BT2h, sin_BT2h) -> jax.Array:
  """Rotates each head by its position's angles, in float32."""
  dtype, shape = x_BTNH.dtype, x_BTNH.shape
  if kernels.platform() == "cpu":
    # Halves told apart by an axis: a concatenation is one word after the other
    # there, four times as slow.
    x_BTN2h = x_BTNH.astype(jnp.float32).reshape(*shape[:-1], 2, -1)
    turned_BTN2h = (
      x_BTN2h * cos_BT2h[:, :, None]
      + jnp.flip(x_BTN2h, axis=3) * sin_BT2h[:, :, None]
    )
    return turned_BTN2h.reshape(shape).astype(dtype)
  # As whole heads: a TPU would have to move such halves about.
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos_BT2h[:, :, None, 1], sin_BT2h[:, :, None, 1]
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(dtype)
