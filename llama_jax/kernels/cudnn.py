"""cuDNN's fused attention, on GPU, for rows that are one document each.

cuDNN knows a causal row but not segments: given a mask it would make a bias of
T x S of it. So a batch whose every row is one segment from position 0, with
padding after it or none, goes to cuDNN, and any other (packed, left-padded) to
the chunked kernel; the device chooses, batch by batch. Padding then sees what
came before it, and nothing sees padding.
"""

import jax
import jax.numpy as jnp

from llama_jax.kernels import chunked

# Tests set "xla": the same values by plain products, on any device.
IMPLEMENTATION = "cudnn"
DTYPES = ("bfloat16", "float16")
LARGEST_HEAD = 128


def obstacle(platform: str, dtype, head_dim: int) -> str | None:
  """Why this kernel cannot run, or None."""
  if platform not in ("gpu", "cuda"):
    return f"cuDNN runs on NVIDIA GPUs and this is a {platform}"
  if jnp.dtype(dtype).name not in DTYPES:
    return f"cuDNN computes in {' or '.join(DTYPES)}, not {jnp.dtype(dtype)}"
  if head_dim % 8 or head_dim > LARGEST_HEAD:
    return (
      f"cuDNN needs a model.head_dim that is a multiple of 8 up to"
      f" {LARGEST_HEAD}, not {head_dim}"
    )
  return None


def attend(q_BTNH, k_BSKH, v_BSKH, *, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS):
  """The same values as reference.attend, but for padding, where they differ."""

  def tiled(q_BTNH, k_BSKH, v_BSKH):
    return chunked.attend(
      q_BTNH,
      k_BSKH,
      v_BSKH,
      q_pos_BT=q_pos_BT,
      k_pos_BS=k_pos_BS,
      q_seg_BT=q_seg_BT,
      k_seg_BS=k_seg_BS,
    )

  if q_BTNH.shape[1] != k_BSKH.shape[1]:
    return tiled(q_BTNH, k_BSKH, v_BSKH)
  return jax.lax.cond(
    plain(q_pos_BT, q_seg_BT), _causal, tiled, q_BTNH, k_BSKH, v_BSKH
  )


def _causal(q_BTNH, k_BSKH, v_BSKH):
  return jax.nn.dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation=IMPLEMENTATION
  )


def plain(pos_BT, seg_BT) -> jax.Array:
  """Whether every row is one segment that counts from its start, bool []."""
  order_T = jnp.arange(pos_BT.shape[1], dtype=pos_BT.dtype)
  real_BT = seg_BT != 0
  # Real tokens after padding, or of another segment than the first.
  one = (seg_BT == seg_BT[:, :1]) | ~real_BT
  at_the_front = real_BT[:, 1:] <= real_BT[:, :-1]
  counted = (pos_BT == order_T[None]) | ~real_BT
  return one.all() & at_the_front.all() & counted.all()
