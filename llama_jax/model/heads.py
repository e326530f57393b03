"""The head of a reward model, and giving it to a language model.

B batch, T tokens, D embed.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama_jax.model import linear


def _stddev(embed_dim: int) -> float:
  """Of a new score, as in arXiv:2009.01325; Llama 2 does not say.

  Hidden states of norm sqrt(D) then give rewards with a variance of 1.
  """
  return (embed_dim + 1) ** -0.5


class Score(nn.Module):
  """One number a token, the product of its hidden state and a kernel.

  transposed: the kernel lies as [1, D] and not as [D, 1], as all kernels do in
  decoding.
  """

  embed_dim: int
  transposed: bool = False

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Float32 [B, T], computed in float32 whatever x is."""
    order = -1 if self.transposed else 1
    shape, axes = (self.embed_dim, 1), ("embed", None)
    kernel = linear.matrix(
      self,
      "kernel",
      shape[::order],
      axes[::order],
      _stddev(self.embed_dim),
    )
    return jnp.einsum(
      "BTD,D->BT",
      x_BTD.astype(jnp.float32),
      kernel.astype(jnp.float32).reshape(-1),
      precision=jax.lax.Precision.HIGHEST,
    )


def to_scalar(params: dict[str, Any], key: jax.Array) -> dict[str, Any]:
  """Params of a reward model that begins as a language model, tied or not.

  They are those of dataclasses.replace(config, head="scalar"). What words were
  scored by is dropped. A reward model's stay as they are.

  Args:
    params: stacked, of a model with either head.
    key: of the new score, which is as Score's at initialisation.
  """
  if "score" in params:
    return params
  (D,) = params["final_norm"]["scale"].shape
  kernel = _stddev(D) * jax.random.normal(key, (D, 1), jnp.float32)
  rest = {name: tree for name, tree in params.items() if name != "head"}
  return rest | {"score": {"kernel": kernel}}
