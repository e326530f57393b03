"""Direct preference optimisation, as Llama 3 has it.

  gain = log p(answer) - log q(answer)
  m    = beta * (gain of the better - gain of the other)
  loss = -(1 - e) log sigmoid(m) - e log sigmoid(-m)
         + nll_weight * -log p(better) / tokens of it

with p the model and q the reference (arXiv:2305.18290, eq. 7); e is the label
smoothing of its conservative form. Llama 3 leaves the tokens that begin and end
an answer out of every log-probability and adds the last term with 0.2
(arXiv:2407.21783, 4.1.4; normalised by length after arXiv:2404.19733, which it
cites). length_normalised divides each log-probability by its tokens.

B rows, T tokens, S segments, P pairs.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llama_jax import errors
from llama_jax.objectives import pairs as pairs_lib

CACHED, LIVE = "cached", "live"


@dataclasses.dataclass(frozen=True)
class DPO:
  """The recipe's numbers.

  Attributes:
    beta: how dear leaving the reference is.
    nll_weight: of the better answer's negative log-likelihood.
    label_smoothing: the share of pairs taken to be labelled wrongly.
    length_normalised: log-probabilities are means over an answer's tokens.
    mask_formatting: the special tokens around an answer are left out.
    reference: "cached", its log-probabilities are computed once, before the
      first step; or "live", its params stay in memory, in the compute dtype.
  """

  beta: float
  nll_weight: float
  label_smoothing: float
  length_normalised: bool
  mask_formatting: bool
  reference: str

  def __post_init__(self):
    for name, right, allowed in (
      ("beta", 0 < self.beta < math.inf, "above 0; 0.1 is usual"),
      ("nll_weight", 0 <= self.nll_weight < math.inf, "0 or more"),
      (
        "label_smoothing",
        0 <= self.label_smoothing < 0.5,
        "0 or more, and below 0.5",
      ),
      (
        "reference",
        self.reference in (CACHED, LIVE),
        f"{CACHED} or {LIVE}",
      ),
    ):
      if not right:
        raise errors.ConfigError(
          f"objective.{name}={getattr(self, name)} must be {allowed}."
        )


def answer_logprobs(token_nll: Callable, params, batch) -> jax.Array:
  """Log-probability of the trained tokens of each segment, [B, S]."""
  nll_BT = token_nll(
    params,
    batch["tokens"],
    batch["positions"],
    batch["segments"],
    batch["targets"],
    batch["loss_mask"] > 0,
  )
  return pairs_lib.by_segment(
    -nll_BT, batch["segments"], batch["last"].shape[1]
  )


def make(config: DPO, token_nll: Callable) -> Callable:
  """The objective, which counts pairs.

  Args:
    config: see DPO.
    token_nll: (params, ids, positions, segments, targets, wanted) -> each
      target's negative log-likelihood in nats, float32 [B, T], 0 where it is
      not wanted.

  Takes a batch's pairs [B, P, 2] and last [B, S] (see data/examples.py), and
  the reference's log-probabilities of the segments as batch["reference"]
  [B, S], or its params as frozen["reference"]. Its sums, means over pairs:
  accuracy, raw_accuracy (of the model's own log-probabilities, without the
  reference), margin (m / beta), reward/better and reward/other (beta times the
  gain over the reference), logprob/better and logprob/other, and nll, the
  better answer's a token.
  """

  def objective(params, batch, frozen=None):
    own_BS = answer_logprobs(token_nll, params, batch)
    if config.reference == CACHED:
      reference_BS = batch["reference"]
    else:
      reference_BS = jax.lax.stop_gradient(
        answer_logprobs(token_nll, frozen["reference"], batch)
      )
    tokens_BS = pairs_lib.by_segment(
      batch["loss_mask"], batch["segments"], own_BS.shape[1]
    )
    tokens_BS = jnp.maximum(tokens_BS, 1)
    nll_BS = -own_BS / tokens_BS
    gain_BS = own_BS - reference_BS
    if config.length_normalised:
      gain_BS = gain_BS / tokens_BS
    pairs_BP2 = batch["pairs"]
    better_BP, other_BP = pairs_lib.split(gain_BS, pairs_BP2)
    margin_BP = better_BP - other_BP
    nll_BP, _ = pairs_lib.split(nll_BS, pairs_BP2)
    logits_BP = config.beta * margin_BP
    loss_BP = (
      -(1 - config.label_smoothing) * jax.nn.log_sigmoid(logits_BP)
      - config.label_smoothing * jax.nn.log_sigmoid(-logits_BP)
      + config.nll_weight * nll_BP
    )
    there_BP = pairs_lib.there(pairs_BP2)
    count = there_BP.sum()
    said = pairs_lib.split(own_BS, pairs_BP2)
    told = {
      "accuracy": pairs_lib.right(margin_BP),
      "raw_accuracy": pairs_lib.right(said[0] - said[1]),
      "margin": margin_BP,
      "reward/better": config.beta * better_BP,
      "reward/other": config.beta * other_BP,
      "logprob/better": said[0],
      "logprob/other": said[1],
      "nll": nll_BP,
    }
    sums = {
      name: (jnp.sum(value_BP * there_BP), count)
      for name, value_BP in told.items()
    }
    return jnp.sum(loss_BP * there_BP), (count, sums)

  return objective
