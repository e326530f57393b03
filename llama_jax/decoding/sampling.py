"""From logits to the next token, on the device.

Every row of a batch has its own knobs. One that is left at its neutral value
changes nothing, bit for bit, so a row is drawn alike whatever shares its batch;
`Features` only leaves out of a program what no row of it asks for.

B batch, V vocab, E entries of a short list (padded by ids that are no word).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import errors


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How to choose, in the order in which it is done.

  Attributes:
    logit_bias: (id, what is added to its logit), -inf to forbid it.
    repetition_penalty: a positive logit of a word in prompt or answer is
      divided by it, a negative one multiplied (arXiv:1909.05858).
    frequency_penalty: taken from a word's logit for each time that the answer
      has it.
    presence_penalty: taken once, if the answer has it.
    temperature: 0 is greedy; else logits are divided by it.
    top_k: keep the k likeliest; 0 keeps all. Of equals at the border all stay,
      here and in top_p.
    top_p: keep the likeliest that together hold this probability
      (arXiv:1904.09751), of what top_k left.
    min_p: keep what is at least this times as likely as the likeliest
      (arXiv:2407.01082).
    seed: of the draws; taken modulo 2^32.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  logit_bias: tuple[tuple[int, float], ...] = ()

  def __post_init__(self):
    def check(name, right, allowed):
      if not right(getattr(self, name)):
        raise errors.UserError(
          f"--{name}={getattr(self, name)} must be {allowed}."
        )

    check("temperature", lambda t: 0 <= t < math.inf, "0 (greedy) or more")
    check("top_k", lambda k: k >= 0, "0 (no limit) or more")
    check("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1")
    check("min_p", lambda p: 0 <= p <= 1, "from 0 to 1")
    check(
      "repetition_penalty",
      lambda r: 0 < r < math.inf,
      "above 0; 1 is none",
    )
    check("presence_penalty", math.isfinite, "finite; 0 is none")
    check("frequency_penalty", math.isfinite, "finite; 0 is none")
    check(
      "logit_bias",
      lambda bias: all(i >= 0 and added < math.inf for i, added in bias),
      "pairs of a token id and a number, -inf to forbid it",
    )


class Features(NamedTuple):
  """What a program is compiled for: what any of its rows asks for."""

  draws: bool
  filters: bool
  penalties: bool
  biases: bool
  holds: bool


@flax.struct.dataclass
class Knobs:
  """Of each row, as arrays: SamplingConfig's, and what stops it.

  Attributes:
    sample_B: which of several answers to one request a row is; drawn apart.
    bias_ids_BE, bias_BE: logit_bias.
    stop_ids_BE: what ends a row.
    least_B: so many tokens are drawn before a stop token may be.
  """

  seed_B: jax.Array
  sample_B: jax.Array
  temperature_B: jax.Array
  top_k_B: jax.Array
  top_p_B: jax.Array
  min_p_B: jax.Array
  repetition_B: jax.Array
  presence_B: jax.Array
  frequency_B: jax.Array
  bias_ids_BE: jax.Array
  bias_BE: jax.Array
  stop_ids_BE: jax.Array
  least_B: jax.Array


@flax.struct.dataclass
class Seen:
  """What a row has said, for penalties.

  Attributes:
    prompt_BV: bool; the word is in the prompt.
    counts_BV: int32; how often the answer has it.
  """

  prompt_BV: jax.Array
  counts_BV: jax.Array

  def add(self, token_B, times_B=1) -> "Seen":
    """With one more token of each answer, or as often as `times` says."""
    rows_B = jnp.arange(len(token_B))
    return self.replace(
      counts_BV=self.counts_BV.at[rows_B, token_B].add(times_B)
    )


# An id that no vocabulary has: scatters drop it and no token equals it.
NO_TOKEN = np.iinfo(np.int32).max
# Words that are compared at once.
_LANES = 128


def _pad(lists: Sequence[Sequence], fill, dtype) -> np.ndarray:
  """[B, E]; E is a power of two, so that few programs are compiled."""
  longest = max(map(len, lists))
  width = 1 << (longest - 1).bit_length() if longest else 1
  padded = np.full((len(lists), width), fill, dtype)
  for row, one in zip(padded, lists, strict=True):
    row[: len(one)] = one
  return padded


def knobs(
  configs: Sequence[SamplingConfig],
  *,
  samples: Sequence[int] | None = None,
  stop_ids: Sequence[Sequence[int]] | None = None,
  least: Sequence[int] | None = None,
) -> tuple[Knobs, Features]:
  """The rows' knobs as NumPy arrays, and what they ask of a program.

  samples: 0 where not given; stop_ids: none; least: 0.
  """
  rows = len(configs)

  def column(name, dtype=np.float32):
    return np.asarray([getattr(one, name) for one in configs], dtype)

  bias = [one.logit_bias for one in configs]
  made = Knobs(
    seed_B=np.asarray([one.seed % 2**32 for one in configs], np.uint32),
    sample_B=np.asarray(samples or [0] * rows, np.int32),
    temperature_B=column("temperature"),
    top_k_B=column("top_k", np.int32),
    top_p_B=column("top_p"),
    min_p_B=column("min_p"),
    repetition_B=column("repetition_penalty"),
    presence_B=column("presence_penalty"),
    frequency_B=column("frequency_penalty"),
    bias_ids_BE=_pad([[i for i, _ in one] for one in bias], NO_TOKEN, np.int32),
    bias_BE=_pad([[add for _, add in one] for one in bias], 0, np.float32),
    stop_ids_BE=_pad(stop_ids or [()] * rows, NO_TOKEN, np.int32),
    least_B=np.asarray(least or [0] * rows, np.int32),
  )
  drawn = made.temperature_B > 0
  return made, Features(
    draws=bool(drawn.any()),
    filters=bool(
      (
        drawn & ((made.top_k_B > 0) | (made.top_p_B < 1) | (made.min_p_B > 0))
      ).any()
    ),
    penalties=bool(
      (
        (made.repetition_B != 1)
        | (made.presence_B != 0)
        | (made.frequency_B != 0)
      ).any()
    ),
    biases=any(bias),
    holds=bool((made.least_B > 0).any()),
  )


def seen(prompts, answers, vocab_size: int) -> Seen:
  """What rows of ids have said, as NumPy arrays."""

  def count(lists):
    return np.stack(
      [np.bincount(np.asarray(one, int), minlength=vocab_size) for one in lists]
    )

  return Seen(count(prompts) > 0, count(answers).astype(np.int32))


def is_stop(token_B, knobs_: Knobs) -> jax.Array:
  """Which rows end with this token: bool [B]."""
  return (token_B[:, None] == knobs_.stop_ids_BE).any(-1)


def _likeliest(weight_BV, logits_BV, target_B) -> jax.Array:
  """The fewest of the highest logits whose weights sum to target: bool [B, V].

  The lowest logit that stays is built bit by bit, each word's logit being a
  whole number that is ordered as the logit is: 32 sums over the vocabulary and
  no sort, which costs several times as much.
  """
  bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
  top = jnp.uint32(1 << 31)
  order_BV = jnp.where(bits_BV & top, ~bits_BV, bits_BV | top)

  def bit(index, lowest_B):
    tried_B = lowest_B | (top >> index.astype(jnp.uint32))
    held_BV = jnp.where(order_BV >= tried_B[:, None], weight_BV, 0)
    return jnp.where(held_BV.sum(-1) >= target_B, tried_B, lowest_B)

  lowest_B = jax.lax.fori_loop(
    0, 32, bit, jnp.zeros(len(logits_BV), jnp.uint32)
  )
  return order_BV >= lowest_B[:, None]


def _filter(logits_BV, knobs_: Knobs) -> jax.Array:
  """Logits with all but the top-k, top-p, min-p words at -inf."""

  def keep(logits_BV, kept_BV, asked_B):
    stays_BV = kept_BV | ~asked_B[:, None]
    return jnp.where(stays_BV, logits_BV, -jnp.inf)

  k_B = knobs_.top_k_B
  ones_BV = jnp.ones(logits_BV.shape, jnp.int32)
  few_B = jnp.minimum(k_B, logits_BV.shape[-1])
  logits_BV = keep(logits_BV, _likeliest(ones_BV, logits_BV, few_B), k_B > 0)
  most_B1 = logits_BV.max(-1, keepdims=True)
  weight_BV = jnp.exp(logits_BV - most_B1)
  p_B = knobs_.top_p_B
  kept_BV = _likeliest(weight_BV, logits_BV, p_B * weight_BV.sum(-1))
  logits_BV = keep(logits_BV, kept_BV, p_B < 1)
  return keep(
    logits_BV, weight_BV >= knobs_.min_p_B[:, None], knobs_.min_p_B > 0
  )


def shape(
  logits_BV,
  knobs_: Knobs,
  drawn_B,
  features: Features,
  seen_: Seen | None = None,
  allowed_BW=None,
) -> jax.Array:
  """Logits of the distribution that is drawn from, float32 [B, V].

  Args:
    logits_BV: float32, the model's.
    knobs_, features: from knobs.
    drawn_B: tokens that each row has drawn so far.
    seen_: needed for penalties.
    allowed_BW: uint32; bit v % 32 of word v // 32 says that v may come next.
  """
  B, V = logits_BV.shape
  rows_B1 = jnp.arange(B)[:, None]
  if allowed_BW is not None:
    words_BV = allowed_BW[:, np.arange(V) // 32]
    bits_V = jnp.asarray(np.arange(V) % 32, jnp.uint32)
    logits_BV = jnp.where((words_BV >> bits_V[None]) & 1, logits_BV, -jnp.inf)
  if features.biases:
    logits_BV = logits_BV.at[rows_B1, knobs_.bias_ids_BE].add(
      knobs_.bias_BE, mode="drop"
    )
  if features.holds:
    held_B = drawn_B < knobs_.least_B
    logits_BV = logits_BV.at[rows_B1, knobs_.stop_ids_BE].add(
      jnp.where(held_B, -jnp.inf, 0)[:, None], mode="drop"
    )
  if features.penalties:
    counts_BV = seen_.counts_BV
    factor_B1 = knobs_.repetition_B[:, None]
    repeated_BV = jnp.where(
      logits_BV > 0, logits_BV / factor_B1, logits_BV * factor_B1
    )
    logits_BV = jnp.where(
      seen_.prompt_BV | (counts_BV > 0), repeated_BV, logits_BV
    )
    logits_BV -= knobs_.frequency_B[:, None] * counts_BV
    logits_BV -= knobs_.presence_B[:, None] * (counts_BV > 0)
  if features.draws:
    greedy_B = knobs_.temperature_B == 0
    logits_BV = (
      logits_BV / jnp.where(greedy_B, 1, knobs_.temperature_B)[:, None]
    )
  if features.filters:
    logits_BV = _filter(logits_BV, knobs_)
  return logits_BV


def keys(knobs_: Knobs, drawn_B) -> jax.Array:
  """The key of each row's next draw: of seed, sample and place alone."""

  def one(seed, sample, place):
    return jax.random.fold_in(
      jax.random.fold_in(jax.random.key(seed), sample), place
    )

  return jax.vmap(one)(knobs_.seed_B, knobs_.sample_B, drawn_B)


def likeliest(logits_BV) -> jax.Array:
  """The first of each row's highest logits, int32 [B].

  Of whole vectors as maxima over rows of them: argmax is one word after the
  other on CPU, two to three times as long.
  """
  B, V = logits_BV.shape
  if V % _LANES:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BRL = logits_BV.reshape(B, -1, _LANES)
  most_B11 = logits_BRL.max(1, keepdims=True).max(2, keepdims=True)
  words_RL = jnp.arange(V, dtype=jnp.int32).reshape(-1, _LANES)
  # Where nothing equals the highest, as if it is NaN, the last word.
  first_BRL = jnp.where(logits_BRL == most_B11, words_RL[None], V - 1)
  return first_BRL.min(1).min(1)


def choose(
  logits_BV, knobs_: Knobs, drawn_B, features: Features, **rest
) -> jax.Array:
  """The next token of each row, int32 [B]; arguments as shape's."""
  logits_BV = shape(logits_BV, knobs_, drawn_B, features, **rest)
  token_B = likeliest(logits_BV)
  if features.draws:
    warm_B = jax.vmap(jax.random.categorical)(keys(knobs_, drawn_B), logits_BV)
    token_B = jnp.where(knobs_.temperature_B == 0, token_B, warm_B)
  return token_B.astype(jnp.int32)


@flax.struct.dataclass
class Logprobs:
  """Log-probabilities in nats under the model itself, before any knob.

  Attributes:
    chosen_B: of the token that was drawn.
    top_BE, top_ids_BE: of the likeliest, in their order.
  """

  chosen_B: jax.Array
  top_BE: jax.Array
  top_ids_BE: jax.Array


def logprobs(logits_BV, token_B, top: int) -> Logprobs:
  """top: how many of the likeliest to tell, 0 for none."""
  total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
  chosen_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)
  top_BE, ids_BE = jax.lax.top_k(logits_BV, top)
  return Logprobs((chosen_B1 - total_B1)[:, 0], top_BE - total_B1, ids_BE)
