"""Work on tokens a chunk at a time, each part of a mesh on its own rows.

For what is too large to exist for all tokens at once: logits over a vocabulary.
What chunks add up to, as a head's gradient, is summed within a part of the
batch first, and over the parts once, behind the last chunk: left to itself the
partitioner sums whole gradients over all devices after every chunk.

B batch, T tokens, t = those of one part, n chunks, C tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llama_jax import kernels
from llama_jax.parallel import rules

# Tokens of a chunk by platform, on each device. An accelerator reads and writes
# a head's whole gradient at each chunk, which takes as long as the products of
# some 350: many at once, while their float32 logits (1 GB over 128k
# words) are little beside its memory.
TOKENS = {"cpu": 512, "gpu": 2048, "tpu": 2048}


def over(
  one: Callable, whole: Any, rows: Any, wanted_BT: jax.Array | None = None
) -> tuple[Any, Any]:
  """Calls one(whole, chunk) -> (added, each) for every chunk of tokens.

  Not to be differentiated: for the two sides of a custom_vjp.

  Args:
    one: gives a tree of what is summed over all chunks, and a tree of arrays
      [C, ...], an entry for each token.
    whole: a tree of what every chunk needs, as a head.
    rows: a tree of arrays [B, T, ...]; a chunk has [C, ...] of each, zeros
      behind the last token.
    wanted_BT: bool; tokens without are left out, at no cost where whole chunks
      of them can be. None for all.

  Returns:
    The sums, and each as [B, T, ...], 0 where a token is not wanted.
  """
  axes, parts = rules.batch_parts()
  if parts == 1 or jax.tree.leaves(rows)[0].shape[0] % parts:
    return _part(one, whole, rows, wanted_BT)

  def part(whole, rows, wanted_BT):
    added, each = _part(one, whole, rows, wanted_BT, axes)
    return jax.tree.map(lambda a: a[None], added), each

  by_part = PartitionSpec(axes)
  added, each = jax.shard_map(
    part,
    in_specs=(PartitionSpec(), by_part, by_part),
    out_specs=by_part,
    axis_names=set(axes),
    check_vma=False,
  )(whole, rows, wanted_BT)
  return jax.tree.map(lambda a: a.sum(0), added), each


def _part(one, whole, rows, wanted_BT, axes=()):
  """The same for the rows of one part of the batch."""
  B, T = jax.tree.leaves(rows)[0].shape[:2]
  t = B * T
  size = min(t, TOKENS[kernels.platform()])
  n = filled = -(-t // size)
  order_t = None
  if wanted_BT is not None:
    wanted_t = wanted_BT.reshape(t)
    order_t = jnp.argsort(~wanted_t, stable=True)
    filled = -(-jnp.sum(wanted_t) // size)
    # As many for each, since what one does may need others.
    filled = jax.lax.pmax(filled, axes) if axes else filled

  def cut(a):
    a = a.reshape(t, *a.shape[2:])
    a = a if order_t is None else a[order_t]
    a = jnp.pad(a, [(0, n * size - t)] + [(0, 0)] * (a.ndim - 1))
    return a.reshape(n, size, *a.shape[1:])

  def join(a):
    a = a.reshape(n * size, *a.shape[2:])[:t]
    if order_t is not None:
      a = a[jnp.argsort(order_t)]  # Back to where each stood.
      there = wanted_t.reshape(t, *[1] * (a.ndim - 1))
      a = jnp.where(there, a, jnp.zeros_like(a))
    return a.reshape(B, T, *a.shape[1:])

  chunks = jax.tree.map(cut, rows)

  def at(number):
    return jax.tree.map(
      lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), chunks
    )

  def step(number, state):
    added, each = state
    more, found = one(whole, at(number))
    return (
      jax.tree.map(jnp.add, added, more),
      jax.tree.map(
        lambda whole, a: jax.lax.dynamic_update_index_in_dim(
          whole, a, number, 0
        ),
        each,
        found,
      ),
    )

  added, each = jax.eval_shape(lambda: one(whole, at(0)))
  start = (
    jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), added),
    jax.tree.map(lambda a: jnp.zeros((n, *a.shape), a.dtype), each),
  )
  added, each = jax.lax.fori_loop(0, filled, step, start)
  return added, jax.tree.map(join, each)
