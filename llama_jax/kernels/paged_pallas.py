"""Attention over pages, read where they lie: a Pallas kernel for Hopper GPUs.

Flash decoding (arXiv:2205.14135, and its split of the keys): one program for a
row, a kv head and a share of the row's pages keeps a running maximum and sum in
float32; a second pass joins the shares. The bulk copy engine brings pages to
shared memory some steps ahead of the tensor cores.

Written for Pallas' Mosaic backend, as its Triton backend is deprecated from jax
0.12. A tensor core's product has 64 rows, which are the G query heads of a kv
head times T tokens, and zeros; where memory is the limit they cost nothing.

Letters as in paged.py; R = 64 query rows, of which r are written out.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.kernels import reference

# Tests set jax's InterpretGPUParams: the program step by step on any device,
# with plain products in the tensor cores' place.
INTERPRET = None
ROWS = 64
DTYPES = ("bfloat16", "float16")
HEADS = (64, 128)
PAGES = (64, 128)
# Programs that fill the GPU: it has 132 processors and holds one or two each.
PROGRAMS = 264
# Bytes of shared memory for pages in flight, of 227 KiB.
AHEAD = 128 * 1024
DEEPEST = 4


def obstacle(
  platform: str,
  dtype,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int,
  page_size: int,
) -> str | None:
  """Why this kernel cannot run, or None."""
  if platform not in ("gpu", "cuda"):
    return f"pallas runs on NVIDIA GPUs and this is a {platform}"
  if jnp.dtype(dtype).name not in DTYPES:
    return (
      f"pallas' products take a cache in {' or '.join(DTYPES)}, not"
      f" {jnp.dtype(dtype)}"
    )
  if head_dim not in HEADS:
    return f"pallas needs a model.head_dim of 64 or 128, not {head_dim}"
  if page_size not in PAGES:
    return (
      f"pallas needs pages of {' or '.join(map(str, PAGES))} tokens, not"
      f" {page_size}"
    )
  if num_heads > ROWS * num_kv_heads:
    return (
      f"pallas takes up to {ROWS} heads to a kv head, not"
      f" {num_heads // num_kv_heads}"
    )
  return None


def fits(q_BTNH, keys) -> bool:
  """Whether the queries of a kv head are no more rows than a product has."""
  T, N = q_BTNH.shape[1:3]
  return T * N // keys.shape[1] <= ROWS


def attend(q_BTNH, keys, values, table_BX, first_B, lengths_B):
  """[B, T, N, H] over keys and values [Z, K, P, H].

  first_B: position of each row's first query; the others follow it.
  """
  B, T, N, H = q_BTNH.shape
  K = keys.shape[1]
  G = N // K
  q_BKTGH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4)
  q_BKRH = jnp.pad(
    q_BKTGH.reshape(B, K, T * G, H).astype(keys.dtype),
    [(0, 0), (0, 0), (0, ROWS - T * G), (0, 0)],
  )
  shares = max(1, min(table_BX.shape[1], PROGRAMS // (B * K)))
  # The copy engine moves multiples of 16 bytes, of 4-byte sums too.
  written = -(-T * G // 8) * 8
  acc_CBKrH, top_CBKr, sum_CBKr = _shares(
    q_BKRH, keys, values, table_BX, first_B, lengths_B, G, shares, written
  )
  # A share that saw nothing has the smallest maximum and so no weight, except
  # in a row that saw nothing at all, which is padding.
  weights_CBKr = jnp.exp2(top_CBKr - top_CBKr.max(0, keepdims=True))
  sum_BKr = jnp.sum(weights_CBKr * sum_CBKr, 0)
  acc_BKrH = jnp.sum(weights_CBKr[..., None] * acc_CBKrH, 0)
  out_BKrH = acc_BKrH / jnp.where(sum_BKr == 0, 1, sum_BKr)[..., None]
  out_BKTGH = out_BKrH[:, :, : T * G].reshape(B, K, T, G, H)
  out_BTNH = out_BKTGH.transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
  return out_BTNH.astype(q_BTNH.dtype)


def _shares(
  q_BKRH, keys, values, table_BX, first_B, lengths_B, G, shares, written
):
  """Each share's weighted values, largest score and sum of weights.

  Scores are in units of log 2. C shares: [C, B, K, r, H] and twice
  [C, B, K, r], float32.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  B, K, R, H = q_BKRH.shape
  P, X = keys.shape[2], table_BX.shape[1]
  dtype = keys.dtype
  each = -(-X // shares)
  depth = min(DEEPEST, AHEAD // (2 * P * H * dtype.itemsize))
  scale = H**-0.5 * math.log2(math.e)
  rows = plgpu.Layout.WGMMA
  row = rows.reduce(1)

  def full(shape, value, layout):
    array = jnp.full(shape, value, jnp.float32)
    return array if INTERPRET else plgpu.layout_cast(array, layout)

  def iota(axis):
    if INTERPRET:
      return lax.broadcasted_iota(jnp.int32, (R, P), axis)
    return plgpu.broadcasted_iota(jnp.int32, (R, P), axis, layout=rows)

  def product(a, pages_s, slot, shape, transpose=False):
    """a [R, _] times a page of shared memory, on the tensor cores."""
    if INTERPRET:
      page = pages_s[slot].T if transpose else pages_s[slot]
      return jnp.dot(a[...], page, preferred_element_type=jnp.float32)
    page_ref = pages_s.at[slot].T if transpose else pages_s.at[slot]

    def multiply(acc_ref):
      plgpu.wgmma(acc_ref, a, page_ref)
      return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

  def spread(a_R, width):
    return lax.broadcast_in_dim(a_R, (R, width), [0])

  def program(q, keys, values, table, firsts, lengths, *rest):
    accs, tops, sums, q_s, k_s, v_s, acc_s, top_s, sum_s, *barriers = rest
    q_here, k_here, v_here = barriers
    b, k, c = (lax.axis_index(name) for name in ("row", "head", "share"))
    pages = lax.div(lengths[b] + (P - 1), jnp.int32(P))
    start = c * each
    count = jnp.clip(pages - start, 0, each)

    def fetch(step):
      page = table[b, start + step]
      slot = lax.rem(step, jnp.int32(depth))
      plgpu.copy_gmem_to_smem(keys.at[page, k], k_s.at[slot], k_here.at[slot])
      plgpu.copy_gmem_to_smem(values.at[page, k], v_s.at[slot], v_here.at[slot])

    plgpu.copy_gmem_to_smem(q.at[b, k], q_s, q_here)
    for step in range(depth):
      pl.when(step < count)(lambda step=step: fetch(jnp.int32(step)))
    plgpu.barrier_wait(q_here)

    # Row t * G + g asks from position first + t: it sees position s where
    # s <= first + t, that is where s * G <= first * G + row.
    row_RP = iota(0) + firsts[b] * G

    def one_page(step, carry):
      acc_RH, top_R, sum_R = carry
      slot = lax.rem(step, jnp.int32(depth))
      plgpu.barrier_wait(k_here.at[slot])
      scores_RP = product(q_s, k_s, slot, (R, P), transpose=True) * scale
      pos_RP = iota(1) + (start + step) * P
      scores_RP = jnp.where(pos_RP * G <= row_RP, scores_RP, reference.MASKED)
      higher_R = jnp.maximum(top_R, scores_RP.max(axis=1))
      weights_RP = jnp.exp2(scores_RP - spread(higher_R, P))
      fade_R = jnp.exp2(top_R - higher_R)
      sum_R = sum_R * fade_R + weights_RP.sum(axis=1)
      plgpu.barrier_wait(v_here.at[slot])
      seen_RH = product(weights_RP.astype(dtype), v_s, slot, (R, H))
      acc_RH = acc_RH * spread(fade_R, H) + seen_RH

      @pl.when(step + depth < count)
      def refill():
        # All four warps are done with the slot before the copy engine has it.
        plgpu.commit_smem()
        fetch(step + depth)

      return acc_RH, higher_R, sum_R

    nothing = (
      full((R, H), 0, rows),
      full((R,), reference.MASKED, row),
      full((R,), 0, row),
    )
    found = lax.fori_loop(0, count, one_page, nothing)
    for array, ref in zip(found, (acc_s, top_s, sum_s), strict=True):
      ref[...] = array
    plgpu.commit_smem()
    for ref, out in ((acc_s, accs), (top_s, tops), (sum_s, sums)):
      plgpu.copy_smem_to_gmem(ref.at[pl.ds(0, written)], out.at[c, b, k])
    plgpu.wait_smem_to_gmem(0)

  # How a tensor core wants its operands in shared memory.
  tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

  def operand(*shape):
    return plgpu.SMEM(shape, dtype, transforms=tiles)

  def float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  outer = (shares, B, K, written)
  call = plgpu.kernel(
    program,
    out_type=(float32(*outer, H), float32(*outer), float32(*outer)),
    scratch_types=[
      operand(R, H),
      operand(depth, P, H),
      operand(depth, P, H),
      plgpu.SMEM((R, H), jnp.float32),
      plgpu.SMEM((R,), jnp.float32),
      plgpu.SMEM((R,), jnp.float32),
      plgpu.Barrier(),
      plgpu.Barrier(num_barriers=depth),
      plgpu.Barrier(num_barriers=depth),
    ],
    grid=(B, K, shares),
    grid_names=("row", "head", "share"),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=INTERPRET,
  )
  return call(q_BKRH, keys, values, table_BX, first_B, lengths_B)
