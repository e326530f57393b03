"""Next-token prediction: pretraining and, by its mask, finetuning."""

import dataclasses
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True)
class NextToken:
  """It has no knob of its own: what is trained, the data says."""


def source_sums(nll_BT, batch, num_sources: int) -> dict[str, tuple]:
  """source_loss and source_tokens of trained tokens, [num_sources] both."""
  mask_BT = batch["loss_mask"]

  def by_source(per_row_B):
    return jax.ops.segment_sum(per_row_B, batch["sources"], num_sources)

  tokens = by_source(mask_BT.sum(-1))
  nll = by_source((nll_BT * mask_BT).sum(-1))
  return {"source_loss": (nll, tokens), "source_tokens": (tokens, None)}


def make(loss_sum: Callable, num_sources: int) -> Callable:
  """The objective of a decoder, see objectives/__init__.py.

  Args:
    loss_sum: (params, ids, positions, segments, targets, weights) -> the sum
      of weight * loss over all tokens, and each token's negative log-likelihood
      [B, T], in nats.
    num_sources: into how many the loss is told apart by batch["sources"], an
      int32 [B].

  Returns:
    An objective that counts tokens. Its sums: source_loss and source_tokens,
    [num_sources] both.
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
    sums = source_sums(nll_BT, batch, num_sources)
    return total, (mask_BT.sum(), sums)

  return objective
