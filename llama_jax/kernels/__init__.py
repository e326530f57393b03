"""Attention and loss arithmetic. One signature for every attention kernel.

  attend(q_BTNH, k_BSKH, v_BSKH, *, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS)
    -> [B, T, N, H]

A query sees a key when both are in one segment (0 marks padding) and the key's
position is not later. Positions and segments say packing, padding and decoding
alike, so no kernel needs a dense mask. Where T == S the two are taken to be the
same tokens in order, which lets a kernel skip later blocks.
"""

from collections.abc import Callable

from llama_jax.kernels import chunked, reference

ATTENTION: dict[str, Callable] = {
  "reference": reference.attend,
  "chunked": chunked.attend,
}
