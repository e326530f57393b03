"""What a run measures as it goes, and how often."""

import dataclasses
from collections.abc import Mapping

from llama_jax import errors


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Evaluation in the training loop.

  Attributes:
    every: steps between two; the run's last step is measured too. 0 is never.
    rows: of each held-out domain of the prepared data, the first so many.
    tasks: names of evals.EVALS, measured on `text`.
    text: a path or several, or a name for each of more: {"python": PATHS}.
    window: tokens that a task's model sees at once.
  """

  every: int
  rows: int
  tasks: tuple[str, ...]
  text: str | tuple[str, ...] | Mapping[str, str | tuple[str, ...]]
  window: int

  def __post_init__(self):
    for name, least in (("every", 0), ("rows", 1), ("window", 2)):
      if getattr(self, name) < least:
        raise errors.ConfigError(
          f"evaluation.{name}={getattr(self, name)} must be {least} or more."
        )
    if bool(self.tasks) != bool(self.text):
      raise errors.ConfigError(
        f"evaluation.tasks={self.tasks} and evaluation.text={self.text!r}: give"
        " both, what to measure and on what, or neither."
      )

  @property
  def texts(self) -> dict[str, str | tuple[str, ...]]:
    """Paths by name; "" where there is one set of them without a name."""
    if not self.text:
      return {}
    if hasattr(self.text, "items"):  # a ConfigDict is no Mapping
      return dict(self.text.items())
    return {"": self.text}

  def due(self, step: int, steps: int) -> bool:
    """Whether to measure after update number `step` of a run of `steps`."""
    return bool(self.every) and (step % self.every == 0 or step == steps)
