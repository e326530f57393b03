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
from llama_jax.kernels import chunks, cross_entropy


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

  @property
  def cast_head(self):
    return cross_entropy.cast(self.head, self.x_BTD)


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


def _without(values_CV, ids_Ck):
  """The same with -inf at these words."""
  return jnp.put_along_axis(values_CV, ids_Ck, -jnp.inf, axis=-1, inplace=False)


def top(teacher: States, k: int, temperature: float) -> Top:
  """What is to be stored of a teacher; ids int32, the others float32."""

  def one(head, x_CD):
    logits_CV = cross_entropy.project(x_CD, head, tied=teacher.tied)
    if k > logits_CV.shape[-1]:
      raise errors.ConfigError(
        f"objective.top_k={k} is more than the {logits_CV.shape[-1]} words of"
        " objective.teacher; use fewer, or 0 for a live teacher."
      )
    scaled_CV = logits_CV / temperature
    log_sum_C1 = jax.nn.logsumexp(scaled_CV, axis=-1, keepdims=True)
    best_Ck, ids_Ck = jax.lax.top_k(scaled_CV, k)
    # Not 1 - sum: that would leave rounding where little is left.
    others_C = jax.nn.logsumexp(_without(scaled_CV, ids_Ck), axis=-1)
    rest_C = jnp.exp(others_C - log_sum_C1[..., 0])
    return None, (ids_Ck, best_Ck - log_sum_C1, rest_C)

  return Top(*chunks.over(one, teacher.cast_head, teacher.x_BTD)[1])


def _softmax(logits_CV, temperature):
  """Probabilities of logits / temperature, and their logarithms."""
  scaled_CV = logits_CV / temperature
  most_C1 = jnp.max(scaled_CV, axis=-1, keepdims=True)
  # One exponential for all that needs it, as in cross_entropy.loss_sum.
  exps_CV = jax.lax.optimization_barrier(jnp.exp(scaled_CV - most_C1))
  sum_C1 = jnp.sum(exps_CV, axis=-1, keepdims=True)
  return exps_CV / sum_C1, scaled_CV - (most_C1 + jnp.log(sum_C1))


def _from_states(q_CV, log_q_CV, teacher: States, temperature):
  """name -> divergence [B, C], its gradient by the student's scaled logits."""
  logits_CV = cross_entropy.project(
    teacher.x_BTD, teacher.head, tied=teacher.tied
  )
  if logits_CV.shape != q_CV.shape:
    raise errors.ConfigError(
      f"objective.teacher has {logits_CV.shape[-1]} words and the model"
      f" {q_CV.shape[-1]}; use a teacher of the same tokenizer and vocabulary."
    )
  p_CV, log_p_CV = _softmax(logits_CV, temperature)
  gap_CV = log_p_CV - log_q_CV
  forward_C = jnp.sum(p_CV * gap_CV, axis=-1)
  reverse_C = -jnp.sum(q_CV * gap_CV, axis=-1)
  return {
    "forward": (forward_C, q_CV - p_CV),
    "reverse": (reverse_C, -q_CV * (gap_CV + reverse_C[..., None])),
  }


def _from_top(q_CV, log_q_CV, teacher: Top):
  """The same for a stored teacher, which knows no reverse divergence."""
  ids_Ck, logprobs_Ck, rest_C = teacher
  p_Ck = jnp.exp(logprobs_Ck.astype(jnp.float32))
  rest_C1 = rest_C.astype(jnp.float32)[..., None]
  others_CV = _without(log_q_CV, ids_Ck)
  # Finite where no word is left, so that 0 times it is 0.
  others_C1 = jnp.maximum(
    jax.nn.logsumexp(others_CV, axis=-1, keepdims=True),
    jnp.finfo(jnp.float32).min,
  )
  log_q_Ck = jnp.take_along_axis(log_q_CV, ids_Ck, axis=-1)
  xlogy = jax.scipy.special.xlogy
  known_Ck = xlogy(p_Ck, p_Ck) - p_Ck * log_q_Ck
  left_C1 = xlogy(rest_C1, rest_C1) - rest_C1 * others_C1
  p_CV = jnp.put_along_axis(
    rest_C1 * jnp.exp(others_CV - others_C1),
    ids_Ck,
    p_Ck,
    axis=-1,
    inplace=False,
  )
  forward_C = jnp.sum(known_Ck, axis=-1) + left_C1[..., 0]
  return {"forward": (forward_C, q_CV - p_CV)}


def _losses(logits_CV, targets_C, teacher, mixture):
  """Each token's loss, what is told of it, and its gradient by the logits."""
  data, forward, reverse, t = mixture
  probs_CV, logprobs_CV = _softmax(logits_CV, 1.0)
  scaled = (probs_CV, logprobs_CV) if t == 1 else _softmax(logits_CV, t)
  if isinstance(teacher, Top):
    found = _from_top(*scaled, teacher)
  else:
    found = _from_states(*scaled, teacher, t)
  told = {name: each_C for name, (each_C, _) in found.items()}
  told["nll"] = nll_C = -cross_entropy.pick(logprobs_CV, targets_C)
  terms = []
  if data:
    d_CV = cross_entropy.less_target(probs_CV, targets_C)
    terms.append((data, nll_C, d_CV))
  for name, weight in (("forward", forward), ("reverse", reverse)):
    if weight:
      each_C, d_CV = found[name]
      terms.append((t * t * weight, each_C, d_CV / t))
  loss_C = sum(weight * each_C for weight, each_C, _ in terms)
  return loss_C, told, sum(weight * d_CV for weight, _, d_CV in terms)


def _over(student, teacher, targets_BT, weights_BT, mixture, sparse, gradient):
  """loss_sum's result, and the sum's gradient by student (float32 by head)."""
  stored = isinstance(teacher, Top)

  def one(heads, chunk):
    x_CD, held, targets_C, weights_C = chunk
    if not stored:
      held = dataclasses.replace(teacher, x_BTD=held, head=heads[1])
    logits_CV = cross_entropy.project(x_CD, heads[0], tied=student.tied)
    loss_C, told, d_CV = _losses(logits_CV, targets_C, held, mixture)
    if not gradient:
      return None, (loss_C, told, None)
    d_x_CD, d_head = cross_entropy.pull_back(
      d_CV * weights_C[:, None], x_CD, heads[0], student.tied
    )
    return d_head, (loss_C, told, d_x_CD)

  d_head, (loss_BT, told, d_x_BTD) = chunks.over(
    one,
    (student.cast_head, None if stored else teacher.cast_head),
    (
      student.x_BTD,
      teacher if stored else teacher.x_BTD,
      targets_BT,
      weights_BT,
    ),
    cross_entropy.weighted(weights_BT, sparse),
  )
  d_student = States(d_x_BTD, d_head, student.tied)
  return (jnp.sum(weights_BT * loss_BT), told), d_student


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def loss_sum(
  student: States,
  teacher: States | Top,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  mixture: tuple[float, float, float, float],
  sparse: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of weight * loss over tokens, and what it is made of.

  Args:
    student: what is differentiated, and nothing else is.
    teacher: of the same vocabulary; its width may be another.
    targets_BT: int ids of the next words.
    weights_BT: float32; 0 leaves a token out.
    mixture: a Mixture of Python numbers, not all of its weights 0; reverse is 0
      with a stored teacher.
    sparse: as in cross_entropy.loss_sum.

  Returns:
    The sum, float32, and float32 [B, T] of each token, which pass no gradient
    on: "nll", "forward" and, of a live teacher, "reverse", unweighted, the
    divergences at their temperature. All in nats.

  Raises:
    ConfigError: the vocabularies differ.
  """
  return _over(
    student, teacher, targets_BT, weights_BT, mixture, sparse, False
  )[0]


def _loss_forward(student, teacher, targets_BT, weights_BT, mixture, sparse):
  result, d_student = _over(
    student, teacher, targets_BT, weights_BT, mixture, sparse, True
  )
  # An empty array carries the head's dtype, which a residual cannot.
  return result, (d_student, jnp.zeros((0,), student.head.dtype))


def _loss_backward(mixture, sparse, residuals, cotangents):
  del mixture, sparse
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
