"""The keys and values of the tokens so far, in slots allocated once.

Two kinds, alike to the decoder: it tells a cache where the new tokens go
(`begin`) and takes it apart (`split`) into what each layer holds and what they
share; each layer writes and reads through that, and `end` gives the cache of
the next call.

B batch, T new tokens, S slots, X pages or panels of P slots, K kv heads, H head
dim.
"""

import flax.struct
import jax
import jax.numpy as jnp

from llama_jax.kernels import cached, paged
from llama_jax.model import config as config_lib


@flax.struct.dataclass
class Cache:
  """A static cache. All rows write the same slots; shorter ones are padded.

  Attributes:
    keys: one [B*K, X, H, P] per layer (kernels/cached.py says why).
    values: one [B*K, S, H] per layer.
    positions_BS: position of each slot's token.
    segments_BS: 1 where a slot holds a token, 0 where it is unused or padding.
    used: slots written so far, an int32 scalar.
    before: the same where a program knows it when it is traced, else None.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  positions_BS: jax.Array
  segments_BS: jax.Array
  used: jax.Array
  before: int | None = flax.struct.field(pytree_node=False)

  @property
  def fresh(self) -> bool:
    """Whether nothing is written yet, so that attention needs no cache."""
    return self.before == 0

  @property
  def slots(self) -> int:
    return self.positions_BS.shape[1]

  def begin(self, positions_BT, segments_BT) -> "Cache":
    """With the new tokens' places noted in the slots from used on."""
    start = (0, self.used)
    return self.replace(
      positions_BS=jax.lax.dynamic_update_slice(
        self.positions_BS, positions_BT, start
      ),
      segments_BS=jax.lax.dynamic_update_slice(
        self.segments_BS, segments_BT, start
      ),
    )

  def split(self):
    """(keys, values) of each layer, and the cache without them."""
    pairs = list(zip(self.keys, self.values, strict=True))
    return pairs, self.replace(keys=(), values=())

  def write(self, held, k_BTKH, v_BTKH):
    """Puts one layer's new tokens into their slots: what attend reads."""
    return cached.write(*held, k_BTKH, v_BTKH, self.used)

  def attend(self, held, q_BTNH, positions_BT, segments_BT) -> jax.Array:
    """The new tokens over all slots, of one layer: [B, T, N, H]."""
    return cached.attend(
      q_BTNH,
      *(one.astype(q_BTNH.dtype) for one in held),
      q_pos_BT=positions_BT,
      k_pos_BS=self.positions_BS,
      q_seg_BT=segments_BT,
      k_seg_BS=self.segments_BS,
      before=self.before,
    )

  def forget(self, kept_BT) -> "Cache":
    """Without those of the last T tokens that are not kept: nobody's slots."""
    T = kept_BT.shape[1]
    first = self.used - T
    last_BT = jax.lax.dynamic_slice_in_dim(self.segments_BS, first, T, axis=1)
    return self.replace(
      segments_BS=jax.lax.dynamic_update_slice_in_dim(
        self.segments_BS, jnp.where(kept_BT, last_BT, 0), first, axis=1
      )
    )

  def end(self, written, count: int) -> "Cache":
    """With `count` more tokens, as every layer wrote them."""
    keys, values = zip(*written, strict=True)
    return self.replace(
      keys=keys, values=values, used=self.used + count, before=None
    )


@flax.struct.dataclass
class PagedCache:
  """Pages of a pool that many sequences share (kernels/paged.py).

  Attributes:
    pools: one per layer.
    table_BX: each row's pages in order, then page 0.
    page_BT, offset_BT: where the new tokens go; set by begin.
    lengths_B: tokens of each row with the new ones; set by begin.
  """

  pools: tuple[paged.Pool, ...]
  table_BX: jax.Array
  page_BT: jax.Array | None = None
  offset_BT: jax.Array | None = None
  lengths_B: jax.Array | None = None
  fresh: bool = flax.struct.field(pytree_node=False, default=False)

  def begin(self, positions_BT, segments_BT) -> "PagedCache":
    page_BT, offset_BT = slots(
      self.table_BX, positions_BT, self.pools[0].page_size
    )
    last_B = jnp.max(jnp.where(segments_BT != 0, positions_BT, -1), axis=1)
    return self.replace(
      page_BT=jnp.where(segments_BT != 0, page_BT, 0),
      offset_BT=offset_BT,
      lengths_B=last_B + 1,
    )

  def split(self):
    """The pool of each layer, and the cache without them."""
    return list(self.pools), self.replace(pools=())

  def write(self, held: paged.Pool, k_BTKH, v_BTKH):
    return paged.write(held, k_BTKH, v_BTKH, self.page_BT, self.offset_BT)

  def attend(self, held, q_BTNH, positions_BT, segments_BT) -> jax.Array:
    return paged.attend(
      q_BTNH,
      held,
      self.table_BX,
      q_pos_BT=positions_BT,
      q_seg_BT=segments_BT,
      lengths_B=self.lengths_B,
    )

  def end(self, written, count: int) -> "PagedCache":
    del count  # Positions tell.
    return PagedCache(tuple(written), self.table_BX)


def slots(table_BX, positions_BT, page_size: int):
  """(page, offset) of positions in their rows' pages; page 0 past the table."""
  index_BT = positions_BT // page_size
  page_BT = jnp.take_along_axis(
    table_BX, jnp.minimum(index_BT, table_BX.shape[1] - 1), axis=1
  )
  page_BT = jnp.where(index_BT < table_BX.shape[1], page_BT, 0)
  return page_BT, positions_BT % page_size


def empty(
  config: config_lib.LlamaConfig, batch: int, slots: int, dtype
) -> Cache:
  """A cache without tokens, of as many slots or some more (cached.empty)."""
  keys, values = zip(
    *(
      cached.empty(batch, config.num_kv_heads, slots, config.head_dim, dtype)
      for _ in range(config.num_layers)
    ),
    strict=True,
  )
  slots = values[0].shape[1]
  return Cache(
    keys=keys,
    values=values,
    positions_BS=jnp.zeros((batch, slots), jnp.int32),
    segments_BS=jnp.zeros((batch, slots), jnp.int32),
    used=jnp.int32(0),
    before=0,
  )
