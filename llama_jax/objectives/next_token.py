"""Next-token prediction: pretraining and, by its mask, finetuning."""

from collections.abc import Callable


def make(loss_sum: Callable) -> Callable:
  """The objective of a decoder.

  Args:
    loss_sum: (params, ids, positions, segments, targets, weights) -> the sum
      of weight * negative log-likelihood over all tokens, in nats.

  Returns:
    (params, batch, frozen) -> (loss_sum, (count, metrics)): a sum and the
    tokens it was taken over, so that parts of a batch add up to the whole.
  """

  def objective(params, batch, frozen=None):
    del frozen
    total = loss_sum(
      params,
      batch["tokens"],
      batch["positions"],
      batch["segments"],
      batch["targets"],
      batch["loss_mask"],
    )
    return total, (batch["loss_mask"].sum(), {})

  return objective
