"""Causal attention in tiles of query rows and keys, for any back end.

Plain JAX with its own gradient. The scores of one tile are all that lives at
once, forward and backward: beside its arguments the kernel keeps its output
and one number a row, the logarithm of the softmax's sum, from which the
backward pass forms each tile's probabilities again (arXiv:2307.08691).

There are two ways through the tiles. A short sequence is cut into blocks of
rows, each with one tile: all keys up to its end. A longer one has loops over
tiles of equal size, which skip those that no query sees.

Letters as in reference.py; X tiles of C query rows, Y tiles of Z keys, R = G *
C rows of a kv head's group. The group lies outside the rows, and every product
contracts the last axis of its first operand: XLA on CPU reads nothing else at
full speed (up to eight times in bfloat16).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llama_jax.kernels import panels, reference

# Sequences up to this long are cut into blocks of rows that take all keys up to
# them at once, without a loop. In longer ones a loop skips more where rows hold
# many documents, and compiles sooner.
SHORT = 1024
# The most rows of such a block, and the most rows and keys of a loop's tile:
# the fastest on two cores. At 2,048 tokens a tile of 128 took 1.4 to 1.6 times
# as long (XLA gives small products one core), one of 512 1.1 times.
BLOCK, TILE = 128, 256

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


def attend_last(
  q_BTNH, k_BSKH, v_BSKH, *, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS
):
  """The same where queries are of the last T keys, in order; no gradient."""
  where = (q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS)
  return _forward_blocks(_scaled(q_BTNH), k_BSKH, v_BSKH, where, True)[0]


@jax.custom_vjp
def _attend(q_BTNH, k_BSKH, v_BSKH, *where):
  return _run(q_BTNH, k_BSKH, v_BSKH, where, alone=True)[0]


def _run(q_BTNH, k_BSKH, v_BSKH, where, alone: bool):
  """The output and logs; alone: no gradient will be asked for."""
  arrays = (_scaled(q_BTNH), k_BSKH, v_BSKH, where)
  if _short(q_BTNH, k_BSKH):
    return _forward_blocks(*arrays, alone)
  return _forward_loops(*arrays)


def _forward(q_BTNH, k_BSKH, v_BSKH, *where):
  out_BTNH, logs = _run(q_BTNH, k_BSKH, v_BSKH, where, alone=False)
  out_BTNH, logs = (
    jax.tree.map(lambda a: checkpoint_name(a, reference.KEPT), kept)
    for kept in (out_BTNH, logs)
  )
  return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, *where, out_BTNH, logs)


def _backward(residuals, d_out_BTNH):
  q_BTNH, k_BSKH, v_BSKH, *where, out_BTNH, logs = residuals
  run = _backward_blocks if _short(q_BTNH, k_BSKH) else _backward_loops
  d_q_BTNH, d_k_BSKH, d_v_BSKH = run(
    _scaled(q_BTNH), k_BSKH, v_BSKH, where, out_BTNH, logs, d_out_BTNH
  )
  dtype = v_BSKH.dtype
  d_q_BTNH = _scaled(d_q_BTNH).astype(q_BTNH.dtype)
  d_k_BSKH, d_v_BSKH = (a.astype(dtype) for a in (d_k_BSKH, d_v_BSKH))
  return d_q_BTNH, d_k_BSKH, d_v_BSKH, None, None, None, None


_attend.defvjp(_forward, _backward)


def _short(q_BTNH, k_BSKH) -> bool:
  """Whether each block of rows takes all keys up to it as one tile."""
  return q_BTNH.shape[1] == k_BSKH.shape[1] <= SHORT


def _blocks(T: int, S: int) -> list[tuple[slice, slice]]:
  """Of the last T of S tokens: each block of rows, the keys up to its end."""
  stops = [min(start + BLOCK, T) for start in range(0, T, BLOCK)]
  return [
    (slice(start, stop), slice(S - T + stop))
    for start, stop in zip([0, *stops], stops, strict=False)
  ]


def _forward_blocks(q_BTNH, k_BSKH, v_BSKH, where, alone: bool):
  B, _, N, _ = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BKGTH, k_BK1SH, v_BK1SH = (_heads(a, K) for a in (q_BTNH, k_BSKH, v_BSKH))
  outs, logs = [], []
  for rows, keys in _blocks(q_BTNH.shape[1], k_BSKH.shape[1]):
    bias = _block_bias(where, rows, keys, N // K)
    sums = _forward_tile(
      None,
      _rows(q_BKGTH[..., rows, :]),
      k_BK1SH[:, :, 0, keys],
      v_BK1SH[:, :, 0, keys],
      bias,
      _by_panels if alone else _along,
    )
    # Told by the mask: asking the maximum would part the loop that forms it.
    some_B1R = bias.max(-1) == 0
    out_BKRH, log_BKR = _finished(sums, some_B1R, v_BSKH.dtype)
    outs.append(out_BKRH.reshape(B, K, N // K, rows.stop - rows.start, -1))
    logs.append(log_BKR)
  return _tokens(jnp.concatenate(outs, axis=3)), logs


def _backward_blocks(q_BTNH, k_BSKH, v_BSKH, where, out_BTNH, logs, d_out_BTNH):
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BKGTH, out_BKGTH, d_out_BKGTH, k_BK1SH, v_BK1SH = (
    _heads(a, K) for a in (q_BTNH, out_BTNH, d_out_BTNH, k_BSKH, v_BSKH)
  )
  d_q = []
  d_kv = [jnp.zeros((B, K, H, T))] * 2
  for (rows, keys), log_BKR in zip(_blocks(T, T), logs, strict=True):
    row = _row(
      *(_rows(a[..., rows, :]) for a in (q_BKGTH, out_BKGTH, d_out_BKGTH)),
      log_BKR,
    )
    d_q_BKRH, *added = _backward_tile(
      row,
      k_BK1SH[:, :, 0, keys],
      v_BK1SH[:, :, 0, keys],
      _block_bias(where, rows, keys, N // K),
    )
    d_q.append(d_q_BKRH.reshape(B, K, N // K, -1, H))
    d_kv = [d.at[..., keys].add(a) for d, a in zip(d_kv, added, strict=True)]
  d_k_BSKH, d_v_BSKH = (d.transpose(0, 3, 1, 2) for d in d_kv)
  return _tokens(jnp.concatenate(d_q, axis=3)), d_k_BSKH, d_v_BSKH


def _block_bias(where, rows: slice, keys: slice, G):
  q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS = where
  return _bias(
    q_pos_BT[:, rows],
    k_pos_BS[:, keys],
    q_seg_BT[:, rows],
    k_seg_BS[:, keys],
    G,
  )


def _forward_loops(q_BTNH, k_BSKH, v_BSKH, where):
  T = q_BTNH.shape[1]
  K = k_BSKH.shape[2]
  C, Z, tiles, first_X, last_X = _plan(q_BTNH, k_BSKH, where)
  q_XBKRH = _cut_heads(q_BTNH, C, K)
  k_YBKZH, v_YBKZH = (_cut_heads(a, Z, K) for a in (k_BSKH, v_BSKH))
  G = q_XBKRH.shape[3] // C

  def rows(_, block):
    q_BKRH, pos_BC, seg_BC, first, last = block

    def tile(j, sums):
      bias = _bias(pos_BC, tiles.k_pos[j], seg_BC, tiles.k_seg[j], G)
      return _forward_tile(sums, q_BKRH, k_YBKZH[j], v_YBKZH[j], bias)

    row_BKR = jnp.zeros(q_BKRH.shape[:3])
    sums = (row_BKR + _LOWEST, row_BKR, jnp.zeros(q_BKRH.shape))
    sums = _loop((first, last), len(k_YBKZH), tile, sums)
    return None, _finished(sums, sums[0] > _LOWEST, v_BSKH.dtype)

  _, (out_XBKRH, log_XBKR) = jax.lax.scan(
    rows, None, (q_XBKRH, tiles.q_pos, tiles.q_seg, first_X, last_X)
  )
  return _join_heads(out_XBKRH, C, T), log_XBKR


def _backward_loops(
  q_BTNH, k_BSKH, v_BSKH, where, out_BTNH, log_XBKR, d_out_BTNH
):
  T, H = q_BTNH.shape[1], q_BTNH.shape[3]
  S, K = k_BSKH.shape[1:3]
  C, Z, tiles, first_X, last_X = _plan(q_BTNH, k_BSKH, where)
  q_XBKRH, out_XBKRH, d_out_XBKRH = (
    _cut_heads(a, C, K) for a in (q_BTNH, out_BTNH, d_out_BTNH)
  )
  k_YBKZH, v_YBKZH = (_cut_heads(a, Z, K) for a in (k_BSKH, v_BSKH))
  Y, B = k_YBKZH.shape[:2]
  G = q_XBKRH.shape[3] // C

  def rows(d_kv, block):
    *arrays, pos_BC, seg_BC, first, last = block
    row = _row(*arrays)

    def tile(j, sums):
      d_q_BKRH, *d_kv = sums
      bias = _bias(pos_BC, tiles.k_pos[j], seg_BC, tiles.k_seg[j], G)
      more, *added = _backward_tile(row, k_YBKZH[j], v_YBKZH[j], bias)
      d_kv = [d.at[j].add(a) for d, a in zip(d_kv, added, strict=True)]
      return d_q_BKRH + more, *d_kv

    start = (jnp.zeros(row.q_BKRH.shape), *d_kv)
    d_q_BKRH, *d_kv = _loop((first, last), Y, tile, start)
    return tuple(d_kv), d_q_BKRH

  blocks = (q_XBKRH, out_XBKRH, d_out_XBKRH, log_XBKR)
  d_kv, d_q_XBKRH = jax.lax.scan(
    rows,
    (jnp.zeros((Y, B, K, H, Z)),) * 2,
    (*blocks, tiles.q_pos, tiles.q_seg, first_X, last_X),
  )
  d_k_BSKH, d_v_BSKH = (_join_heads(jnp.swapaxes(a, 3, 4), Z, S) for a in d_kv)
  return _join_heads(d_q_XBKRH, C, T), d_k_BSKH, d_v_BSKH


def _along(reduce, a_BKRZ):
  return reduce(a_BKRZ, axis=-1, keepdims=True)


def _by_panels(reduce, a_BKRZ):
  """The same, as decoding's programs want it (decoding/compiling.py)."""
  Z = a_BKRZ.shape[-1]
  if Z % panels.WIDTH:
    return _along(reduce, a_BKRZ)
  a_BKRXP = a_BKRZ.reshape(*a_BKRZ.shape[:3], -1, panels.WIDTH)
  return panels.reduce(reduce, a_BKRXP, axis=3)[..., None]


def _forward_tile(sums, q_BKRH, k_BKZH, v_BKZH, bias, over=_along):
  """A row's greatest score, sum of exponentials and output so far, with a tile.

  sums: the same before it; None where it is the only one.
  over: how rows are reduced.
  """
  scores_BKRZ = _product(q_BKRH, k_BKZH, 3) + bias
  # Kept as [B, K, R, 1] and compared with nothing: only so does XLA on CPU make
  # one loop of the product, the bias, the maximum and the exponential.
  most_BKR1 = over(jnp.max, scores_BKRZ)
  if sums is not None:
    most_BKR1 = jnp.maximum(most_BKR1, sums[0][..., None])
  exps_BKRZ = _once(jnp.exp(scores_BKRZ - most_BKR1).astype(v_BKZH.dtype))
  most_BKR = most_BKR1[..., 0]
  sum_BKR = over(_sum, exps_BKRZ)[..., 0]
  out_BKRH = _product(exps_BKRZ, v_BKZH, 2)
  if sums is not None:
    old_BKR, old_sum_BKR, old_out_BKRH = sums
    shrink_BKR = jnp.exp(old_BKR - most_BKR)
    sum_BKR = old_sum_BKR * shrink_BKR + sum_BKR
    out_BKRH = old_out_BKRH * shrink_BKR[..., None] + out_BKRH
  return most_BKR, sum_BKR, out_BKRH


_sum = functools.partial(jnp.sum, dtype=jnp.float32)


def _finished(sums, some_BKR, dtype):
  """The output and the logarithm of the softmax's sum.

  some_BKR: whether the row sees anything. Else the first is 0; the second is
  infinite, which makes every probability 0 in the backward pass too.
  """
  most_BKR, sum_BKR, out_BKRH = sums
  sum_BKR = jnp.where(some_BKR, sum_BKR, jnp.inf)
  log_BKR = jnp.where(some_BKR, most_BKR, 0) + jnp.log(sum_BKR)
  return (out_BKRH / sum_BKR[..., None]).astype(dtype), log_BKR


class Row(NamedTuple):
  """What the backward pass of each of a block's tiles needs.

  mean_BKR: what all of a row's score gradients have in common.
  """

  q_BKRH: jax.Array
  q_BKHR: jax.Array
  d_out_BKRH: jax.Array
  d_out_BKHR: jax.Array
  log_BKR: jax.Array
  mean_BKR: jax.Array


def _row(q_BKRH, out_BKRH, d_out_BKRH, log_BKR) -> Row:
  mean_BKR = jnp.einsum(
    "BKRH,BKRH->BKR",
    out_BKRH,
    d_out_BKRH,
    preferred_element_type=jnp.float32,
  )
  q_BKHR, d_out_BKHR = (jnp.swapaxes(a, 2, 3) for a in (q_BKRH, d_out_BKRH))
  return Row(q_BKRH, q_BKHR, d_out_BKRH, d_out_BKHR, log_BKR, mean_BKR)


def _backward_tile(row: Row, k_BKZH, v_BKZH, bias):
  """A tile's part in the gradients: [B, K, R, H] of q, [B, K, H, Z] of k, v."""
  dtype = v_BKZH.dtype
  scores_BKRZ = _product(row.q_BKRH, k_BKZH, 3) + bias
  probs_BKRZ = _once(
    jnp.exp(scores_BKRZ - row.log_BKR[..., None]).astype(dtype)
  )
  d_probs_BKRZ = _product(row.d_out_BKRH, v_BKZH, 3)
  d_scores_BKRZ = (
    probs_BKRZ.astype(jnp.float32) * (d_probs_BKRZ - row.mean_BKR[..., None])
  ).astype(dtype)
  return (
    _product(d_scores_BKRZ, k_BKZH, 2),
    _product(row.q_BKHR, d_scores_BKRZ, 2),
    _product(row.d_out_BKHR, probs_BKRZ, 2),
  )


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


def _heads(a_BTNH, K):
  """[B, K, G, T, H]."""
  B, T, N, H = a_BTNH.shape
  return a_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _rows(a_BKGCH):
  """[B, K, R, H]."""
  B, K, _, _, H = a_BKGCH.shape
  return a_BKGCH.reshape(B, K, -1, H)


def _tokens(a_BKGTH):
  """The inverse of _heads: [B, T, N, H]."""
  B, K, G, T, H = a_BKGTH.shape
  return a_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)
