"""One update, compiled: gradients, accumulation, clipping, skipping."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from llama_jax.training import state as state_lib


def accumulate(objective: Callable, params, microbatches, frozen=None):
  """Loss sum, token count and gradient sum over [A, B, ...] microbatches.

  Sums, not means: k microbatches give what one batch of all rows gives.
  """
  grad = jax.value_and_grad(objective, has_aux=True)

  def one(batch):
    (total, (count, _)), gradients = grad(params, batch, frozen)
    return total, count, gradients

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
  schedule: optax.Schedule,
) -> Callable:
  """(state, microbatches, frozen) -> (state, metrics), to be jitted.

  A step whose loss or gradient is not finite leaves params and moments bitwise
  as they were; it is counted in state.skipped. Metrics: loss (nats a token),
  grad_norm (before clipping), learning_rate, tokens (that were scored),
  skipped (in all).
  """

  def update(state: state_lib.TrainState, microbatches, frozen=None):
    total, count, gradients = accumulate(
      objective, state.params, microbatches, frozen
    )
    count = jnp.maximum(count, 1)
    loss = total / count
    gradients = jax.tree.map(lambda g: g / count, gradients)
    norm = optax.global_norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    def choose(new, old):
      return jnp.where(finite, new, old)

    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params, finite=finite
    )
    params = optax.apply_updates(state.params, updates)
    new = state_lib.TrainState(
      step=state.step + 1,
      params=jax.tree.map(choose, params, state.params),
      # The moments are kept by the optimizer itself, the counters here.
      opt_state=jax.tree.map(
        lambda new, old: new if new.ndim else choose(new, old),
        opt_state,
        state.opt_state,
      ),
      skipped=state.skipped + jnp.where(finite, 0, 1),
    )
    metrics = {
      "loss": loss,
      "grad_norm": norm,
      "learning_rate": schedule(_updates(state)),
      "tokens": count,
      "skipped": new.skipped,
    }
    return new, metrics

  return update


def _updates(state: state_lib.TrainState) -> jax.Array:
  """Updates made: a skipped step does not move the schedule either."""
  return state.step - state.skipped
