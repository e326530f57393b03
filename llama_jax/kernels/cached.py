"""Attention over a static key/value cache, in the layout that decoding wants.

Values lie as [B*K, S, H] and keys in panels of P slots, [B*K, X, H, P] with
S = X * P: slot s is in panel s // P. So each product is a plain batched product
whose second matrix is read in order as it lies. The natural [B, S, K, H] makes
XLA on CPU copy both four times a token (6.8 against 1.7 ms of a token's time on
a 135M model), and keys as [B*K, H, S] make it copy them once, into panels just
like these (kernels/panels.py): scores of eight rows then take twice as long.

Letters as in reference.py; n = B * K, R = T * G query rows of one kv head.
"""

import jax
import jax.numpy as jnp

from llama_jax import kernels
from llama_jax.kernels import chunked, panels, reference

# New tokens from which attention in blocks of them, which leaves out later
# slots, is faster on CPU (512 after 256: 12 and 8 ms).
_MANY = 64


def empty(batch: int, num_kv_heads: int, slots: int, head_dim: int, dtype):
  """Keys and values of zeros; what no one wrote is finite, for the mask.

  On CPU slots are rounded up to whole panels; elsewhere there is one for all.
  """
  n = batch * num_kv_heads
  P = panels.WIDTH if kernels.platform() == "cpu" else slots
  X = -(-slots // P)
  return (
    jnp.zeros((n, X, head_dim, P), dtype),
    jnp.zeros((n, X * P, head_dim), dtype),
  )


def write(k_nXHP, v_nSH, k_BTKH, v_BTKH, first):
  """Both with T tokens in the slots from `first` on."""
  T = k_BTKH.shape[1]
  n, _, H, P = k_nXHP.shape
  v_nTH = v_BTKH.transpose(0, 2, 1, 3).reshape(n, T, H).astype(v_nSH.dtype)
  k_nHT = k_BTKH.transpose(0, 2, 3, 1).reshape(n, H, T).astype(k_nXHP.dtype)
  if T == 1:
    k_nXHP = jax.lax.dynamic_update_slice(
      k_nXHP, k_nHT[:, None], (0, first // P, 0, first % P)
    )
  else:
    # The panels that they may lie in, taken out as columns and put back.
    at, k_nHW = _columns(k_nXHP, first, T)
    k_nHW = jax.lax.dynamic_update_slice(k_nHW, k_nHT, (0, 0, first - at * P))
    new_nXHP = k_nHW.reshape(n, H, -1, P).swapaxes(1, 2)
    k_nXHP = jax.lax.dynamic_update_slice(k_nXHP, new_nXHP, (0, at, 0, 0))
  return k_nXHP, jax.lax.dynamic_update_slice(v_nSH, v_nTH, (0, first, 0))


def read(k_nXHP, v_nSH, batch: int, first, T: int):
  """Keys and values [B, T, K, H] of T tokens in the slots from `first` on."""
  H, P = k_nXHP.shape[2:]
  at, k_nHW = _columns(k_nXHP, first, T)
  k_nHT = jax.lax.dynamic_slice_in_dim(k_nHW, first - at * P, T, axis=2)
  v_nTH = jax.lax.dynamic_slice_in_dim(v_nSH, first, T, axis=1)
  return (
    k_nHT.reshape(batch, -1, H, T).transpose(0, 3, 1, 2),
    v_nTH.reshape(batch, -1, T, H).transpose(0, 2, 1, 3),
  )


def _columns(k_nXHP, first, T: int):
  """The first panel of some that hold T slots from `first` on, and these
  panels' keys side by side, [n, H, W]."""
  n, X, H, P = k_nXHP.shape
  count = min(X, (T + P - 2) // P + 1)
  at = jnp.minimum(first // P, X - count)
  some_nXHP = jax.lax.dynamic_slice_in_dim(k_nXHP, at, count, axis=1)
  return at, some_nXHP.swapaxes(1, 2).reshape(n, H, count * P)


def attend(
  q_BTNH,
  k_nXHP,
  v_nSH,
  *,
  q_pos_BT,
  k_pos_BS,
  q_seg_BT,
  k_seg_BS,
  before: int | None = None,
):
  """Grouped-query attention of T new tokens over S cache slots.

  Unused slots carry segment 0 and are never seen. Returns [B, T, N, H].

  before: the first slot of the new tokens, where it is known.
  """
  B, T, N, H = q_BTNH.shape
  n, X, _, P = k_nXHP.shape
  K = n // B
  G = N // K
  if before is not None and T >= _MANY and kernels.platform() == "cpu":
    S = before + T
    k_BXPKH = k_nXHP.reshape(B, K, X, H, P).transpose(0, 2, 4, 1, 3)
    v_BSKH = v_nSH.reshape(B, K, X * P, H).swapaxes(1, 2)
    return chunked.attend_last(
      q_BTNH,
      k_BXPKH.reshape(B, X * P, K, H)[:, :S],
      v_BSKH[:, :S],
      q_pos_BT=q_pos_BT,
      k_pos_BS=k_pos_BS[:, :S],
      q_seg_BT=q_seg_BT,
      k_seg_BS=k_seg_BS[:, :S],
    )
  q_BKTGH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4)
  # Behind a barrier, or RoPE would be computed again for each panel.
  q_nRH = jax.lax.optimization_barrier(
    (q_BKTGH * (H**-0.5)).reshape(n, T * G, H)
  )
  scores_nXRP = jnp.einsum(
    "nXRH,nXHP->nXRP",
    jnp.broadcast_to(q_nRH[:, None], (n, X, T * G, H)),
    k_nXHP,
    preferred_element_type=jnp.float32,
  )
  mask_BTS = reference.visible(q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS)
  mask_BXTP = mask_BTS.reshape(B, T, X, P).swapaxes(1, 2)
  scores_nXRP = jnp.where(
    mask_BXTP[:, None, :, :, None],
    scores_nXRP.reshape(B, K, X, T, G, P),
    reference.MASKED,
  ).reshape(n, X, T * G, P)
  # The softmax as the panels lie, and its sum divided by at last.
  most_nR = panels.reduce(jnp.max, scores_nXRP, axis=1)
  exps_nXRP = jnp.exp(scores_nXRP - most_nR[:, None, :, None])
  sum_nR = panels.reduce(jnp.sum, exps_nXRP, axis=1)
  out_nXRH = jnp.einsum(
    "nXRP,nXPH->nXRH",
    exps_nXRP.astype(v_nSH.dtype),
    v_nSH.reshape(n, X, P, H),
    preferred_element_type=jnp.float32,
  )
  out_nRH = out_nXRH.sum(1) / sum_nR[..., None]
  out_BKTGH = out_nRH.astype(v_nSH.dtype).reshape(B, K, T, G, H)
  return out_BKTGH.transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
