"""The learning rate, counted in tokens.

Where the batch grows during a run, so do the tokens of a step, and a schedule
that counted steps would bend with it. Computed in float64 on the host: the
compiled step takes the rate as a number.
"""

import math
from typing import Protocol

SCHEDULES = ("cosine", "linear", "constant", "wsd")


class Shape(Protocol):
  """What a schedule is made of; OptimizerConfig has it."""

  peak_lr: float
  schedule: str
  warmup_steps: int
  final_lr_fraction: float
  decay_fraction: float


def learning_rate(
  shape: Shape, step: int, tokens: int, warmup_tokens: int, total_tokens: int
) -> float:
  """The rate of one step.

  Args:
    shape: of the curve: "cosine" and "linear" fall from the end of the warmup
      to the end of the run, "constant" stays, "wsd" (warmup, stable, decay;
      arXiv:2404.06395) falls linearly over the last decay_fraction of the run.
      All but "constant" end at final_lr_fraction of the peak.
    step: 0 is the first. The warmup grows by steps and moves at once: its first
      is peak / warmup_steps.
    tokens: seen before this step.
    warmup_tokens: seen before step warmup_steps.
    total_tokens: of the whole run.
  """
  if step < shape.warmup_steps:
    return shape.peak_lr * (step + 1) / shape.warmup_steps
  if shape.schedule == "constant":
    return shape.peak_lr
  start = warmup_tokens
  if shape.schedule == "wsd":
    start = max(start, total_tokens * (1 - shape.decay_fraction))
  part = (tokens - start) / max(total_tokens - start, 1)
  part = min(max(part, 0.0), 1.0)
  if shape.schedule == "cosine":
    part = (1 - math.cos(math.pi * part)) / 2
  return shape.peak_lr * (1 - part * (1 - shape.final_lr_fraction))
