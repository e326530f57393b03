"""AdamW with global clipping and a decay mask.

As LLaMA 1 and 2 train (arXiv:2302.13971, 2.3; arXiv:2307.09288, 2.2).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from llama_jax import errors
from llama_jax.training import schedule as schedule_lib

MOMENTS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The recipe's numbers.

  Attributes:
    peak_lr: learning rate after warmup.
    schedule: one of schedule.SCHEDULES.
    warmup_steps: steps of linear growth from 0, or
    warmup_fraction: of the run's steps, where that is more.
    final_lr_fraction: of the peak, where the schedule ends with the run.
    decay_fraction: of the run, in which "wsd" falls.
    b1, b2, eps: AdamW's.
    weight_decay: applied to matrices only; norms' scales are left alone.
    clip_norm: the gradient's largest global norm.
    moments_dtype: of Adam's moments at rest, one of MOMENTS. With b2 above 0.99
      bfloat16 rounds most of the second moment's changes away.
  """

  peak_lr: float
  schedule: str
  warmup_steps: int
  final_lr_fraction: float
  decay_fraction: float
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float
  moments_dtype: str
  warmup_fraction: float = 0.0

  def __post_init__(self):
    for name, right, allowed in (
      ("peak_lr", 0 <= self.peak_lr < math.inf, "finite, 0 or more"),
      ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
      ("warmup_fraction", 0 <= self.warmup_fraction <= 1, "from 0 to 1"),
      ("final_lr_fraction", 0 <= self.final_lr_fraction <= 1, "from 0 to 1"),
      ("decay_fraction", 0 <= self.decay_fraction <= 1, "from 0 to 1"),
      ("b1", 0 <= self.b1 < 1, "0 or more, and below 1"),
      ("b2", 0 <= self.b2 < 1, "0 or more, and below 1"),
      ("eps", 0 < self.eps < math.inf, "finite, and above 0"),
      ("weight_decay", 0 <= self.weight_decay < math.inf, "finite, 0 or more"),
    ):
      if not right:
        raise errors.ConfigError(
          f"optimizer.{name}={getattr(self, name)} must be {allowed}."
        )
    if not self.clip_norm > 0:
      raise errors.ConfigError(
        f"optimizer.clip_norm={self.clip_norm} must be positive; use inf for"
        " no clipping."
      )
    for name, allowed in (
      ("schedule", schedule_lib.SCHEDULES),
      ("moments_dtype", MOMENTS),
    ):
      if getattr(self, name) not in allowed:
        raise errors.ConfigError(
          f"optimizer.{name}={getattr(self, name)!r} is not known; use one of"
          f" {', '.join(allowed)}."
        )
    if self.schedule == "wsd" and not self.decay_fraction:
      raise errors.ConfigError(
        "optimizer.schedule=wsd falls over the last optimizer.decay_fraction of"
        " the run, which is 0.0; use 0.1 or 0.2, or schedule=constant."
      )


def decayed(params):
  """True for matrices: all kernels and the embedding, but no norm's scale."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "scale" not in [getattr(key, "key", None) for key in path],
    params,
  )


def scale_by_adam(
  b1: float, b2: float, eps: float, dtype: str
) -> optax.GradientTransformationExtraArgs:
  """optax.scale_by_adam whose moments are of dtype and updated in place.

  Its update takes good=, a bool scalar: where it is false the moments stay
  bitwise as they were. Both are decided in one pass, and the barrier makes the
  step's direction read the new moments. Otherwise XLA computes it from the old
  ones, and must copy all of them first: 1 GB and its traffic for 135M
  parameters.
  """
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

  def cast(state, to):
    mu, nu = optax.tree.cast((state.mu, state.nu), to)
    return state._replace(mu=mu, nu=nu)

  def init(params):
    return cast(adam.init(params), dtype)

  def update(gradients, state, params=None, *, good=True, **others):
    del others
    _, new = adam.update(gradients, cast(state, jnp.float32), params)
    new = jax.lax.optimization_barrier(
      jax.tree.map(lambda n, o: jnp.where(good, n, o), cast(new, dtype), state)
    )
    # A first step that is skipped leaves the count at 0, and 0 / 0 behind.
    count = jnp.maximum(new.count, 1)
    mu, nu = optax.tree.cast((new.mu, new.nu), jnp.float32)
    mu = optax.tree.bias_correction(mu, b1, count)
    nu = optax.tree.bias_correction(nu, b2, count)
    direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
    return direction, new

  return optax.GradientTransformationExtraArgs(init, update)


def make(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
  """Clip, Adam, decay: the direction of a step, before the learning rate.

  Its update takes good=, see scale_by_adam.
  """
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    scale_by_adam(config.b1, config.b2, config.eps, config.moments_dtype),
    optax.add_decayed_weights(config.weight_decay, decayed),
  )
