"""A matrix of weights: the one place where a projection is declared."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.kernels import fp8, int8, matmul, panels

# What a projection's output is called in jax.checkpoint's policies by name.
KEPT = "projection"


def matrix(module: nn.Module, name: str, shape, axes, stddev: float):
  """A module's matrix: an array, or the Quantized or Panels that params hold.

  At initialisation float32 and normal; axes are its logical ones.
  """
  if module.has_variable("params", name):
    held = module.get_variable("params", name)
    if isinstance(held, (int8.Quantized, panels.Panels)):
      return held
  init = nn.with_logical_partitioning(nn.initializers.normal(stddev), axes)
  return module.param(name, init, shape, jnp.float32)


class Linear(nn.Module):
  """y = x @ kernel, without bias, in the compute dtype.

  Attributes:
    shape: (in, out).
    axes: logical names of the two axes (parallel/rules.py).
    stddev: of the normal initialisation.
    dtype: compute dtype; the kernel is stored in float32 at initialisation.
      fp8.E4M3 multiplies in float8 and gives x's dtype.
    transposed: the kernel lies as [out, in], which decoding wants.

  A kernel may be quantized (as [out, in]), for decoding by model/quantize.py
  and for training by model/lora.py, or in panels (kernels/panels.py). Where
  params hold lora_a and lora_b, their product with x is added.
  """

  shape: tuple[int, int]
  axes: tuple[str, str]
  stddev: float
  dtype: jnp.dtype
  transposed: bool = False

  @nn.compact
  def __call__(self, x_tI: jax.Array, parts: int = 1):
    """[t, O]; with more parts, a list of as many with equal columns."""
    has_lora = self.has_variable("params", "lora_a")
    order = -1 if self.transposed else 1
    kernel = matrix(
      self, "kernel", self.shape[::order], self.axes[::order], self.stddev
    )
    if isinstance(kernel, int8.Quantized):
      x_tI = x_tI.astype(self.dtype)
      if self.transposed:
        y_tO = int8.matmul(x_tI, kernel).astype(self.dtype)
      else:
        y_tO = int8.frozen_matmul(x_tI, kernel)
    elif isinstance(kernel, panels.Panels):
      y_ntC = panels.product(x_tI.astype(self.dtype), kernel).astype(self.dtype)
      if parts > 1 and len(y_ntC) % parts == 0 and not has_lora:
        # Before they are joined, or each part is copied out of the whole.
        return [panels.join(one) for one in jnp.split(y_ntC, parts)]
      y_tO = panels.join(y_ntC)
    elif self.dtype == fp8.E4M3:
      y_tO = fp8.matmul(x_tI, kernel)
    elif self.transposed:
      y_tO = matmul.matmul_rows(x_tI, kernel, self.dtype)
    else:
      y_tO = matmul.matmul(x_tI, kernel, self.dtype)
    if has_lora:
      a_Ir = self.get_variable("params", "lora_a")
      b_rO = self.get_variable("params", "lora_b")
      x_tr = matmul.matmul(x_tI, a_Ir, y_tO.dtype)
      y_tO = y_tO + matmul.matmul(x_tr, b_rO, y_tO.dtype)
    y_tO = checkpoint_name(y_tO, KEPT)
    return y_tO if parts == 1 else jnp.split(y_tO, parts, axis=1)


class Scale(nn.Module):
  """The learned scale of a norm, float32 [D] at initialisation."""

  size: int

  @nn.compact
  def __call__(self) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
    return self.param("scale", init, (self.size,), jnp.float32)
