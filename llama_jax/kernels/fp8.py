"""The projection of every layer with its operands in float8.

Each tensor is scaled by one power of two, taken from its own largest magnitude
(current scaling), so that it fills the range of its type and there is no
history to keep. Such a scale costs no rounding of its own, in bfloat16 either.
Activations and weights are e4m3, gradients e5m2 (arXiv:2209.05433, 3.1).

XLA on NVIDIA GPUs of capability 8.9 and above makes a cuBLASLt call of a dot
whose operands are float8 and of the product of its result with a scalar
(xla/service/gpu/transforms/gemm_rewriter.cc, MatchFp8Param and F8ScaleD). The
other form, in which operands are first brought back to bfloat16, was lost to a
simplification once (github.com/openxla/xla/issues/17887). Everywhere else XLA
widens the operands first: the same values, slower than bfloat16.

t tokens, I in, O out.
"""

import jax
import jax.numpy as jnp

E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)

# Stands in for the magnitude of a tensor of zeros: the scale stays finite.
_LEAST = 2.0**-100
_EXPONENT = 0x7F800000


def quantize(x, dtype) -> tuple[jax.Array, jax.Array]:
  """x in float8, and the float32 scalar that brings it back.

  The largest power of two that keeps x within dtype's range is x's scale; what
  is given is its inverse. A NaN or an infinity becomes NaN.
  """
  x = x.astype(jnp.float32)
  largest = jnp.maximum(jnp.max(jnp.abs(x)), _LEAST)
  room = jnp.float32(jnp.finfo(dtype).max) / largest
  # Without its mantissa a float32 is the power of two below it.
  bits = jax.lax.bitcast_convert_type(room, jnp.int32) & _EXPONENT
  scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return (x * scale).astype(dtype), 1 / scale


def _product(a, b, axis_a: int, axis_b: int, dtype) -> jax.Array:
  """Contracts one axis of two pairs (values, scale); summed in float32."""
  (a, a_scale), (b, b_scale) = a, b
  out = jax.lax.dot_general(
    a,
    b,
    (((axis_a,), (axis_b,)), ((), ())),
    preferred_element_type=dtype,
  )
  return out * (a_scale * b_scale).astype(dtype)


@jax.custom_vjp
def matmul(x_tI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
  """x @ kernel as [t, O] in x's dtype, both cast to float8 first.

  The gradient of x is in x's dtype, the kernel's as it was summed, in float32
  (kernels/matmul.py). The backward pass keeps x in float8.
  """
  return _forward(x_tI, kernel_IO)[0]


def _forward(x_tI, kernel_IO):
  x8, kernel8 = quantize(x_tI, E4M3), quantize(kernel_IO, E4M3)
  y_tO = _product(x8, kernel8, 1, 0, x_tI.dtype)
  return y_tO, (x8, kernel_IO)


def _backward(residuals, d_tO):
  x8, kernel_IO = residuals
  # Cast again and not kept: it is as large as the kernel itself.
  kernel8, d8 = quantize(kernel_IO, E4M3), quantize(d_tO, E5M2)
  d_x_tI = _product(d8, kernel8, 1, 1, d_tO.dtype)
  d_kernel_IO = _product(x8, d8, 0, 0, jnp.float32)
  return d_x_tI, d_kernel_IO.astype(kernel_IO.dtype)


matmul.defvjp(_forward, _backward)
