"""The keys and values of the tokens so far, in slots allocated once.

B batch, S slots, K kv heads, H head dim.
"""

import flax.struct
import jax
import jax.numpy as jnp

from llama_jax.model import config as config_lib


@flax.struct.dataclass
class Cache:
  """A static cache. All rows write the same slots; shorter ones are padded.

  Attributes:
    keys: one [B*K, H, S] per layer (kernels/cached.py says why).
    values: one [B*K, S, H] per layer.
    positions_BS: position of each slot's token.
    segments_BS: 1 where a slot holds a token, 0 where it is unused or padding.
    used: slots written so far, an int32 scalar.
    fresh: true until the first write, when attention needs no cache at all.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  positions_BS: jax.Array
  segments_BS: jax.Array
  used: jax.Array
  fresh: bool = flax.struct.field(pytree_node=False)

  @property
  def slots(self) -> int:
    return self.positions_BS.shape[1]


def empty(
  config: config_lib.LlamaConfig, batch: int, slots: int, dtype
) -> Cache:
  """A cache without tokens."""
  merged = batch * config.num_kv_heads
  layers = range(config.num_layers)
  return Cache(
    keys=tuple(
      jnp.zeros((merged, config.head_dim, slots), dtype) for _ in layers
    ),
    values=tuple(
      jnp.zeros((merged, slots, config.head_dim), dtype) for _ in layers
    ),
    positions_BS=jnp.zeros((batch, slots), jnp.int32),
    segments_BS=jnp.zeros((batch, slots), jnp.int32),
    used=jnp.int32(0),
    fresh=True,
  )


def write(keys, values, k_BTKH, v_BTKH, used):
  """Puts T new tokens of one layer into the slots from used on."""
  B, T, K, H = k_BTKH.shape
  k_nHT = k_BTKH.transpose(0, 2, 3, 1).reshape(B * K, H, T)
  v_nTH = v_BTKH.transpose(0, 2, 1, 3).reshape(B * K, T, H)
  return (
    jax.lax.dynamic_update_slice(keys, k_nHT.astype(keys.dtype), (0, 0, used)),
    jax.lax.dynamic_update_slice(
      values, v_nTH.astype(values.dtype), (0, used, 0)
    ),
  )
