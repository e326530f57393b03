"""The projection of every layer: a matrix product that sums in float32.

t tokens, I in, O out.
"""

import functools

import jax
import jax.numpy as jnp


def product(a, b, axis_a: int, axis_b: int, sums=jnp.float32) -> jax.Array:
  """Contracts one axis of each matrix; summed and returned in dtype sums."""
  return jax.lax.dot_general(
    a,
    b,
    (((axis_a,), (axis_b,)), ((), ())),
    preferred_element_type=sums,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x_tI: jax.Array, kernel_IO: jax.Array, dtype) -> jax.Array:
  """x @ kernel as [t, O] in dtype, both cast to it first.

  Its own gradient, for two reasons. The kernel's is returned as it was summed,
  in float32, and not rounded to dtype on its way to the optimizer. And every
  product takes operands of dtype and gives float32: the only form of a
  bfloat16 product that XLA on CPU hands to the matrix units (3.5x there).
  """
  x_tI, kernel_IO = x_tI.astype(dtype), kernel_IO.astype(dtype)
  return product(x_tI, kernel_IO, 1, 0).astype(dtype)


def _forward(x_tI, kernel_IO, dtype):
  return matmul(x_tI, kernel_IO, dtype), (x_tI, kernel_IO)


def _backward(dtype, residuals, d_tO):
  x_tI, kernel_IO = residuals
  d_x_tI = product(d_tO, kernel_IO.astype(dtype), 1, 1)
  d_kernel_IO = product(x_tI.astype(dtype), d_tO, 0, 0)
  return d_x_tI.astype(x_tI.dtype), d_kernel_IO.astype(kernel_IO.dtype)


matmul.defvjp(_forward, _backward)


# Up to so many rows the weight goes first: XLA on CPU then reads it in order
# on all cores (1.7x at 8 rows); above, the order makes no difference.
_FEW_ROWS = 32


def product_rows(x_tI, kernel_OI, sums=jnp.float32) -> jax.Array:
  """x @ kernel.T on [t, in] and [out, in]: [t, out] in dtype sums."""
  if x_tI.shape[0] <= _FEW_ROWS:
    return product(kernel_OI, x_tI, 1, 1, sums).T
  return product(x_tI, kernel_OI, 1, 1, sums)


def matmul_rows(x_tI: jax.Array, kernel_OI: jax.Array, dtype) -> jax.Array:
  """product_rows in a compute dtype, for decoding."""
  return product_rows(x_tI.astype(dtype), kernel_OI.astype(dtype)).astype(dtype)
