"""What the engine runs on the device: one call that reads, one that draws.

Both go through the decoder's one forward. They are compiled once for each size
of their arrays, which the engine rounds up to powers of two.

Reading packs what is unread of any number of sequences into one row, told apart
by segments; what they have in their pages already is laid before it. Drawing
has a row for each sequence. Where no kernel reads pages in place, the pages of
all rows are copied together (`gather`) into a static cache; calls go on with
that copy while its rows stay and its room lasts, and each puts its new columns
into the pages too.

B rows, T tokens, R sequences that draw after reading, C tokens drawn in a call,
X pages of a row, P tokens of a page, S slots, E tokens told of.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from llama_jax.decoding import compiling, sampling
from llama_jax.kernels import cached, paged
from llama_jax.model import cache as cache_lib

Pools = tuple[paged.Pool, ...]

# Rows of logits that exist at once where a prompt is scored.
_SCORED = 64


@flax.struct.dataclass
class Packed:
  """What is read: T tokens of some sequences, one after the other.

  Attributes:
    ids_T, positions_T, segments_T: segment i + 1 is the i-th sequence's, 0 is
      padding.
    next_T: the token after each, to be scored.
    page_T, offset_T: where its keys and values go.
    table_X: the pages of what was read before, of all these sequences.
    slot_positions_S, slot_segments_S: whose they are; segment 0 for nobody's.
    last_R: where in T a sequence ends that draws; any place for padding.
    drawn_R: what it has drawn before.
  """

  ids_T: jax.Array
  positions_T: jax.Array
  segments_T: jax.Array
  next_T: jax.Array
  page_T: jax.Array
  offset_T: jax.Array
  table_X: jax.Array
  slot_positions_S: jax.Array
  slot_segments_S: jax.Array
  last_R: jax.Array
  drawn_R: jax.Array


@flax.struct.dataclass
class Rows:
  """What is drawn from: one sequence a row.

  Attributes:
    token_B: the last token, not yet in a page.
    length_B: tokens in pages; its position.
    drawn_B: tokens drawn so far.
    page_BC, offset_BC: where keys and values of the tokens go that are read:
      token_B and all that are drawn but the last; page 0 for nowhere.
    table_BX: pages, where they are read in place; else no column.
  """

  token_B: jax.Array
  length_B: jax.Array
  drawn_B: jax.Array
  page_BC: jax.Array
  offset_BC: jax.Array
  table_BX: jax.Array


def told(logits_BV, token_B, top: int | None) -> sampling.Logprobs | None:
  """sampling.logprobs, or None where none are asked for."""
  return None if top is None else sampling.logprobs(logits_BV, token_B, top)


def _spare(count: int, page_size: int) -> int:
  """Pages' worth of slots for so many new tokens in a copy."""
  return -(-count // page_size)


def _copy(pools: Pools, table_BX, spare: int, positions_BS, segments_BS):
  """A static cache over copies of pages, with room after them."""
  before = table_BX.shape[1] * pools[0].page_size
  # The room begins as a copy of page 0: as good as anything.
  table_BX = jnp.pad(table_BX, ((0, 0), (0, spare)))
  keys, values = zip(
    *(paged.gather(pool, table_BX) for pool in pools), strict=True
  )
  room = ((0, 0), (0, spare * pools[0].page_size))
  return cache_lib.Cache(
    keys,
    values,
    jnp.pad(positions_BS, room),
    jnp.pad(segments_BS, room),
    used=jnp.int32(before),
    before=before,
  )


def put_back(
  pools: Pools, cache: cache_lib.Cache, first, page_BT, offset_BT
) -> Pools:
  """The pools with a static cache's slots from `first` on in their pages."""
  B, T = page_BT.shape

  def put(pool, keys, values):
    new = cached.read(keys, values, B, first, T)
    return paged.write(pool, *new, page_BT, offset_BT)

  return tuple(map(put, pools, cache.keys, cache.values))


@compiling.jit(
  static_argnames=("decoder", "features", "top", "scored"),
  donate_argnames=("pools",),
)
def read(
  params,
  pools: Pools,
  packed: Packed,
  knobs: sampling.Knobs,
  seen: sampling.Seen | None,
  allowed_RW,
  *,
  decoder,
  features: sampling.Features,
  top: int | None,
  scored: int | None,
):
  """Reads tokens and draws the next of those sequences that are read whole.

  Args:
    top: log-probabilities of what is drawn and of so many others.
    scored: the same of the tokens in next_T.

  Returns:
    tokens [R], Logprobs [R] or None, Logprobs [T] or None, the pools.
  """
  config = decoder.config
  tokens_1T = [
    one[None] for one in (packed.ids_T, packed.positions_T, packed.segments_T)
  ]
  T, X = len(packed.ids_T), len(packed.table_X)
  P = pools[0].page_size
  if X:
    cache = _copy(
      pools,
      packed.table_X[None],
      _spare(T, P),
      packed.slot_positions_S[None],
      packed.slot_segments_S[None],
    )
  else:
    dtype = pools[0].pages[0].dtype
    cache = cache_lib.empty(config, 1, T, dtype)
  x_1TD, cache = decoder.apply(
    {"params": params}, *tokens_1T, cache, method="hidden"
  )
  pools = put_back(
    pools, cache, X * P, packed.page_T[None], packed.offset_T[None]
  )

  def logits(x_tD):
    apply = functools.partial(decoder.apply, {"params": params})
    return apply(x_tD[:, None], method="logits")[:, 0]

  x_TD = x_1TD[0]
  logits_RV = logits(x_TD[packed.last_R])
  token_R = sampling.choose(
    logits_RV,
    knobs,
    packed.drawn_R,
    features,
    seen_=seen,
    allowed_BW=allowed_RW,
  )
  scores = None
  if scored is not None:
    size = min(T, _SCORED)
    parts = (x_TD.reshape(T // size, size, -1), packed.next_T.reshape(-1, size))
    scores = jax.lax.map(
      lambda part: sampling.logprobs(logits(part[0]), part[1], scored), parts
    )
    scores = jax.tree.map(lambda a: a.reshape(T, *a.shape[2:]), scores)
  return token_R, told(logits_RV, token_R, top), scores, pools


@compiling.jit(static_argnames=("room",))
def gather(pools: Pools, table_BX, length_B, *, room: int) -> cache_lib.Cache:
  """A static cache over copies of rows' pages, with room for more tokens."""
  B, X = table_BX.shape
  P = pools[0].page_size
  positions_BS = jnp.broadcast_to(jnp.arange(X * P), (B, X * P))
  segments_BS = (positions_BS < length_B[:, None]).astype(jnp.int32)
  cache = _copy(pools, table_BX, _spare(room, P), positions_BS, segments_BS)
  return cache.replace(before=None)


@compiling.jit(
  static_argnames=("decoder", "features", "top"),
  donate_argnames=("pools", "cache"),
)
def draw(
  params,
  pools: Pools,
  cache: cache_lib.Cache | None,
  rows: Rows,
  knobs: sampling.Knobs,
  seen: sampling.Seen | None,
  allowed_BW,
  *,
  decoder,
  features: sampling.Features,
  top: int | None,
):
  """Draws C tokens a row, whatever stops it: that is the caller's to see.

  Args:
    cache: what gather gave for these rows, or the last call left; None where
      the pool's kernel reads pages in place.
    allowed_BW: for C = 1 alone, or None.

  Returns:
    tokens [B, C], Logprobs [B, C] or None, the pools, the cache or None.
  """
  B, C = rows.page_BC.shape
  in_place = cache is None
  if in_place:
    cache = cache_lib.PagedCache(pools, rows.table_BX)
  else:
    first = cache.used
  segments_B1 = jnp.ones((B, 1), jnp.int32)

  def one(carry, step):
    cache, token_B, seen = carry
    logits_B1V, cache = decoder.apply(
      {"params": params},
      token_B[:, None],
      (rows.length_B + step)[:, None],
      segments_B1,
      cache,
    )
    logits_BV = logits_B1V[:, 0]
    token_B = sampling.choose(
      logits_BV,
      knobs,
      rows.drawn_B + step,
      features,
      seen_=seen,
      allowed_BW=allowed_BW,
    )
    if seen is not None:
      seen = seen.add(token_B)
    return (cache, token_B, seen), (token_B, told(logits_BV, token_B, top))

  (cache, _, _), (tokens_CB, logprobs) = jax.lax.scan(
    one, (cache, rows.token_B, seen), jnp.arange(C)
  )
  logprobs = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), logprobs)
  if in_place:
    return tokens_CB.T, logprobs, cache.pools, None
  pools = put_back(pools, cache, first, rows.page_BC, rows.offset_BC)
  return tokens_CB.T, logprobs, pools, cache
