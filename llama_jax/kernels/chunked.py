"""Causal attention in tiles of query rows and keys, for any back end.

Plain JAX with its own gradient. The scores of one tile are all that lives at
once, forward and backward: beside its arguments the kernel keeps its output
and one number a row, the logarithm of the softmax's sum, from which the
backward pass forms each tile's probabilities again (arXiv:2307.08691). Tiles
that no query sees are skipped.

Letters as in reference.py; X tiles of C query rows, Y tiles of Z keys, R = G *
C rows of a kv head's group. The group lies outside the rows, and every product
contracts the last axis of its first operand: XLA on CPU reads nothing else at
full speed (up to eight times in bfloat16).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llama_jax.kernels import reference

# The most rows and keys of a tile. 128 were the fastest on CPU: the scores of
# 36 heads are then 2 MiB.
TILE = 128

# Below every score that is not masked, above reference.MASKED.
_LOWEST = -1e20


class Tiles(NamedTuple):
  """Positions and segments, cut: [X, B, C] of queries, [Y, B, Z] of keys."""

  q_pos: jax.Array
  k_pos: jax.Array
  q_seg: jax.Array
  k_seg: jax.Array


def attend(q_BTNH, k_BSKH, v_BSKH, *, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS):
  """The same values as reference.attend; see kernels/__init__.py.

  A query that sees nothing gets 0.
  """
  return _attend(q_BTNH, k_BSKH, v_BSKH, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS)


@jax.custom_vjp
def _attend(q_BTNH, k_BSKH, v_BSKH, *where):
  return _forward(q_BTNH, k_BSKH, v_BSKH, *where)[0]


def _forward(q_BTNH, k_BSKH, v_BSKH, *where):
  T, H = q_BTNH.shape[1], q_BTNH.shape[3]
  K = k_BSKH.shape[2]
  dtype = v_BSKH.dtype
  C, Z, tiles, first_X, last_X = _plan(q_BTNH, k_BSKH, where)
  q_XBKRH = _cut_heads(_scaled(q_BTNH), C, K)
  k_YBKZH, v_YBKZH = (_cut_heads(a, Z, K) for a in (k_BSKH, v_BSKH))
  B, _, R = q_XBKRH.shape[1:4]

  def rows(_, block):
    q_BKRH, pos_BC, seg_BC, first, last = block

    def tile(j, sums):
      most_BKR, sum_BKR, out_BKRH = sums
      bias = _bias(pos_BC, tiles.k_pos[j], seg_BC, tiles.k_seg[j], R // C)
      scores_BKRZ = _product(q_BKRH, k_YBKZH[j], 3) + bias
      new_BKR = jnp.maximum(most_BKR, scores_BKRZ.max(-1))
      exps_BKRZ = _once(jnp.exp(scores_BKRZ - new_BKR[..., None]).astype(dtype))
      shrink_BKR = jnp.exp(most_BKR - new_BKR)
      sum_BKR = sum_BKR * shrink_BKR + exps_BKRZ.sum(-1, dtype=jnp.float32)
      added_BKRH = _product(exps_BKRZ, v_YBKZH[j], 2)
      return new_BKR, sum_BKR, out_BKRH * shrink_BKR[..., None] + added_BKRH

    most_BKR, sum_BKR, out_BKRH = _loop(
      (first, last),
      len(k_YBKZH),
      tile,
      (
        jnp.full((B, K, R), _LOWEST),
        jnp.zeros((B, K, R)),
        jnp.zeros((B, K, R, H)),
      ),
    )
    # Where nothing is seen the sum is 0; the logarithm of infinity makes every
    # probability 0 in the backward pass too.
    some_BKR = sum_BKR > 0
    sum_BKR = jnp.where(some_BKR, sum_BKR, 1)
    log_BKR = jnp.where(
      some_BKR, most_BKR + jnp.log(sum_BKR), -reference.MASKED
    )
    return None, ((out_BKRH / sum_BKR[..., None]).astype(dtype), log_BKR)

  _, (out_XBKRH, log_XBKR) = jax.lax.scan(
    rows, None, (q_XBKRH, tiles.q_pos, tiles.q_seg, first_X, last_X)
  )
  out_BTNH = checkpoint_name(_join_heads(out_XBKRH, C, T), reference.KEPT)
  log_XBKR = checkpoint_name(log_XBKR, reference.KEPT)
  return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, *where, out_BTNH, log_XBKR)


def _backward(residuals, d_out_BTNH):
  q_BTNH, k_BSKH, v_BSKH, *where, out_BTNH, log_XBKR = residuals
  T, H = q_BTNH.shape[1], q_BTNH.shape[3]
  S, K = k_BSKH.shape[1:3]
  dtype = v_BSKH.dtype
  C, Z, tiles, first_X, last_X = _plan(q_BTNH, k_BSKH, where)
  q_XBKRH = _cut_heads(_scaled(q_BTNH), C, K)
  k_YBKZH, v_YBKZH = (_cut_heads(a, Z, K) for a in (k_BSKH, v_BSKH))
  out_XBKRH, d_out_XBKRH = (_cut_heads(a, C, K) for a in (out_BTNH, d_out_BTNH))
  B, _, R = q_XBKRH.shape[1:4]

  def rows(d_kv, block):
    q_BKRH, out_BKRH, d_out_BKRH, log_BKR, pos_BC, seg_BC, first, last = block
    q_BKHR, d_out_BKHR = (jnp.swapaxes(a, 2, 3) for a in (q_BKRH, d_out_BKRH))
    # What all of a row's score gradients have in common.
    mean_BKR = jnp.einsum(
      "BKRH,BKRH->BKR",
      out_BKRH,
      d_out_BKRH,
      preferred_element_type=jnp.float32,
    )

    def tile(j, sums):
      d_q_BKRH, d_k_YBKHZ, d_v_YBKHZ = sums
      k_BKZH, v_BKZH = k_YBKZH[j], v_YBKZH[j]
      bias = _bias(pos_BC, tiles.k_pos[j], seg_BC, tiles.k_seg[j], R // C)
      scores_BKRZ = _product(q_BKRH, k_BKZH, 3) + bias
      probs_BKRZ = _once(
        jnp.exp(scores_BKRZ - log_BKR[..., None]).astype(dtype)
      )
      d_probs_BKRZ = _product(d_out_BKRH, v_BKZH, 3)
      d_scores_BKRZ = (
        probs_BKRZ.astype(jnp.float32) * (d_probs_BKRZ - mean_BKR[..., None])
      ).astype(dtype)
      return (
        d_q_BKRH + _product(d_scores_BKRZ, k_BKZH, 2),
        d_k_YBKHZ.at[j].add(_product(q_BKHR, d_scores_BKRZ, 2)),
        d_v_YBKHZ.at[j].add(_product(d_out_BKHR, probs_BKRZ, 2)),
      )

    d_q_BKRH, *d_kv = _loop(
      (first, last), len(k_YBKZH), tile, (jnp.zeros((B, K, R, H)), *d_kv)
    )
    return tuple(d_kv), (d_q_BKRH * H**-0.5).astype(q_BTNH.dtype)

  zeros = jnp.zeros((len(k_YBKZH), B, K, H, Z))
  d_kv, d_q_XBKRH = jax.lax.scan(
    rows,
    (zeros, zeros),
    (
      q_XBKRH,
      out_XBKRH,
      d_out_XBKRH,
      log_XBKR,
      tiles.q_pos,
      tiles.q_seg,
      first_X,
      last_X,
    ),
  )
  d_k_BSKH, d_v_BSKH = (
    _join_heads(jnp.swapaxes(a, 3, 4), Z, S).astype(dtype) for a in d_kv
  )
  d_q_BTNH = _join_heads(d_q_XBKRH, C, T)
  return d_q_BTNH, d_k_BSKH, d_v_BSKH, None, None, None, None


_attend.defvjp(_forward, _backward)


def _scaled(q_BTNH):
  return q_BTNH * jnp.asarray(q_BTNH.shape[-1] ** -0.5, q_BTNH.dtype)


def _once(x):
  """Computes x once: XLA would form it again in each of its uses."""
  return jax.lax.optimization_barrier(x)


def _product(a_BKRX, b, axis):
  """Contracts a's last axis with an axis of b, head by head, in float32."""
  return jax.lax.dot_general(
    a_BKRX,
    b,
    (((3,), (axis,)), ((0, 1), (0, 1))),
    preferred_element_type=jnp.float32,
  )


def _bias(q_pos_BC, k_pos_BZ, q_seg_BC, k_seg_BZ, G):
  """What is added to a tile's scores: 0 or MASKED, [B, 1, G * C, Z].

  Whole, since index arithmetic for the group inside the exponential's loop
  would keep XLA on CPU from vectorising it.
  """
  mask_BCZ = reference.visible(q_pos_BC, k_pos_BZ, q_seg_BC, k_seg_BZ)
  bias_BCZ = jnp.where(mask_BCZ, jnp.float32(0), reference.MASKED)
  return _once(jnp.tile(bias_BCZ[:, None], (1, 1, G, 1)))


def _loop(span, count, body, sums):
  """fori_loop; without a loop where there is but one tile."""
  if count == 1:
    return body(0, sums)
  return jax.lax.fori_loop(*span, body, sums)


def _plan(q_BTNH, k_BSKH, where):
  """C, Z, the tiles, and for each of the X the Y it sees: first, past last."""
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  C, Z = _tile_size(T), _tile_size(S)
  tiles = Tiles(
    *(_cut(a, size) for a, size in zip(where, (C, Z, C, Z), strict=True))
  )
  seen_XY = _seen(tiles, aligned=T == S)
  Y = seen_XY.shape[1]
  some_X = seen_XY.any(1)
  first_X = jnp.where(some_X, jnp.argmax(seen_XY, 1), 0)
  last_X = jnp.where(some_X, Y - jnp.argmax(seen_XY[:, ::-1], 1), 0)
  return C, Z, tiles, first_X, last_X


def _tile_size(length):
  """Near-equal tiles of at most TILE; whole vectors where there are many."""
  count = -(-length // TILE)
  return length if count == 1 else -(-length // count // 16) * 16


def _seen(tiles: Tiles, aligned: bool):
  """Which tiles may have something to see, bool [X, Y]: never too few.

  By the least and the greatest position and segment in each. aligned: queries
  and keys are the same tokens in order, so none sees a later tile.
  """

  def least(a, seg):
    return jnp.min(jnp.where(seg != 0, a, jnp.iinfo(a.dtype).max), axis=-1)

  def most(a, seg):
    return jnp.max(jnp.where(seg != 0, a, -1), axis=-1)

  def span(pos, seg):
    return least(pos, seg), most(pos, seg), least(seg, seg), most(seg, seg)

  _, last, low, high = (a[:, None] for a in span(tiles.q_pos, tiles.q_seg))
  first, _, k_low, k_high = (a[None] for a in span(tiles.k_pos, tiles.k_seg))
  seen_XYB = (first <= last) & (low <= k_high) & (k_low <= high)
  seen_XY = seen_XYB.any(-1)
  if aligned:
    X, Y = seen_XY.shape
    seen_XY &= jnp.asarray(np.arange(Y)[None] <= np.arange(X)[:, None])
  return seen_XY


def _cut(a, size):
  """[B, T, ...] -> [X, B, size, ...], padded by zeros (segment 0)."""
  B, T = a.shape[:2]
  count = -(-T // size)
  pad = [(0, 0), (0, count * size - T)] + [(0, 0)] * (a.ndim - 2)
  a = jnp.pad(a, pad).reshape(B, count, size, *a.shape[2:])
  return jnp.moveaxis(a, 1, 0)


def _cut_heads(a_BTNH, C, K):
  """[B, T, N, H] -> [X, B, K, R, H], rows in the order of [G, C]."""
  a = _cut(a_BTNH, C)
  X, B, _, N, H = a.shape
  a = a.reshape(X, B, C, K, N // K, H).transpose(0, 1, 3, 4, 2, 5)
  return a.reshape(X, B, K, N // K * C, H)


def _join_heads(a_XBKRH, C, T):
  """The inverse of _cut_heads: [B, T, N, H]."""
  X, B, K, R, H = a_XBKRH.shape
  a = a_XBKRH.reshape(X, B, K, R // C, C, H).transpose(1, 0, 4, 2, 3, 5)
  return a.reshape(B, X * C, K * R // C, H)[:, :T]
