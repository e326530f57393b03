"""Attention as it is defined: every score at once, in float32.

B batch, T query, S key, N heads, K kv heads, G = N // K, H head dim.
"""

import jax
import jax.numpy as jnp

# Finite, so that a row that sees nothing (padding) stays finite too.
MASKED = -1e30

# What a kernel with its own backward pass calls the arrays that this pass
# needs beside the arguments, for jax.checkpoint's policies by name.
KEPT = "attention"


def visible(q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS) -> jax.Array:
  """Which keys each query sees: bool [B, T, S]."""
  causal_BTS = k_pos_BS[:, None, :] <= q_pos_BT[:, :, None]
  same_BTS = k_seg_BS[:, None, :] == q_seg_BT[:, :, None]
  return causal_BTS & same_BTS & (k_seg_BS != 0)[:, None, :]


def attend(q_BTNH, k_BSKH, v_BSKH, *, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS):
  """Grouped-query attention, O(T * S) memory; the truth for other kernels."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  scores_BKGTS = jnp.einsum(
    "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
  ) * (H**-0.5)
  mask_BTS = visible(q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS)
  scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)
  probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
  out_BTKGH = jnp.einsum(
    "BKGTS,BSKH->BTKGH",
    probs_BKGTS,
    v_BSKH,
    preferred_element_type=jnp.float32,
  )
  return out_BTKGH.reshape(B, T, N, H).astype(v_BSKH.dtype)
