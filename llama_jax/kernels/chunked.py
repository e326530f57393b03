"""Causal attention in blocks of query rows that skip the keys after them.

Plain JAX, for any back end. Half the work of the dense form and never a
[T, S] buffer: the scores of one block of rows are all that lives at once in
the forward pass. Letters as in reference.py; n = B * K, C block rows.
"""

import jax
import jax.numpy as jnp

from llama_jax.kernels import reference

# 128 rows were the fastest on CPU; beyond 16 blocks the unrolled program takes
# longer to compile than the skipping saves.
BLOCK_ROWS = 128
MAX_BLOCKS = 16


def attend(q_BTNH, k_BSKH, v_BSKH, *, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS):
  """The same values as reference.attend; see kernels/__init__.py."""
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  G = N // K
  # One batch of plain matrix products: [rows of all G heads, H] x [H, keys].
  q_BKTGH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4) * (H**-0.5)
  k_BKHS = k_BSKH.transpose(0, 2, 3, 1)
  v_BKSH = v_BSKH.transpose(0, 2, 1, 3)

  rows = max(BLOCK_ROWS, -(-T // MAX_BLOCKS))
  blocks = []
  for start in range(0, T, rows):
    stop = min(start + rows, T)
    C, keys = stop - start, stop if T == S else S
    q_BKRH = q_BKTGH[:, :, start:stop].reshape(B, K, C * G, H)
    scores_BKRS = jnp.einsum(
      "BKRH,BKHS->BKRS",
      q_BKRH,
      k_BKHS[..., :keys],
      preferred_element_type=jnp.float32,
    )
    mask_BCS = reference.visible(
      q_pos_BT[:, start:stop],
      k_pos_BS[:, :keys],
      q_seg_BT[:, start:stop],
      k_seg_BS[:, :keys],
    )
    scores_BKCGS = jnp.where(
      mask_BCS[:, None, :, None],
      scores_BKRS.reshape(B, K, C, G, keys),
      reference.MASKED,
    )
    probs_BKCGS = jax.nn.softmax(scores_BKCGS, axis=-1).astype(v_BSKH.dtype)
    out_BKRH = jnp.einsum(
      "BKRS,BKSH->BKRH",
      probs_BKCGS.reshape(B, K, C * G, keys),
      v_BKSH[:, :, :keys],
      preferred_element_type=jnp.float32,
    ).astype(v_BSKH.dtype)
    blocks.append(out_BKRH.reshape(B, K, C, G, H))
  out_BKTGH = jnp.concatenate(blocks, axis=2)
  return out_BKTGH.transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
