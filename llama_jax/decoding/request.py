"""What is asked of the engine and what it answers: token ids, no text."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from llama_jax import errors
from llama_jax.decoding import sampling as sampling_lib


class Constraint(Protocol):
  """Which tokens an answer may go on with; text/constraint.py makes them.

  Attributes:
    done: nothing but a stop token may follow.
  """

  done: bool

  def mask(self) -> np.ndarray:
    """uint32 [ceil(V / 32)]; bit v % 32 of word v // 32: v may come next.

    Raises UserError where nothing may, or it cannot be told; as accept does.
    """

  def accept(self, tokens: Sequence[int]) -> None:
    """Goes on by tokens that were allowed."""

  def copy(self) -> "Constraint":
    """Another at the same place, that goes on apart."""


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt and how to answer it.

  Raises UserError for what no model could answer; what this one cannot, the
  engine refuses.

  Attributes:
    prompt: token ids, at least one.
    max_new_tokens: an answer has at most so many, its stop token included.
    sampling: how tokens are chosen.
    samples: how many answers, drawn apart.
    stop_ids: an answer ends with the first of these.
    min_new_tokens: before so many there is no stop token.
    logprobs: log-probabilities of each token of an answer, and of so many of
      the likeliest at its place; None for none at all.
    prompt_logprobs: the same of the prompt's tokens but the first.
    constraint: what an answer may be.
  """

  prompt: Sequence[int]
  max_new_tokens: int
  sampling: sampling_lib.SamplingConfig
  samples: int = 1
  stop_ids: Sequence[int] = ()
  min_new_tokens: int = 0
  logprobs: int | None = None
  prompt_logprobs: int | None = None
  constraint: Constraint | None = None

  def __post_init__(self):
    _check("n", self.samples, self.samples >= 1, "1 or more")
    new, least = self.max_new_tokens, self.min_new_tokens
    _check("max_new_tokens", new, new >= 1, "1 or more")
    _check(
      "min_new_tokens",
      least,
      0 <= least <= new,
      f"from 0 to --max_new_tokens={new}",
    )
    for name in ("logprobs", "prompt_logprobs"):
      top = getattr(self, name)
      _check(name, top, top is None or top >= 0, "0 or more")


def _check(name: str, value, right: bool, allowed: str) -> None:
  if not right:
    raise errors.UserError(f"--{name}={value} must be {allowed}.")


@dataclasses.dataclass(frozen=True)
class Logprob:
  """One token's, in nats under the model itself, before any knob.

  Attributes:
    chosen: of the token that is there.
    top: (id, log-probability) of the likeliest, in their order.
  """

  chosen: float
  top: tuple[tuple[int, float], ...]


# Why an answer ended.
STOP, LENGTH, CANCELLED, ERROR = "stop", "length", "cancelled", "error"


@dataclasses.dataclass
class Completion:
  """One answer.

  Attributes:
    tokens: with its stop token, if it ended by one.
    finish_reason: STOP, LENGTH, CANCELLED or ERROR; None while it is being
      decoded.
    error: what went wrong, where its constraint did.
    logprobs: one a token, empty where not asked for.
    prompt_logprobs: one a token of the prompt but the first, where asked for.
  """

  tokens: list[int] = dataclasses.field(default_factory=list)
  finish_reason: str | None = None
  error: str = ""
  logprobs: list[Logprob] = dataclasses.field(default_factory=list)
  prompt_logprobs: list[Logprob] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Progress:
  """What a step of the engine brought for one answer.

  Attributes:
    request: the number that `submit` gave.
    sample: which of its answers, from 0.
    tokens: the new ones; none where it was cancelled.
    completion: the whole so far; it grows with the next step.
  """

  request: int
  sample: int
  tokens: tuple[int, ...]
  completion: Completion


def check_length(prompt: int, new: int, context: int) -> None:
  """Refuses what the model's context cannot hold."""
  _check("max_new_tokens", new, new >= 1, "1 or more")
  if prompt == 0:
    raise errors.UserError(
      "The prompt is empty and the model has no BOS token to begin with;"
      " give a --prompt."
    )
  if prompt + new > context:
    room = context - prompt
    advice = (
      f"use --max_new_tokens={room} or less, or a shorter prompt"
      if room > 0
      else "shorten the prompt"
    )
    raise errors.UserError(
      f"The prompt has {prompt} tokens and --max_new_tokens={new}: together"
      f" more than the model's context of {context}; {advice}."
    )
