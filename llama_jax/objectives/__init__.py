"""What is minimised: name -> the dataclass of its section in a config.

An objective is (params, batch, frozen) -> (loss_sum, (count, sums)):

  loss_sum, count  over all of a microbatch, so that parts of a batch add up to
                   the whole and are divided once, by the whole's count
  sums             metric -> (sum, count), told as the mean, or (sum, None),
                   told as it is; scalars or arrays

and pure: it knows a model as functions of params. `frozen` holds params that
are not trained, such as {"reference": ...}.
"""

from llama_jax.objectives import distill, dpo, next_token, reward

OBJECTIVES = {
  "next_token": next_token.NextToken,
  "reward": reward.Reward,
  "dpo": dpo.DPO,
  "distill": distill.Distill,
}
