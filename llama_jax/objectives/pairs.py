"""Pairs of answers in packed rows: from tokens to segments to pairs.

B rows, T tokens, S segments of a row, P pairs of a row.
"""

import jax
import jax.numpy as jnp

# Of the chance that the better answer wins, from a half to 1, for calibration.
BINS = 10


def by_segment(values_BT, segments_BT, size: int) -> jax.Array:
  """Sums over the tokens of segments 1 to size, [B, S]."""

  def one(values_T, segments_T):
    return jax.ops.segment_sum(values_T, segments_T, size + 1)[1:]

  return jax.vmap(one)(values_BT, segments_BT)


def split(values_BS, pairs_BP2) -> tuple[jax.Array, jax.Array]:
  """Values of the better and of the other answer, [B, P] both.

  pairs_BP2: segments, counted from 1; what a 0 gives is to be left out.
  """
  at_BP2 = jnp.maximum(pairs_BP2 - 1, 0)
  better_BP, other_BP = (
    jnp.take_along_axis(values_BS, at_BP2[..., i], axis=1) for i in (0, 1)
  )
  return better_BP, other_BP


def there(pairs_BP2) -> jax.Array:
  """1 where there is a pair, float32 [B, P]."""
  return (pairs_BP2[..., 0] > 0).astype(jnp.float32)


def right(margin_BP) -> jax.Array:
  """1 where the better answer wins, 1/2 where both are alike."""
  return (jnp.sign(margin_BP) + 1) / 2


def calibration(margin_BP, there_BP) -> dict[str, tuple]:
  """Whether the likelier answer is the better, by how likely it is said to be.

  margin_BP: the logit of the better one's winning. Bin i of BINS holds pairs
  whose likelier answer wins with a probability from (1 + i / BINS) / 2 on.
  """
  sure_BP = jax.nn.sigmoid(jnp.abs(margin_BP))
  bin_BP = jnp.clip((2 * sure_BP - 1) * BINS, 0, BINS - 1).astype(jnp.int32)

  def by_bin(values_BP):
    return jax.ops.segment_sum(
      (values_BP * there_BP).ravel(), bin_BP.ravel(), BINS
    )

  count = by_bin(jnp.ones_like(margin_BP))
  return {
    "calibration": (by_bin(right(margin_BP)), count),
    "calibration_pairs": (count, None),
  }
