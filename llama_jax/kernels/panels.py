"""Products of few rows with a matrix that lies in panels, for decoding on CPU.

A weight [O, I] is cut into panels of WIDTH outputs, each stored as [I, WIDTH]:
the form in which XLA's CPU kernels read the second matrix of a product. Given
any other they bring it into this one at every call, which for few rows costs
as much as the product: with SmolLM2's matrices 8 rows take 1.3 to 2.2 times as
long, and 2 rows 1.4 to 2.1 times. One row, or hundreds, take as long with any.

t tokens, I in, O out, n panels of C outputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Outputs of a panel. 32 is as fast for few rows and slower for hundreds; 16 and
# more than 64 are slower for few.
WIDTH = 64


class Panels(NamedTuple):
  """A matrix [O, I].

  Attributes:
    values: [n, I, C]; output o is column o % C of panel o // C.
  """

  values: jax.Array


def fits(matrix: jax.Array) -> bool:
  """Whether it is [O, I] and of whole panels."""
  return matrix.ndim == 2 and matrix.shape[0] % WIDTH == 0


def cut(matrix_OI: jax.Array) -> Panels:
  """A matrix that fits, in panels."""
  panels_nCI = matrix_OI.reshape(-1, WIDTH, matrix_OI.shape[1])
  return Panels(panels_nCI.swapaxes(1, 2))


def product(x_tI: jax.Array, matrix: Panels) -> jax.Array:
  """x @ matrix.T as the panels give it, float32 [n, t, C]; of one dtype."""
  # Batched over panels, with x as it is for each: XLA copies neither.
  return jnp.einsum(
    "ntI,nIC->ntC",
    jnp.broadcast_to(x_tI, (len(matrix.values), *x_tI.shape)),
    matrix.values,
    preferred_element_type=jnp.float32,
  )


def join(y_ntC: jax.Array) -> jax.Array:
  """[t, n * C]: a product's panels side by side."""
  return y_ntC.swapaxes(0, 1).reshape(y_ntC.shape[1], -1)


def matmul(x_tI: jax.Array, matrix: Panels) -> jax.Array:
  """x @ matrix.T, float32 [t, O]; both of one dtype."""
  return join(product(x_tI, matrix))


def take(matrix: Panels, rows: jax.Array) -> jax.Array:
  """[..., I]: rows of the matrix, as an embedding gives them."""
  C = matrix.values.shape[2]
  return matrix.values[rows // C, :, rows % C]


def reduce(function, a: jax.Array, axis: int) -> jax.Array:
  """jnp.max or jnp.sum of an array over an axis of panels, then the last one.

  Along the last alone XLA goes one word after the other, and it would make one
  reduction of the two.
  """
  return function(jax.lax.optimization_barrier(function(a, axis=axis)), axis=-1)
