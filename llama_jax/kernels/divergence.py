"""How far a student's next words are from a teacher's, without whole logits.

As in cross_entropy.py, logits exist for one chunk of tokens at a time, and the
gradient by the student's is formed while they do: four matrix products in all
(the logits of both, and what the student's gradient takes), where making the
logits again in a backward pass takes six.

With p the teacher's and q the student's probabilities of words at temperature
t, those of logits / t, a token's loss in nats is

  data * nll + t^2 * (forward * KL(p || q) + reverse * KL(q || p))

with nll at temperature 1. Gradients of a divergence shrink as 1 / t^2, which
t^2 makes up for, so that its weight means the same at any t (arXiv:1503.02531,
2).

A stored teacher is its k likeliest words at each token and r, what all others
weigh together: one more word to the loss, which has the forward divergence

  KL = sum over the k of p log(p / q) + r log(r / (1 - sum over the k of q))

This is at most that of all words, and reaches it with k. Its gradient is that
of a teacher who shares r out among the others as the student does.

B batch, T tokens, C tokens of a chunk, D embed, V vocab, k stored words.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax import errors
from llama_jax.kernels import cross_entropy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class States:
  """What a model's logits are made of.

  Attributes:
    x_BTD: its last hidden states.
    head: [V, D] when tied (the embedding), else [D, V].
    tied: which way head lies.
  """

  x_BTD: jax.Array
  head: jax.Array
  tied: bool = dataclasses.field(metadata={"static": True})


class Top(NamedTuple):
  """A stored teacher, of the temperature at which it is to be used.

  Attributes:
    ids_BTk: the likeliest words, no word twice.
    logprobs_BTk: theirs, in nats.
    rest_BT: the probability of all others together.
  """

  ids_BTk: jax.Array
  logprobs_BTk: jax.Array
  rest_BT: jax.Array


class Mixture(NamedTuple):
  """What the loss is of: weights, 0 or more, and the temperature t."""

  data: float
  forward: float
  reverse: float
  temperature: float


def _without(values_BCV, ids_BCk):
  """The same with -inf at these words."""
  return jnp.put_along_axis(
    values_BCV, ids_BCk, -jnp.inf, axis=-1, inplace=False
  )


def top(teacher: States, k: int, temperature: float) -> Top:
  """What is to be stored of a teacher; ids int32, the others float32."""

  def one(_, chunk):
    (x_BCD,) = chunk
    logits_BCV = cross_entropy.project(x_BCD, teacher.head, tied=teacher.tied)
    if k > logits_BCV.shape[-1]:
      raise errors.ConfigError(
        f"objective.top_k={k} is more than the {logits_BCV.shape[-1]} words of"
        " objective.teacher; use fewer, or 0 for a live teacher."
      )
    scaled_BCV = logits_BCV / temperature
    log_sum_BC1 = jax.nn.logsumexp(scaled_BCV, axis=-1, keepdims=True)
    best_BCk, ids_BCk = jax.lax.top_k(scaled_BCV, k)
    # Not 1 - sum: that would leave rounding where little is left.
    others_BC = jax.nn.logsumexp(_without(scaled_BCV, ids_BCk), axis=-1)
    rest_BC = jnp.exp(others_BC - log_sum_BC1[..., 0])
    return None, (ids_BCk, best_BCk - log_sum_BC1, rest_BC)

  _, each = jax.lax.scan(one, None, cross_entropy.cut_chunks(teacher.x_BTD))
  T = teacher.x_BTD.shape[1]
  return Top(*(cross_entropy.join_chunks(a, T) for a in each))


def _softmax(logits_BCV, temperature):
  """Probabilities of logits / temperature, and their logarithms."""
  scaled_BCV = logits_BCV / temperature
  most_BC1 = jnp.max(scaled_BCV, axis=-1, keepdims=True)
  # One exponential for all that needs it, as in cross_entropy.loss_sum.
  exps_BCV = jax.lax.optimization_barrier(jnp.exp(scaled_BCV - most_BC1))
  sum_BC1 = jnp.sum(exps_BCV, axis=-1, keepdims=True)
  return exps_BCV / sum_BC1, scaled_BCV - (most_BC1 + jnp.log(sum_BC1))


def _from_states(q_BCV, log_q_BCV, teacher: States, temperature):
  """name -> divergence [B, C], its gradient by the student's scaled logits."""
  logits_BCV = cross_entropy.project(
    teacher.x_BTD, teacher.head, tied=teacher.tied
  )
  if logits_BCV.shape != q_BCV.shape:
    raise errors.ConfigError(
      f"objective.teacher has {logits_BCV.shape[-1]} words and the model"
      f" {q_BCV.shape[-1]}; use a teacher of the same tokenizer and vocabulary."
    )
  p_BCV, log_p_BCV = _softmax(logits_BCV, temperature)
  gap_BCV = log_p_BCV - log_q_BCV
  forward_BC = jnp.sum(p_BCV * gap_BCV, axis=-1)
  reverse_BC = -jnp.sum(q_BCV * gap_BCV, axis=-1)
  return {
    "forward": (forward_BC, q_BCV - p_BCV),
    "reverse": (reverse_BC, -q_BCV * (gap_BCV + reverse_BC[..., None])),
  }


def _from_top(q_BCV, log_q_BCV, teacher: Top):
  """The same for a stored teacher, which knows no reverse divergence."""
  ids_BCk, logprobs_BCk, rest_BC = teacher
  p_BCk = jnp.exp(logprobs_BCk.astype(jnp.float32))
  rest_BC1 = rest_BC.astype(jnp.float32)[..., None]
  others_BCV = _without(log_q_BCV, ids_BCk)
  # Finite where no word is left, so that 0 times it is 0.
  others_BC1 = jnp.maximum(
    jax.nn.logsumexp(others_BCV, axis=-1, keepdims=True),
    jnp.finfo(jnp.float32).min,
  )
  log_q_BCk = jnp.take_along_axis(log_q_BCV, ids_BCk, axis=-1)
  xlogy = jax.scipy.special.xlogy
  known_BCk = xlogy(p_BCk, p_BCk) - p_BCk * log_q_BCk
  left_BC1 = xlogy(rest_BC1, rest_BC1) - rest_BC1 * others_BC1
  p_BCV = jnp.put_along_axis(
    rest_BC1 * jnp.exp(others_BCV - others_BC1),
    ids_BCk,
    p_BCk,
    axis=-1,
    inplace=False,
  )
  forward_BC = jnp.sum(known_BCk, axis=-1) + left_BC1[..., 0]
  return {"forward": (forward_BC, q_BCV - p_BCV)}


def _losses(logits_BCV, targets_BC, teacher, mixture):
  """Each token's loss, what is told of it, and its gradient by the logits."""
  data, forward, reverse, t = mixture
  probs_BCV, logprobs_BCV = _softmax(logits_BCV, 1.0)
  scaled = (probs_BCV, logprobs_BCV) if t == 1 else _softmax(logits_BCV, t)
  if isinstance(teacher, Top):
    found = _from_top(*scaled, teacher)
  else:
    found = _from_states(*scaled, teacher, t)
  told = {name: each_BC for name, (each_BC, _) in found.items()}
  told["nll"] = nll_BC = -cross_entropy.pick(logprobs_BCV, targets_BC)
  terms = []
  if data:
    d_BCV = cross_entropy.less_target(probs_BCV, targets_BC)
    terms.append((data, nll_BC, d_BCV))
  for name, weight in (("forward", forward), ("reverse", reverse)):
    if weight:
      each_BC, d_BCV = found[name]
      terms.append((t * t * weight, each_BC, d_BCV / t))
  loss_BC = sum(weight * each_BC for weight, each_BC, _ in terms)
  return loss_BC, told, sum(weight * d_BCV for weight, _, d_BCV in terms)


def _scan(student, teacher, targets_BT, weights_BT, mixture, gradient: bool):
  """loss_sum's result, and the sum's gradient by student (float32 by head)."""
  stored = isinstance(teacher, Top)

  def one(d_head, chunk):
    x_BCD, targets_BC, weights_BC, *of_teacher = chunk
    if stored:
      held = Top(*of_teacher)
    else:
      held = dataclasses.replace(teacher, x_BTD=of_teacher[0])
    logits_BCV = cross_entropy.project(x_BCD, student.head, tied=student.tied)
    loss_BC, told, d_BCV = _losses(logits_BCV, targets_BC, held, mixture)
    if not gradient:
      return None, (loss_BC, told, None)
    d_x_BCD, by_head = cross_entropy.pull_back(
      d_BCV * weights_BC[..., None], x_BCD, student.head, student.tied
    )
    return d_head + by_head, (loss_BC, told, d_x_BCD)

  d_head, each = jax.lax.scan(
    one,
    jnp.zeros(student.head.shape, jnp.float32) if gradient else None,
    cross_entropy.cut_chunks(
      student.x_BTD,
      targets_BT,
      weights_BT,
      *(teacher if stored else (teacher.x_BTD,)),
    ),
  )
  T = student.x_BTD.shape[1]
  loss_BT, told, d_x_BTD = jax.tree.map(
    lambda a: cross_entropy.join_chunks(a, T), each
  )
  d_student = States(d_x_BTD, d_head, student.tied)
  return (jnp.sum(weights_BT * loss_BT), told), d_student


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def loss_sum(
  student: States,
  teacher: States | Top,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  mixture: tuple[float, float, float, float],
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of weight * loss over tokens, and what it is made of.

  Args:
    student: what is differentiated, and nothing else is.
    teacher: of the same vocabulary; its width may be another.
    targets_BT: int ids of the next words.
    weights_BT: float32; 0 leaves a token out.
    mixture: a Mixture of Python numbers, not all of its weights 0; reverse is 0
      with a stored teacher.

  Returns:
    The sum, float32, and float32 [B, T] of each token, which pass no gradient
    on: "nll", "forward" and, of a live teacher, "reverse", unweighted, the
    divergences at their temperature. All in nats.

  Raises:
    ConfigError: the vocabularies differ.
  """
  return _scan(student, teacher, targets_BT, weights_BT, mixture, False)[0]


def _loss_forward(student, teacher, targets_BT, weights_BT, mixture):
  result, d_student = _scan(
    student, teacher, targets_BT, weights_BT, mixture, True
  )
  # An empty array carries the head's dtype, which a residual cannot.
  return result, (d_student, jnp.zeros((0,), student.head.dtype))


def _loss_backward(mixture, residuals, cotangents):
  del mixture
  d_student, head_like = residuals
  cotangent, _ = cotangents
  d_x_BTD, d_head = d_student.x_BTD, d_student.head
  d_student = dataclasses.replace(
    d_student,
    x_BTD=(d_x_BTD * cotangent).astype(d_x_BTD.dtype),
    head=(d_head * cotangent).astype(head_like.dtype),
  )
  return d_student, None, None, None


loss_sum.defvjp(_loss_forward, _loss_backward)
