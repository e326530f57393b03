"""Distillation: a student learns what a teacher makes of each next word.

  loss = data * nll + t^2 * (forward * KL(p || q) + reverse * KL(q || p))

with p the teacher's and q the student's probabilities at temperature t
(arXiv:1503.02531; kernels/divergence.py says what t^2 is for). The forward
divergence has the student cover all that the teacher deems likely; the reverse
has it leave what the teacher deems unlikely (arXiv:2306.08543). Llama 3.2's 1B
and 3B were trained on the logits of larger models; with which of these, and
with what weights, is not published.

B batch, T tokens, k stored words.
"""

import dataclasses
import math
from collections.abc import Callable

from llama_jax import errors
from llama_jax.objectives import next_token


@dataclasses.dataclass(frozen=True)
class Distill:
  """The recipe's numbers.

  Attributes:
    teacher: a checkpoint reference; of the student's tokenizer.
    data: weight of the negative log-likelihood of the data's own next words.
    forward: weight of KL(p || q).
    reverse: weight of KL(q || p), for a live teacher alone.
    temperature: t.
    top_k: 0 for a live teacher, whose params stay in memory; else the teacher
      is the so many likeliest words that are stored of it at each token, and
      the probability of all others together.
  """

  teacher: str
  data: float
  forward: float
  reverse: float
  temperature: float
  top_k: int

  def __post_init__(self):
    if not self.teacher:
      raise errors.ConfigError(
        "objective.teacher is empty; give a checkpoint reference, such as"
        " --config.objective.teacher=hf:PATH."
      )
    for name in ("data", "forward", "reverse"):
      if not 0 <= getattr(self, name) < math.inf:
        raise errors.ConfigError(
          f"objective.{name}={getattr(self, name)} must be 0 or more."
        )
    if not self.forward + self.reverse > 0:
      raise errors.ConfigError(
        "objective.forward=0 and objective.reverse=0 leave the teacher out;"
        " give one of them, or use objective.name=next_token."
      )
    if not 0 < self.temperature < math.inf:
      raise errors.ConfigError(
        f"objective.temperature={self.temperature} must be above 0; 1 is plain."
      )
    if type(self.top_k) is not int or self.top_k < 0:
      raise errors.ConfigError(
        f"objective.top_k={self.top_k!r} must be a whole number, 0 or more."
      )
    if self.top_k and self.reverse:
      raise errors.ConfigError(
        f"objective.reverse={self.reverse} needs the teacher's whole"
        f" distribution, and objective.top_k={self.top_k} stores a part; use"
        " objective.top_k=0, or objective.reverse=0."
      )


def make(
  config: Distill,
  student: Callable,
  teacher: Callable,
  loss_sum: Callable,
  num_sources: int,
) -> Callable:
  """The objective, which counts tokens.

  Args:
    config: see Distill.
    student: (params, ids, positions, segments) -> what the student's logits
      are made of (Decoder.states).
    teacher: (frozen, batch) -> the same of the teacher, by its params
      frozen["teacher"]; or what a batch holds of a stored one
      (divergence.Top).
    loss_sum: (student's, teacher's, targets, weights, (data, forward, reverse,
      temperature)) -> the sum of weight * loss over all tokens, and of each
      token, [B, T]: "nll", "forward" and, of a live teacher, "reverse"
      (divergence.loss_sum).
    num_sources: see next_token.make.

  Its sums: those of next_token, nll, kl (forward) and reverse_kl, means over
  tokens in nats; the divergences unweighted and at their temperature.
  """
  mixture = (config.data, config.forward, config.reverse, config.temperature)

  def objective(params, batch, frozen=None):
    mask_BT = batch["loss_mask"]
    total, told = loss_sum(
      student(params, batch["tokens"], batch["positions"], batch["segments"]),
      teacher(frozen, batch),
      batch["targets"],
      mask_BT,
      mixture,
    )
    count = mask_BT.sum()
    names = {"nll": "nll", "forward": "kl", "reverse": "reverse_kl"}
    sums = next_token.source_sums(told["nll"], batch, num_sources)
    sums |= {
      names[name]: ((each_BT * mask_BT).sum(), count)
      for name, each_BT in told.items()
    }
    return total, (count, sums)

  return objective
