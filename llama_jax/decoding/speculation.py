"""Several tokens a forward: guessed cheaply, then drawn as ever, all at once.

A round guesses G tokens a row, either by looking up what followed the last few
ones where they stood before (arXiv:2304.04487), or by a smaller model, the
draft. One forward over the last token and the guesses gives every distribution
that would be drawn from if the guesses were right, and each is drawn from, with
the same key as without speculation. Draws count up to the first that is not the
guess, it among them. So the answer is the one without speculation, for greedy
and for warm requests alike; there is nothing to reject. (arXiv:2211.17192 draws
the guesses by keys of their own and rejects some. Here a draft draws with the
row's own key: where both distributions are near, both draw the same.)

B rows, G guesses, C = G + 1 tokens of a round, X pages of a row, S slots.
"""

import jax
import jax.numpy as jnp

from llama_jax.decoding import compiling, programs, sampling
from llama_jax.model import cache as cache_lib

# How many of the last tokens are looked for: more before fewer.
_LONGEST = 3


def look_up(history_BS, length_B, count: int) -> jax.Array:
  """What followed a row's last tokens where they stood before: int32 [B, G].

  Where most of them stood, there the last time; anything where none did.

  Args:
    history_BS: the row's tokens; anything after them.
    length_B: the place of the last of them.
    count: G.
  """
  B, S = history_BS.shape
  place_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
  same_BS = place_BS < length_B[:, None]
  alike_BS = jnp.zeros((B, S), jnp.int32)
  for back in range(_LONGEST):
    here_B1 = jnp.take_along_axis(
      history_BS, jnp.maximum(length_B - back, 0)[:, None], axis=1
    )
    # What is rolled in from the end stands after the row's tokens.
    there_BS = jnp.roll(history_BS, back, axis=1)
    same_BS &= (there_BS == here_B1) & (place_BS >= back)
    alike_BS += same_BS
  best_B = jnp.argmax(alike_BS * S + place_BS * (alike_BS > 0), axis=1)
  after_BG = best_B[:, None] + 1 + jnp.arange(count)[None]
  return jnp.take_along_axis(history_BS, jnp.minimum(after_BG, S - 1), axis=1)


@compiling.jit(
  static_argnames=("decoders", "guesses", "rounds", "features", "top"),
  donate_argnames=("pools", "caches"),
)
def draw(
  params,
  pools: tuple[programs.Pools, ...],
  caches: tuple[cache_lib.Cache | None, ...],
  rows: programs.Rows,
  history_BS,
  knobs: sampling.Knobs,
  seen: sampling.Seen | None,
  *,
  decoders,
  guesses: int,
  rounds: int,
  features: sampling.Features,
  top: int | None,
):
  """Draws `rounds` to `rounds` * C tokens a row.

  params, pools, caches and decoders have one entry for the model and, with a
  draft, one for that; they lie in the same pages. As in programs.draw a cache
  is None where pages are read in place, and all rows go on whatever stops them.

  Returns:
    tokens [B, rounds, C], how many of them count [B, rounds], Logprobs
    [B, rounds, C] or None, the pools, the caches.
  """
  B, C = len(rows.token_B), guesses + 1
  P = pools[0][0].page_size
  place_1C = jnp.arange(C)[None]
  first = [None if cache is None else cache.used for cache in caches]
  caches = tuple(
    cache_lib.PagedCache(pool, rows.table_BX) if cache is None else cache
    for cache, pool in zip(caches, pools, strict=True)
  )

  def forward(which, cache, ids_BT, positions_BT):
    return decoders[which].apply(
      {"params": params[which]},
      ids_BT,
      positions_BT,
      jnp.ones_like(ids_BT),
      cache,
    )

  def guess(cache, token_B, length_B, drawn_B, seen):
    """By the draft; it reads its last guess too, as the model will."""

    def one(carry, step):
      cache, token_B, seen = carry
      logits_B1V, cache = forward(
        1, cache, token_B[:, None], (length_B + step)[:, None]
      )
      token_B = sampling.choose(
        logits_B1V[:, 0], knobs, drawn_B + step, features, seen_=seen
      )
      if seen is not None:
        seen = seen.add(token_B)
      return (cache, token_B, seen), token_B

    (cache, _, _), guess_CB = jax.lax.scan(
      one, (cache, token_B, seen), jnp.arange(C)
    )
    return cache, guess_CB[:guesses].T

  def one_round(carry, _):
    caches, token_B, length_B, drawn_B, history_BS, seen = carry
    caches = list(caches)
    if len(decoders) > 1:
      caches[1], guess_BG = guess(caches[1], token_B, length_B, drawn_B, seen)
    else:
      guess_BG = look_up(history_BS, length_B, guesses)
    ids_BC = jnp.concatenate([token_B[:, None], guess_BG], axis=1)
    positions_BC = length_B[:, None] + place_1C
    logits_BCV, caches[0] = forward(0, caches[0], ids_BC, positions_BC)

    def choose(seen, step):
      logits_BV = logits_BCV[:, step]
      token_B = sampling.choose(
        logits_BV, knobs, drawn_B + step, features, seen_=seen
      )
      told = programs.told(logits_BV, token_B, top)
      return seen if seen is None else seen.add(token_B), (token_B, told)

    _, (token_CB, told) = jax.lax.scan(choose, seen, jnp.arange(C))
    token_BC = token_CB.T
    right_BG = token_BC[:, :guesses] == guess_BG
    count_B = 1 + jnp.cumprod(right_BG, axis=1).sum(1)
    counts_BC = place_1C < count_B[:, None]
    # Of what was read wrongly nothing is kept.
    caches = [
      cache.forget(counts_BC) if isinstance(cache, cache_lib.Cache) else cache
      for cache in caches
    ]
    if seen is not None:
      for step in range(C):
        seen = seen.add(token_BC[:, step], counts_BC[:, step])
    rows_B1 = jnp.arange(B)[:, None]
    history_BS = history_BS.at[
      rows_B1, jnp.where(counts_BC, positions_BC + 1, history_BS.shape[1])
    ].set(token_BC, mode="drop")
    token_B = jnp.take_along_axis(token_BC, count_B[:, None] - 1, axis=1)[:, 0]
    carry = (
      tuple(caches),
      token_B,
      length_B + count_B,
      drawn_B + count_B,
      history_BS,
      seen,
    )
    return carry, (token_BC, count_B, told, positions_BC, counts_BC)

  start = (
    caches,
    rows.token_B,
    rows.length_B,
    rows.drawn_B,
    history_BS,
    seen,
  )
  (caches, *_), found = jax.lax.scan(one_round, start, None, length=rounds)
  # [rounds, B, ...] and, of log-probabilities, [rounds, C, B, ...].
  tokens, counts, told, positions, kept = found
  told = jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), told)
  tokens, counts, positions, kept = (
    jnp.moveaxis(one, 1, 0) for one in (tokens, counts, positions, kept)
  )
  page, offset = cache_lib.slots(rows.table_BX, positions.reshape(B, -1), P)
  page = jnp.where(kept.reshape(B, -1), page, 0)
  left_pools, left_caches = [], []
  for cache, pool, begin in zip(caches, pools, first, strict=True):
    if begin is None:
      left_pools.append(cache.pools)
      left_caches.append(None)
    else:
      left_pools.append(programs.put_back(pool, cache, begin, page, offset))
      left_caches.append(cache)
  return tokens, counts, told, tuple(left_pools), tuple(left_caches)
