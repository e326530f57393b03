"""The decoder's forward with the weights of one layer in memory at a time.

For models larger than memory: decoder.Block is the block, its weights come
from a callable. Nothing is kept for a backward pass or for decoding.

R rows, T tokens, D embed, V vocab.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.kernels import cross_entropy
from llama_jax.model import attention, decoder, norm, rope
from llama_jax.model import config as config_lib


def logits(
  config: config_lib.LlamaConfig,
  embedded_RTD: np.ndarray,
  positions_RT: np.ndarray,
  layer: Callable[[int], dict[str, Any]],
  final_scale_D: np.ndarray,
  head: Iterable[np.ndarray],
) -> np.ndarray:
  """Float32 logits [R, T, V] of one segment a row.

  Args:
    config: the model's configuration.
    embedded_RTD: rows of the embedding.
    positions_RT: of the tokens.
    layer: index -> the params of its decoder.Block, in any dtype.
    final_scale_D: of the last norm.
    head: blocks of the output projection [rows, D], which cover V in order.
  """
  block = decoder.Block(config, jnp.dtype(jnp.float32), "reference")
  positions_RT = jnp.asarray(positions_RT, jnp.int32)
  tokens = attention.Tokens(
    positions_RT,
    jnp.ones_like(positions_RT),
    *rope.table(config, positions_RT),
  )
  apply = jax.jit(
    lambda params, x: block.apply({"params": params}, x, tokens)[0]
  )
  project = jax.jit(lambda x, rows: cross_entropy.project(x, rows, tied=True))
  x_RTD = jnp.asarray(embedded_RTD, jnp.float32)
  for index in range(config.num_layers):
    x_RTD = apply(layer(index), x_RTD).block_until_ready()
  x_RTD = norm.rms_norm(x_RTD, jnp.asarray(final_scale_D), config.norm_eps)
  return np.concatenate([project(x_RTD, rows) for rows in head], axis=-1)
