"""Products with a matrix of whole numbers: weights in 8 or 4 bits.

A row of the matrix is whole numbers in [-127, 127] times one float32 scale. In
8 bits they are stored as they are. In 4 bits a group of GROUP of them is
  low + step * code, code in 0 ... 15,
step and low whole numbers too: so both widths share one product, in which no
group needs a float of its own. For the same bits this is as near the weights
as a float step and low are (7.2 against 7.8 % of normally distributed ones;
9.7 without a low). A group's own scale in the product instead, as GGUF's Q8_0
and Q4_0 have it, was 1.7 times slower than float32 on CPU.

On CPU x is whole numbers as well, since only the product of int8 with int8 is
fast there. It becomes two rows, itself to 8 bits and what that left over, which
together keep 16: a single row takes XLA's slow path (tenfold), so that at batch
1 the second costs nothing. Elsewhere, and on CPU for many rows as a prompt has
them (1.9 times faster at 512), the weights are widened to x's dtype.

t tokens, I in, O out, G = I / GROUP.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.kernels import matmul as matmul_lib

GROUP = 32
# What a code of 4 bits and a whole number of 8 reach to.
_CODES, _MOST = 15, 127
# Steps of the second row of x to one of the first, of which half is left over.
_FINER = 2 * _MOST
# Rows of x from which widening the weights costs less than x's second row.
_MANY_ROWS = 128
# Stands in for the largest magnitude of a row of zeros.
_LEAST = 2.0**-100


class Quantized(NamedTuple):
  """A matrix [O, I].

  Attributes:
    values: int8 [O, I]; or uint8 [O, I / 2], of which byte j of the 16 of a
      group holds the codes of its numbers j (low bits) and j + 16.
    scale_O: float32.
    step_OG: int8, or None where values are int8.
    low_OG: int8, or None likewise.
  """

  values: jax.Array
  scale_O: jax.Array
  step_OG: jax.Array | None = None
  low_OG: jax.Array | None = None


def _scaled(x):
  """float32 x in units of 1/127 of each row's largest, and that unit."""
  x = x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
  unit = jnp.maximum(largest, _LEAST) / _MOST
  return x / unit, unit


def quantize(weights_OI: jax.Array) -> Quantized:
  """The nearest matrix in 8 bits: off by half of a row's scale at most."""
  wanted_OI, scale_O1 = _scaled(weights_OI)
  return Quantized(jnp.round(wanted_OI).astype(jnp.int8), scale_O1[:, 0])


def quantize4(weights_OI: jax.Array) -> Quantized:
  """A near matrix in 4 bits; GROUP must divide I.

  Each group takes, of the steps and lows around those that span it, the pair
  with the least squared error: on average 3 % above the least of all pairs.
  """
  wanted_OI, scale_O1 = _scaled(weights_OI)
  wanted_OGi = wanted_OI.reshape(len(wanted_OI), -1, GROUP)
  least_OG1 = jnp.min(wanted_OGi, axis=-1, keepdims=True)
  most_OG1 = jnp.max(wanted_OGi, axis=-1, keepdims=True)
  span_OG1 = jnp.ceil((most_OG1 - least_OG1) / _CODES)

  def grid(shifts):
    # The largest number, low + 15 * step, must fit in 8 bits.
    step = jnp.clip(span_OG1 + shifts[0], 1, 2 * _MOST // _CODES)
    low = jnp.round((least_OG1 + most_OG1 - _CODES * step) / 2) + shifts[1]
    return step, jnp.clip(low, -_MOST, _MOST - _CODES * step)

  def coded(step, low):
    return jnp.clip(jnp.round((wanted_OGi - low) / step), 0, _CODES)

  def closer(best, shifts):
    step, low = grid(shifts)
    off = (low + step * coded(step, low) - wanted_OGi) ** 2
    new = (jnp.sum(off, axis=-1, keepdims=True), step, low)
    better = new[0] < best[0]
    return [
      jnp.where(better, *pair) for pair in zip(new, best, strict=True)
    ], None

  shifts = [(step, low) for step in (0, -1) for low in range(-3, 4)]
  start = [jnp.full_like(span_OG1, jnp.inf), *grid((0, 0))]
  (_, step_OG1, low_OG1), _ = jax.lax.scan(
    closer, start, jnp.asarray(shifts, jnp.float32)
  )
  codes_OGi = coded(step_OG1, low_OG1).astype(jnp.uint8)
  first, second = jnp.split(codes_OGi, 2, axis=-1)
  return Quantized(
    (first | second << 4).reshape(len(wanted_OI), -1),
    scale_O1[:, 0],
    step_OG1[..., 0].astype(jnp.int8),
    low_OG1[..., 0].astype(jnp.int8),
  )


def _halves(matrix: Quantized) -> tuple[jax.Array, jax.Array]:
  """int8 [O, G, 16] twice: each group's first and second half."""
  step_OG1, low_OG1 = matrix.step_OG[..., None], matrix.low_OG[..., None]
  return tuple(
    codes.astype(jnp.int8).reshape(*step_OG1.shape[:2], -1) * step_OG1 + low_OG1
    for codes in (matrix.values & 15, matrix.values >> 4)
  )


def integers(matrix: Quantized) -> jax.Array:
  """int8 [O, I], before the scale."""
  if matrix.step_OG is None:
    return matrix.values
  whole_OGi = jnp.concatenate(_halves(matrix), axis=-1)
  return whole_OGi.reshape(len(whole_OGi), -1)


def dequantize(matrix: Quantized) -> jax.Array:
  """float32 [O, I]."""
  return integers(matrix).astype(jnp.float32) * matrix.scale_O[:, None]


def take(matrix: Quantized, rows: jax.Array) -> jax.Array:
  """float32 [..., I]: rows of an int8 matrix, as an embedding gives them."""
  scale = matrix.scale_O[rows][..., None]
  return matrix.values[rows].astype(jnp.float32) * scale


def _not_before(values: jax.Array, x_tI: jax.Array) -> jax.Array:
  """Whole numbers as they are, but no sooner than x is there.

  What x has no part in is unpacked or widened early, that of all layers at
  once: from memory instead of cache, twice as slow on a 135M model, and 0.4 GB
  of it. An optimization barrier does not prevent it; that a magnitude is never
  negative, XLA does not see behind a maximum.
  """
  return values ^ (jnp.max(jnp.abs(x_tI[:1])) < 0).astype(values.dtype)


def integer_product(x_tI: jax.Array, matrix: Quantized) -> jax.Array:
  """x @ matrix.T, float32 [t, O], summed exactly in int32 (I up to 133,144)."""
  t = x_tI.shape[0]
  x_tI, unit_t1 = _scaled(x_tI)
  coarse_tI = jnp.round(x_tI)
  fine_tI = jnp.round((x_tI - coarse_tI) * _FINER)
  x_rI = jnp.concatenate([coarse_tI, fine_tI]).astype(jnp.int8)

  def product(x_rI, values_OI):
    return matmul_lib.product_rows(x_rI, values_OI, jnp.int32)

  if matrix.step_OG is None:
    y_rO = product(x_rI, matrix.values)
  else:
    matrix = matrix._replace(values=_not_before(matrix.values, x_tI))
    # Putting a group's halves side by side takes three times as long as the
    # product; x's are few.
    x_rG2i = x_rI.reshape(2 * t, -1, 2, GROUP // 2)
    y_rO = sum(
      product(
        x_rG2i[:, :, half].reshape(2 * t, -1),
        values_OGi.reshape(len(values_OGi), -1),
      )
      for half, values_OGi in enumerate(_halves(matrix))
    )
  y_rO = y_rO.astype(jnp.float32)
  return (y_rO[:t] + y_rO[t:] / _FINER) * unit_t1 * matrix.scale_O[None]


def widened_product(x_tI: jax.Array, matrix: Quantized) -> jax.Array:
  """x @ matrix.T, float32 [t, O], the weights widened to x's dtype."""
  values_OI = integers(matrix).astype(x_tI.dtype)
  y_tO = matmul_lib.product(x_tI, values_OI, 1, 1)
  return y_tO * matrix.scale_O[None]


def matmul(x_tI: jax.Array, matrix: Quantized) -> jax.Array:
  """x @ matrix.T, float32 [t, O], by what is fast where it runs."""

  def widened_late(x_tI, matrix):
    late = _not_before(matrix.values, x_tI)
    return widened_product(x_tI, matrix._replace(values=late))

  many = x_tI.shape[0] >= _MANY_ROWS
  return jax.lax.platform_dependent(
    x_tI,
    matrix,
    cpu=widened_late if many else integer_product,
    default=widened_product,
  )


@jax.custom_vjp
def frozen_matmul(x_tI: jax.Array, matrix: Quantized) -> jax.Array:
  """x @ matrix.T as [t, O] in x's dtype, differentiable by x alone.

  Its own gradient: the backward pass keeps the whole numbers and not what they
  were widened to, and its product takes operands of x's dtype
  (kernels/matmul.py).
  """
  return widened_product(x_tI, matrix).astype(x_tI.dtype)


def _frozen_forward(x_tI, matrix):
  return frozen_matmul(x_tI, matrix), matrix


def _frozen_backward(matrix, d_tO):
  scaled_tO = (d_tO * matrix.scale_O[None]).astype(d_tO.dtype)
  values_OI = integers(matrix).astype(d_tO.dtype)
  d_x_tI = matmul_lib.product(scaled_tO, values_OI, 1, 0)
  return d_x_tI.astype(d_tO.dtype), None


frozen_matmul.defvjp(_frozen_forward, _frozen_backward)
