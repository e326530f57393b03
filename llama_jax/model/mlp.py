"""The feed-forward half of a block: SwiGLU (arXiv:2002.05202)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama_jax.model import config as config_lib
from llama_jax.model import linear


class MLP(nn.Module):
  """down(silu(gate(x)) * up(x)) on [B, T, D]."""

  config: config_lib.LlamaConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    D, F = self.config.embed_dim, self.config.mlp_dim
    x_tD = x_BTD.reshape(-1, D)
    wide, narrow = ("embed", "mlp"), ("mlp", "embed")
    last = 0.02 / (2 * self.config.num_layers) ** 0.5
    gate_tF = linear.Linear((D, F), wide, 0.02, self.dtype, name="gate")(x_tD)
    up_tF = linear.Linear((D, F), wide, 0.02, self.dtype, name="up")(x_tD)
    down = linear.Linear((F, D), narrow, last, self.dtype, name="down")
    return down(nn.silu(gate_tF) * up_tF).reshape(x_BTD.shape)
