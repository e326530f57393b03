"""AdamW with warmup, a cosine, global clipping and a decay mask.

As LLaMA 1 and 2 train (arXiv:2302.13971, 2.3; arXiv:2307.09288, 2.2).
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from llama_jax import errors


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The recipe's numbers.

  Attributes:
    peak_lr: learning rate after warmup.
    warmup_steps: steps of linear growth from 0.
    final_lr_fraction: of the peak, where the cosine ends after the last step.
    b1, b2, eps: AdamW's.
    weight_decay: applied to matrices only; norms' scales are left alone.
    clip_norm: the gradient's largest global norm.
  """

  peak_lr: float
  warmup_steps: int
  final_lr_fraction: float
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float

  def __post_init__(self):
    for name, low, high in (
      ("peak_lr", 0, float("inf")),
      ("warmup_steps", 0, float("inf")),
      ("final_lr_fraction", 0, 1),
      ("b1", 0, 1),
      ("b2", 0, 1),
      ("eps", 0, float("inf")),
      ("weight_decay", 0, float("inf")),
    ):
      value = getattr(self, name)
      if not low <= value <= high:
        raise errors.ConfigError(
          f"optimizer.{name}={value} must lie between {low} and {high}."
        )
    if not self.clip_norm > 0:
      raise errors.ConfigError(
        f"optimizer.clip_norm={self.clip_norm} must be positive; use inf for"
        " no clipping."
      )


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate by step (0 is the first), over a run of `steps`."""
  warmup = min(config.warmup_steps, steps)
  cosine = optax.cosine_decay_schedule(
    config.peak_lr, max(steps - warmup, 1), alpha=config.final_lr_fraction
  )
  # The first step already moves: (step + 1) / warmup of the peak.
  ramp = optax.linear_schedule(
    config.peak_lr / max(warmup, 1), config.peak_lr, max(warmup - 1, 1)
  )
  return optax.join_schedules([ramp, cosine], [warmup])


def decayed(params):
  """True for matrices: all kernels and the embedding, but no norm's scale."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "scale" not in [getattr(key, "key", None) for key in path],
    params,
  )


def scale_by_adam(
  b1: float, b2: float, eps: float
) -> optax.GradientTransformationExtraArgs:
  """optax.scale_by_adam whose moments are updated in place.

  Its update takes finite=, a bool scalar: where it is false the moments stay
  bitwise as they were. Both are decided in one pass, and the barrier makes the
  step's direction read the new moments. Otherwise XLA computes it from the old
  ones, and must copy all of them first: 1 GB and its traffic for 135M
  parameters.
  """
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

  def update(gradients, state, params=None, *, finite=True, **others):
    del others
    _, new = adam.update(gradients, state, params)
    new = jax.lax.optimization_barrier(
      jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
    )
    # A first step that is skipped leaves the count at 0, and 0 / 0 behind.
    count = jnp.maximum(new.count, 1)
    mu = optax.tree.bias_correction(new.mu, b1, count)
    nu = optax.tree.bias_correction(new.nu, b2, count)
    direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
    return direction, new

  return optax.GradientTransformationExtraArgs(adam.init, update)


def make(
  config: OptimizerConfig, steps: int
) -> optax.GradientTransformationExtraArgs:
  """The whole chain: clip, Adam, decay, rate. Its update takes finite=."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    scale_by_adam(config.b1, config.b2, config.eps),
    optax.add_decayed_weights(config.weight_decay, decayed),
    optax.scale_by_learning_rate(schedule(config, steps)),
  )
