"""One update, compiled: gradients, accumulation, clipping, skipping."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from llama_jax.training import guard as guard_lib
from llama_jax.training import state as state_lib


def accumulate(objective: Callable, params, microbatches, frozen=None):
  """((loss sum, (count, sums)), gradient sum) over [A, B, ...].

  Sums, not means: k microbatches give what one batch of all rows gives.
  """
  grad = jax.value_and_grad(objective, has_aux=True)

  def one(batch):
    return grad(params, batch, frozen)

  first = jax.tree.map(lambda a: a[0], microbatches)
  if jax.tree.leaves(microbatches)[0].shape[0] == 1:
    return one(first)

  def add(sums, batch):
    return jax.tree.map(jnp.add, sums, one(batch)), None

  zeros = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, first)
  )
  return jax.lax.scan(add, zeros, microbatches)[0]


def make(
  objective: Callable,
  optimizer: optax.GradientTransformationExtraArgs,
  spike_factor: float,
  layer_norms: bool = False,
) -> Callable:
  """(state, microbatches, learning_rate, frozen) -> (state, metrics).

  To be jitted. A step that guard.judge refuses leaves params and moments
  bitwise as they were; state.guard counts it.

  Args:
    objective: see objectives/__init__.py.
    optimizer: gives a direction, see optimizer.make.
    spike_factor: see guard.judge.
    layer_norms: give the norms of every array's gradient and params too.

  Metrics: loss (what is minimised, a mean over what the objective counts),
  scored (of how many), grad_norm (before clipping), param_norm, skipped (in
  all), skipped_in_row, gradient_hash (uint32 [2], see checksum), and what the
  objective's sums tell.
  """

  def update(
    state: state_lib.TrainState, microbatches, learning_rate, frozen=None
  ):
    (total, (count, sums)), gradients = accumulate(
      objective, state.params, microbatches, frozen
    )
    count = jnp.maximum(count, 1)
    loss = total / count
    gradients = jax.tree.map(lambda g: g / count, gradients)
    norm = optax.global_norm(gradients)
    good, guard = guard_lib.judge(state.guard, loss, norm, spike_factor)

    def choose(new, old):
      return jnp.where(good, new, old)

    direction, opt_state = optimizer.update(
      gradients, state.opt_state, state.params, good=good
    )
    params = jax.tree.map(
      lambda p, d: choose(p - learning_rate * d, p), state.params, direction
    )
    new = state_lib.TrainState(
      step=state.step + 1,
      params=params,
      # The moments are kept by the optimizer itself, the counters here.
      opt_state=jax.tree.map(
        lambda new, old: new if new.ndim else choose(new, old),
        opt_state,
        state.opt_state,
      ),
      guard=guard,
    )
    metrics = {
      "loss": loss,
      "grad_norm": norm,
      "param_norm": optax.global_norm(params),
      "scored": count,
      "skipped": guard.skipped,
      "skipped_in_row": guard.in_row,
      "gradient_hash": checksum(gradients),
    }
    metrics |= tell(sums)
    if layer_norms:
      metrics["layer_grad_norms"] = _norms(gradients)
      metrics["layer_param_norms"] = _norms(params)
    return new, metrics

  return update


def tell(sums) -> dict[str, jax.Array]:
  """What an objective's sums say: means (of nothing, NaN), and plain sums."""

  def mean(part, count):
    return jnp.where(count > 0, part / jnp.maximum(count, 1), jnp.nan)

  return {
    name: part if count is None else mean(part, count)
    for name, (part, count) in sums.items()
  }


def checksum(tree) -> jax.Array:
  """Two words, uint32 [2], that change with any bit of a tree of float32.

  Sums of all words, each times a number of its place, modulo 2^32: in whole
  numbers, so that no order of summing, on any mesh, gives another.
  """
  total = jnp.zeros(2, jnp.uint32)
  for number, leaf in enumerate(jax.tree.leaves(tree), start=1):
    total = (total + _words(leaf)) * jnp.uint32(2 * number + 1)
  return total


def _words(leaf) -> jax.Array:
  """An array's part in a checksum, uint32 [2].

  Slice by slice, since XLA on CPU holds a copy of all words it sums at once:
  of stacked layers, and of every 16th row, which leaves rows on their devices.
  """
  axis = 0
  if leaf.ndim == 2:
    axis, (rows, columns) = 1, leaf.shape
    leaf = leaf.reshape(-1, math.gcd(rows, 16), columns)
  if leaf.ndim < 2:
    leaf = leaf[None]
  strides = [math.prod(leaf.shape[i + 1 :]) % 2**32 for i in range(leaf.ndim)]

  def add(index, sums):
    part = jax.lax.dynamic_index_in_dim(leaf, index, axis)
    words = jax.lax.bitcast_convert_type(part.astype(jnp.float32), jnp.uint32)
    place = index.astype(jnp.uint32) * jnp.uint32(strides[axis])
    for i, stride in enumerate(strides):
      iota = jax.lax.broadcasted_iota(jnp.uint32, part.shape, i)
      place = place + iota * jnp.uint32(stride)
    # Odd factors lose no bit; mixing the word keeps its high bits in play.
    one = words * (2 * place + 1)
    two = (words ^ (words >> 15)) * (place * jnp.uint32(0x9E3779B2) + 1)
    return sums + jnp.stack([jnp.sum(a, dtype=jnp.uint32) for a in (one, two)])

  start = jnp.zeros(2, jnp.uint32)
  return jax.lax.fori_loop(0, leaf.shape[axis], add, start)


def _norms(tree):
  """The norm of each array, by path; of stacked layers, of each layer."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  norms = {}
  for path, leaf in flat:
    names = [key.key for key in path]
    axes = tuple(range(1 if names[0] == "layers" else 0, leaf.ndim))
    norms["/".join(names)] = jnp.sqrt(jnp.sum(jnp.square(leaf), axis=axes))
  return norms
