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
  transposed: bool = False

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    D, F = self.config.embed_dim, self.config.mlp_dim
    x_tD = x_BTD.reshape(-1, D)
    last = 0.02 / (2 * self.config.num_layers) ** 0.5

    def project(name, shape, axes, stddev):
      return linear.Linear(
        shape, axes, stddev, self.dtype, self.transposed, name=name
      )

    if self.has_variable("params", "gate_up"):  # unrolled.merge
      both = project("gate_up", (D, 2 * F), ("embed", "mlp"), 0.02)
      gate_tF, up_tF = both(x_tD, parts=2)
      # One loop that reads both: XLA on CPU would copy each part for the next
      # product, and form this within it.
      hidden_tF = jax.lax.optimization_barrier(nn.silu(gate_tF) * up_tF)
    else:
      gate_tF = project("gate", (D, F), ("embed", "mlp"), 0.02)(x_tD)
      up_tF = project("up", (D, F), ("embed", "mlp"), 0.02)(x_tD)
      hidden_tF = nn.silu(gate_tF) * up_tF
    down = project("down", (F, D), ("mlp", "embed"), last)
    return down(hidden_tF).reshape(x_BTD.shape)
