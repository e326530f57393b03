"""How batch size and sequence length grow, by step number alone.

Rows lie ready in one length, the longest; a shorter sequence is a part of one.
A batch takes whole rows, so where a step's data begins is a number of rows.
"""

import dataclasses
from collections.abc import Sequence

from llama_jax import errors


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stretch of a run.

  Attributes:
    from_tokens: it begins with the first step that has seen so many.
    batch_size: sequences of an update, over all devices and microbatches.
    sequence_length: tokens of each.
    accumulation: microbatches that an update is summed over.
  """

  from_tokens: int
  batch_size: int
  sequence_length: int
  accumulation: int

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value, least = getattr(self, field.name), field.name != "from_tokens"
      if type(value) is not int or value < least:
        raise errors.ConfigError(
          f"training.ramp: {field.name}={value!r} must be a whole number,"
          f" {int(least)} or more."
        )

  @property
  def tokens(self) -> int:
    """Of one update."""
    return self.batch_size * self.sequence_length


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a step stands.

  Attributes:
    stage: its stage.
    tokens: seen before it.
    row: the first row it takes of the endless stream.
    rows: how many.
    cuts: sequences that each row is cut into.
  """

  stage: Stage
  tokens: int
  row: int
  rows: int
  cuts: int


class Ramp:
  """Stages one after another. row_length: of the rows that lie ready."""

  def __init__(self, stages: Sequence[Stage], row_length: int):
    self.stages = tuple(stages)
    self.row_length = row_length
    knob = "training.batch_size, data.sequence_length and training.ramp"
    if self.stages[0].from_tokens != 0:
      raise errors.ConfigError("the first stage of a ramp starts at token 0.")
    # First step, tokens and rows of each stage.
    self._starts = [(0, 0, 0)]
    for stage in self.stages:
      cuts = row_length // stage.sequence_length
      if row_length % stage.sequence_length or stage.batch_size % cuts:
        raise errors.ConfigError(
          f"{knob}: a batch of {stage.batch_size} x {stage.sequence_length}"
          f" tokens is no whole number of rows of {row_length}; use a"
          " sequence length that divides the rows', and a batch size that is"
          f" a multiple of {max(cuts, 1)}."
        )
      if stage.batch_size % stage.accumulation:
        raise errors.ConfigError(
          f"training.accumulation={stage.accumulation} does not divide"
          f" training.batch_size={stage.batch_size} (of the stage from token"
          f" {stage.from_tokens:,} of training.ramp)."
        )
    for stage, after in zip(self.stages, self.stages[1:], strict=False):
      step, tokens, row = self._starts[-1]
      steps = -(-(after.from_tokens - tokens) // stage.tokens)
      if steps < 1:
        raise errors.ConfigError(
          f"training.ramp: the stage from token {after.from_tokens:,} leaves"
          " the one before it no step; order them by from_tokens, each at"
          f" least a batch of {stage.tokens:,} tokens later."
        )
      seen = steps * stage.tokens
      self._starts.append(
        (step + steps, tokens + seen, row + seen // row_length)
      )

  def at(self, step: int) -> Place:
    """Where a step stands; 0 is the first."""
    index = max(i for i, start in enumerate(self._starts) if start[0] <= step)
    stage = self.stages[index]
    first, tokens, row = self._starts[index]
    done = (step - first) * stage.tokens
    return Place(
      stage=stage,
      tokens=tokens + done,
      row=row + done // self.row_length,
      rows=stage.tokens // self.row_length,
      cuts=self.row_length // stage.sequence_length,
    )
