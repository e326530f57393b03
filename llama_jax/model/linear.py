"""A matrix of weights: the one place where a projection is declared."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama_jax.kernels import matmul


class Linear(nn.Module):
  """y = x @ kernel, without bias, in the compute dtype.

  Attributes:
    shape: (in, out).
    axes: logical names of the two axes (parallel/rules.py).
    stddev: of the normal initialisation.
    dtype: compute dtype; the kernel is stored in float32 at initialisation.
  """

  shape: tuple[int, int]
  axes: tuple[str, str]
  stddev: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_tI: jax.Array) -> jax.Array:
    kernel = self.param(
      "kernel",
      nn.with_logical_partitioning(
        nn.initializers.normal(self.stddev), self.axes
      ),
      self.shape,
      jnp.float32,
    )
    return matmul.matmul(x_tI, kernel, self.dtype)


class Scale(nn.Module):
  """The learned scale of a norm, float32 [D] at initialisation."""

  size: int

  @nn.compact
  def __call__(self) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
    return self.param("scale", init, (self.size,), jnp.float32)
