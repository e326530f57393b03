"""The attention half of a block: projections, RoPE, kernel, cache.

B batch, T tokens, t = B * T, N heads, K kv heads, n = N + 2 K, H head dim, D
embed.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama_jax import kernels
from llama_jax.model import config as config_lib
from llama_jax.model import linear, rope
from llama_jax.parallel import rules


class Tokens(NamedTuple):
  """What every layer needs to know of the tokens it works on."""

  positions_BT: jax.Array
  segments_BT: jax.Array
  cos_BT2h: jax.Array
  sin_BT2h: jax.Array


def attend(kernel: str, q_BTNH, k_BTKH, v_BTKH, tokens: Tokens) -> jax.Array:
  """Tokens' attention to one another by a kernel, on any mesh.

  kernel: "auto" or a key of kernels.ATTENTION; raises ConfigError where it
  cannot run.
  """
  name = kernels.resolve(kernel, q_BTNH.dtype, q_BTNH.shape[-1])

  def call(q_BTNH, k_BTKH, v_BTKH, pos_BT, seg_BT):
    return kernels.ATTENTION[name](
      q_BTNH,
      k_BTKH,
      v_BTKH,
      q_pos_BT=pos_BT,
      k_pos_BS=pos_BT,
      q_seg_BT=seg_BT,
      k_seg_BS=seg_BT,
    )

  mesh = jax.sharding.get_abstract_mesh()
  if name in kernels.PER_DEVICE and not mesh.empty and mesh.size > 1:
    _, parts = rules.batch_parts()
    # Fewer rows than parts, as in a prefill: every part does all of them.
    batch = None if len(q_BTNH) % parts else "batch"
    heads = rules.spec((batch, None, "heads", None))
    kv_heads = rules.spec((batch, None, "kv_heads", None))
    rows = rules.spec((batch, None))
    call = jax.shard_map(
      call,
      in_specs=(heads, kv_heads, kv_heads, rows, rows),
      out_specs=heads,
      # Pallas calls do not say what varies over the mesh.
      check_vma=False,
    )
  return call(q_BTNH, k_BTKH, v_BTKH, tokens.positions_BT, tokens.segments_BT)


class Attention(nn.Module):
  """Grouped-query self-attention (arXiv:2305.13245) over segments."""

  config: config_lib.LlamaConfig
  dtype: jnp.dtype
  kernel: str
  transposed: bool = False

  @nn.compact
  def __call__(self, x_BTD, tokens: Tokens, cache=None, held=None):
    """Returns [B, T, D] and what this layer holds now, or None uncached.

    cache, held: what model.cache's split gives, of this layer.
    """
    config = self.config
    B, T, D = x_BTD.shape
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    # Flat tokens: with [B, T, D] the weight gradients contract two dimensions,
    # which XLA on CPU turns into slow strided transposes.
    x_tD = x_BTD.reshape(B * T, D)

    def project(name, heads, axis):
      layer_ = linear.Linear(
        (D, heads * H),
        ("embed", axis),
        0.02,
        self.dtype,
        self.transposed,
        name=name,
      )
      y_BTNH = layer_(x_tD).reshape(B, T, heads, H)
      return rules.constrain(y_BTNH, "batch", None, axis, None)

    if self.has_variable("params", "qkv"):  # unrolled.merge
      all_BTnH = project("qkv", N + 2 * K, "heads")
      q_BTNH, k_BTKH, v_BTKH = jnp.split(all_BTnH, (N, N + K), axis=2)
    else:
      q_BTNH = project("query", N, "heads")
      k_BTKH = project("key", K, "kv_heads")
      v_BTKH = project("value", K, "kv_heads")
    q_BTNH = rope.rotate(q_BTNH, tokens.cos_BT2h, tokens.sin_BT2h)
    k_BTKH = rope.rotate(k_BTKH, tokens.cos_BT2h, tokens.sin_BT2h)

    if cache is not None:
      held = cache.write(held, k_BTKH, v_BTKH)
    if cache is None or cache.fresh:
      out_BTNH = attend(self.kernel, q_BTNH, k_BTKH, v_BTKH, tokens)
    else:
      out_BTNH = cache.attend(
        held, q_BTNH, tokens.positions_BT, tokens.segments_BT
      )
    out = linear.Linear(
      (N * H, D),
      ("heads", "embed"),
      0.02 / (2 * config.num_layers) ** 0.5,
      self.dtype,
      self.transposed,
      name="out",
    )
    return out(out_BTNH.reshape(B * T, N * H)).reshape(B, T, D), held
