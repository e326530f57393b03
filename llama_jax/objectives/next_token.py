"""Next-token prediction: pretraining and, by its mask, finetuning."""

from collections.abc import Callable

import jax


def make(loss_sum: Callable, num_sources: int) -> Callable:
  """The objective of a decoder.

  Args:
    loss_sum: (params, ids, positions, segments, targets, weights) -> the sum
      of weight * loss over all tokens, and each token's negative log-likelihood
      [B, T], in nats.
    num_sources: into how many the loss is told apart by batch["sources"], an
      int32 [B].

  Returns:
    (params, batch, frozen) -> (loss_sum, (count, sums)): a sum and the tokens
    it was taken over, so that parts of a batch add up to the whole; sums has
    "source": (negative log-likelihood, tokens) of each source, [S] both.
  """

  def objective(params, batch, frozen=None):
    del frozen
    mask_BT = batch["loss_mask"]
    total, nll_BT = loss_sum(
      params,
      batch["tokens"],
      batch["positions"],
      batch["segments"],
      batch["targets"],
      mask_BT,
    )

    def by_source(per_row_B):
      return jax.ops.segment_sum(per_row_B, batch["sources"], num_sources)

    sums = (by_source((nll_BT * mask_BT).sum(-1)), by_source(mask_BT.sum(-1)))
    return total, (mask_BT.sum(), {"source": sums})

  return objective
