"""Splash attention, JAX's Pallas kernel for TPU: causal, with segments.

Its program is one device's: model/attention.py puts it under a shard_map.
Rows are padded to whole vectors with segment 0. Padding sees the padding before
it, and nothing sees padding. Letters as in reference.py.
"""

import functools

import jax
import jax.numpy as jnp

from llama_jax.kernels import chunked, reference

# Tests set True: the kernel's program by JAX operations, on any device.
INTERPRET = False
# What a block has to be a multiple of, and the most.
LANES = 128
BLOCK = 512


def obstacle(platform: str, dtype, head_dim: int) -> str | None:
  """Why this kernel cannot run, or None."""
  del dtype, head_dim
  if platform != "tpu":
    return f"splash runs on TPU and this is a {platform}"
  return None


def attend(q_BTNH, k_BSKH, v_BSKH, *, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS):
  """The same values as reference.attend, but for padding, where they differ.

  Within a segment positions must grow along the row, as packed rows have it.
  Where T != S the chunked kernel does the work.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  if T != S:
    return chunked.attend(
      q_BTNH,
      k_BSKH,
      v_BSKH,
      q_pos_BT=q_pos_BT,
      k_pos_BS=k_pos_BS,
      q_seg_BT=q_seg_BT,
      k_seg_BS=k_seg_BS,
    )
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  block = min(BLOCK, -(-T // LANES) * LANES)
  padded = -(-T // block) * block

  def pad(a):
    return jnp.pad(a, [(0, 0), (0, padded - T)] + [(0, 0)] * (a.ndim - 2))

  q_BKGTH = (
    pad(q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype))
    .reshape(B, padded, K, N // K, H)
    .transpose(0, 2, 3, 1, 4)
  )
  k_BKSH, v_BKSH = (pad(a).transpose(0, 2, 1, 3) for a in (k_BSKH, v_BSKH))
  seg_BT = pad(q_seg_BT)
  kernel = _kernel(padded, block, N // K, INTERPRET)

  def row(q_KGTH, k_KSH, v_KSH, seg_T):
    segments = splash.SegmentIds(q=seg_T, kv=seg_T)
    heads = jax.vmap(functools.partial(kernel, segment_ids=segments))
    return heads(q_KGTH, k_KSH, v_KSH)

  out_BKGTH = jax.vmap(row)(q_BKGTH, k_BKSH, v_BKSH, seg_BT)
  out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, padded, N, H)
  return out_BTNH[:, :T].astype(v_BSKH.dtype)


def _kernel(length: int, block: int, G: int, interpret: bool):
  """One kv head and its G query heads over a row."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  mask = splash.MultiHeadMask(
    [splash.CausalMask((length, length)) for _ in range(G)]
  )
  names = ("block_q", "block_kv", "block_kv_compute")
  backward = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
  sizes = dict.fromkeys(names + backward, block)
  return splash.make_splash_mqa_single_device(
    mask,
    block_sizes=splash.BlockSizes(**sizes, block_q_dq=block, block_kv_dq=block),
    residual_checkpoint_name=reference.KEPT,
    interpret=interpret,
  )
