"""Attention over pages on TPU: JAX's ragged paged attention.

The kernel takes all rows' queries end to end, and a row's queries for the last
of its length. Ours are T to each row with padding after the real ones, so a row
is told to be longer by its padding: the real ones then stand where they should.
Its program is one device's. Letters as in paged.py.
"""

import jax.numpy as jnp

# Tests set the kernel's block sizes, which its table knows for TPUs alone.
BLOCKS = {}
LANES = 128


def obstacle(
  platform: str,
  dtype,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int,
  page_size: int,
) -> str | None:
  """Why this kernel cannot run, or None."""
  del num_heads, page_size
  if platform != "tpu":
    return f"ragged runs on TPU and this is a {platform}"
  if jnp.dtype(dtype).name not in ("float32", "bfloat16"):
    return f"ragged takes a cache in float32 or bfloat16, not {dtype}"
  if head_dim % LANES:
    return (
      f"ragged needs a model.head_dim that is a multiple of {LANES}, not"
      f" {head_dim}"
    )
  # Rows of a vector register that a token's keys and values fill.
  rows = 2 * num_kv_heads * jnp.dtype(dtype).itemsize / 4
  if rows not in (1, 2, 4) and rows % 8:
    return f"ragged cannot tile {num_kv_heads} kv heads of {dtype}"
  return None


def attend(q_BTNH, fused, table_BX, lengths_B, count_B):
  """[B, T, N, H] over keys and values [Z, P, 2K, H].

  count_B: how many of a row's T tokens are real.
  """
  from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged

  B, T, N, H = q_BTNH.shape
  out = ragged.ragged_paged_attention(
    q_BTNH.reshape(B * T, N, H).astype(fused.dtype),
    fused,
    (lengths_B + T - count_B).astype(jnp.int32),
    table_BX.astype(jnp.int32),
    jnp.arange(B + 1, dtype=jnp.int32) * T,
    jnp.full((1,), B, jnp.int32),
    sm_scale=H**-0.5,
    **BLOCKS,
  )
  return out.reshape(B, T, N, H).astype(q_BTNH.dtype)
