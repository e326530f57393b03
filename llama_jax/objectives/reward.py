"""Reward models that rank answers, as Llama 2 and Llama 3 have them.

  loss = -log sigmoid(r(better) - r(other) - margin(rating))

with r the score of an answer's last token (arXiv:2307.09288, eq. 2, and its
table 27 for the margins). Llama 3 has no margin and ranks an edited answer
above the chosen one (arXiv:2407.21783, 4.1.2); all pairs of three answers
count alike.

Llama 2's safety model adds a classification loss whose formula is not
published. Ours, over the answers that are told safe or not:

  safety_weight * -log sigmoid(r) of a safe one, -log sigmoid(-r) of another

so that sigmoid(r) is the chance of being safe, as its PPO reads it (3.2.3),
divided by the count of pairs like the rest.

B rows, T tokens, S segments, P pairs.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llama_jax import errors
from llama_jax.objectives import pairs as pairs_lib

# How much better, as data/dialogs.py counts it.
RATINGS = ("significantly_better", "better", "slightly_better", "unsure")
# By rating.
MARGINS = {
  "none": (0.0, 0.0, 0.0, 0.0),
  "small": (1.0, 2 / 3, 1 / 3, 0.0),
  "large": (3.0, 2.0, 1.0, 0.0),
}


@dataclasses.dataclass(frozen=True)
class Reward:
  """The recipe's numbers.

  Attributes:
    margins: one of MARGINS; a pair without a rating has none.
    safety_weight: of the classification loss.
  """

  margins: str
  safety_weight: float

  def __post_init__(self):
    if self.margins not in MARGINS:
      raise errors.ConfigError(
        f"objective.margins={self.margins!r} is not known; use one of"
        f" {', '.join(MARGINS)}."
      )
    if not 0 <= self.safety_weight < math.inf:
      raise errors.ConfigError(
        f"objective.safety_weight={self.safety_weight} must be 0 or more."
      )


def make(config: Reward, rewards: Callable) -> Callable:
  """The objective, which counts pairs.

  Args:
    config: see Reward.
    rewards: (params, ids, positions, segments) -> the score of each token's
      hidden state, float32 [B, T].

  Takes a batch's pairs, ratings, last and safe (see data/examples.py). Its
  sums, means over pairs: accuracy, accuracy/RATING, margin, calibration; over
  answers: reward, and safety_accuracy of those told safe or not.
  """
  margins = jnp.array(MARGINS[config.margins], jnp.float32)

  def objective(params, batch, frozen=None):
    del frozen
    rewards_BT = rewards(
      params, batch["tokens"], batch["positions"], batch["segments"]
    )
    last_BS = batch["last"]
    rewards_BS = jnp.take_along_axis(rewards_BT, last_BS, axis=1)
    pairs_BP2, ratings_BP = batch["pairs"], batch["ratings"]
    there_BP = pairs_lib.there(pairs_BP2)
    count = there_BP.sum()
    better_BP, other_BP = pairs_lib.split(rewards_BS, pairs_BP2)
    difference_BP = better_BP - other_BP
    rated_BP = (ratings_BP >= 0).astype(jnp.float32)
    margin_BP = margins[jnp.maximum(ratings_BP, 0)] * rated_BP
    loss = jnp.sum(-jax.nn.log_sigmoid(difference_BP - margin_BP) * there_BP)
    # Segment s ends at 0 only where there is none: an answer has two tokens.
    real_BS = (last_BS > 0).astype(jnp.float32)
    told_BS = (batch["safe"] >= 0) * real_BS
    sign_BS = 2.0 * batch["safe"] - 1
    safety = jnp.sum(-jax.nn.log_sigmoid(sign_BS * rewards_BS) * told_BS)
    right_BP = pairs_lib.right(difference_BP)
    sums = {
      "accuracy": (jnp.sum(right_BP * there_BP), count),
      "margin": (jnp.sum(difference_BP * there_BP), count),
      "reward": (jnp.sum(rewards_BS * real_BS), real_BS.sum()),
      **pairs_lib.calibration(difference_BP, there_BP),
    }
    for index, rating in enumerate(RATINGS):
      of_BP = there_BP * (ratings_BP == index)
      sums[f"accuracy/{rating}"] = (jnp.sum(right_BP * of_BP), of_BP.sum())
    if config.safety_weight:
      loss = loss + config.safety_weight * safety
      judged_BS = pairs_lib.right(sign_BS * rewards_BS) * told_BS
      sums["safety_accuracy"] = (judged_BS.sum(), told_BS.sum())
    return loss, (count, sums)

  return objective
