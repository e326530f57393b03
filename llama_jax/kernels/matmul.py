"""The projection of every layer: a matrix product that sums in float32.

t tokens, I in, O out.
"""

import functools

import jax
import jax.numpy as jnp


def _dot(a, b, over: tuple[int, int], dtype) -> jax.Array:
  """Contracts one axis of each; products are summed in float32."""
  sums = jax.lax.dot_general(
    a,
    b,
    (((over[0],), (over[1],)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  return sums.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x_tI: jax.Array, kernel_IO: jax.Array, dtype) -> jax.Array:
  """x @ kernel as [t, O] in dtype, both cast to it first.

  Its own gradient, for two reasons. The kernel's is returned as it was summed,
  in float32, and not rounded to dtype on its way to the optimizer. And every
  product takes operands of dtype and gives float32: the only form of a
  bfloat16 product that XLA on CPU hands to the matrix units (3.5x there).
  """
  return _dot(x_tI.astype(dtype), kernel_IO.astype(dtype), (1, 0), dtype)


def _forward(x_tI, kernel_IO, dtype):
  return matmul(x_tI, kernel_IO, dtype), (x_tI, kernel_IO)


def _backward(dtype, residuals, d_tO):
  x_tI, kernel_IO = residuals
  d_x = _dot(d_tO, kernel_IO.astype(dtype), (1, 1), x_tI.dtype)
  d_kernel = _dot(x_tI.astype(dtype), d_tO, (0, 0), kernel_IO.dtype)
  return d_x, d_kernel


matmul.defvjp(_forward, _backward)
