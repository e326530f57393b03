"""From logits to the next token, on the device.

B batch, V vocab.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax import errors


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How to choose.

  Attributes:
    temperature: 0 is greedy; else logits are divided by it.
    top_k: keep the k likeliest; 0 keeps all.
    top_p: keep the likeliest that together hold this probability.
    seed: of the first request of a batch; row i has seed + i.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise errors.UserError(
        f"--temperature={self.temperature} must be 0 (greedy) or more."
      )
    if self.top_k < 0:
      raise errors.UserError(
        f"--top_k={self.top_k} must be 0 (no limit) or more."
      )
    if not 0 < self.top_p <= 1:
      raise errors.UserError(
        f"--top_p={self.top_p} must be above 0 and at most 1."
      )


def keys(config: SamplingConfig, batch: int) -> jax.Array:
  """One key a row, so that a row's draws do not depend on its neighbours."""
  return jax.vmap(jax.random.key)(config.seed + jnp.arange(batch))


def keep_likeliest(logits_BV, top_k: int, top_p: float) -> jax.Array:
  """Logits with all but the top-k / top-p words at -inf."""
  if top_k == 0 and top_p == 1:
    return logits_BV
  ordered_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  kept_BV = jnp.ones(ordered_BV.shape, bool)
  if top_k:
    kept_BV &= (jnp.arange(ordered_BV.shape[-1]) < top_k)[None]
  if top_p < 1:
    # Of what top-k left, as the field's samplers chain them.
    left_BV = jnp.where(kept_BV, ordered_BV, -jnp.inf)
    probs_BV = jax.nn.softmax(left_BV, axis=-1)
    # A word stays if those before it do not yet hold top_p.
    kept_BV &= jnp.cumsum(probs_BV, axis=-1) - probs_BV < top_p
  lowest_B1 = jnp.min(
    jnp.where(kept_BV, ordered_BV, jnp.inf), axis=-1, keepdims=True
  )
  return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)


def choose(logits_BV, keys_B, index, config: SamplingConfig) -> jax.Array:
  """The next token of each row, int32 [B].

  Args:
    logits_BV: float32.
    keys_B: one key a row (see keys).
    index: how many tokens the row has drawn so far; folded into its key.
    config: static.
  """
  if config.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = keep_likeliest(
    logits_BV / config.temperature, config.top_k, config.top_p
  )
  folded = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
  return jax.vmap(jax.random.categorical)(folded, logits_BV).astype(jnp.int32)
