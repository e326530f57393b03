"""Which steps are left out: what is not finite, and what is far out of line."""

import flax.struct
import jax
import jax.numpy as jnp

# Steps that only teach what is usual; after them a trailing mean of about 50.
FIRST = 10
DECAY = 0.98


@flax.struct.dataclass
class Guard:
  """What is usual, and how much was left out.

  Attributes:
    skipped: steps left out in all, an int32 scalar as the next two.
    in_row: steps left out since the last one that was made.
    seen: steps made.
    loss, norm: trailing means over steps made, float32 scalars.
  """

  skipped: jax.Array
  in_row: jax.Array
  seen: jax.Array
  loss: jax.Array
  norm: jax.Array


def create() -> Guard:
  # Arrays of their own: a state that is donated must not hold one twice.
  counts = (jnp.zeros((), jnp.int32) for _ in range(3))
  return Guard(*counts, loss=jnp.zeros(()), norm=jnp.zeros(()))


def judge(
  guard: Guard, loss: jax.Array, norm: jax.Array, spike_factor: float
) -> tuple[jax.Array, Guard]:
  """(whether to make this step, the guard after it).

  Args:
    guard: before it.
    loss, norm: of the step; float32 scalars.
    spike_factor: a loss or a gradient norm above so many times its trailing
      mean is left out; 0 leaves out only what is not finite.
  """
  good = jnp.isfinite(loss) & jnp.isfinite(norm)
  if spike_factor:
    usual = (loss <= spike_factor * guard.loss) & (
      norm <= spike_factor * guard.norm
    )
    good = good & (usual | (guard.seen < FIRST))
  # A plain mean of the first few, then an exponential one.
  share = jnp.maximum(1 / (guard.seen.astype(jnp.float32) + 1), 1 - DECAY)
  made = Guard(
    skipped=guard.skipped,
    in_row=jnp.int32(0),
    seen=guard.seen + 1,
    loss=guard.loss + share * (loss - guard.loss),
    norm=guard.norm + share * (norm - guard.norm),
  )
  left_out = guard.replace(skipped=guard.skipped + 1, in_row=guard.in_row + 1)
  return good, jax.tree.map(lambda a, b: jnp.where(good, a, b), made, left_out)
