"""Next-token loss over a large vocabulary without the whole logits.

Whole float32 logits of 16k tokens over 128k words are 8.4 GB. Here they exist
for one chunk of tokens at a time, and the loss's gradient is formed while they
do: three matrix products in all, none of them recomputed.

B batch, T tokens, C tokens of a chunk, D embed, V vocab.
"""

import functools

import jax
import jax.numpy as jnp

from llama_jax.kernels import chunks, int8, matmul, panels


def project(x, head, *, tied: bool) -> jax.Array:
  """Logits [..., V] in float32 of x [..., D].

  head is [V, D] when tied, else [D, V]. A tied one may be quantized
  (kernels/int8.py) or in panels (kernels/panels.py).
  """
  x_tD, head = x.reshape(-1, x.shape[-1]), cast(head, x)
  if isinstance(head, int8.Quantized):
    logits_tV = int8.matmul(x_tD, head)
  elif isinstance(head, panels.Panels):
    logits_tV = panels.matmul(x_tD, head)
  elif tied:
    logits_tV = matmul.product_rows(x_tD, head)
  else:
    logits_tV = matmul.product(x_tD, head, 1, 0)
  return logits_tV.reshape(*x.shape[:-1], -1)


def cast(head, x):
  """A head in x's dtype, as chunks take it: half the bytes to gather."""
  if isinstance(head, (int8.Quantized, panels.Panels)):
    return head
  return head.astype(x.dtype)


def pick(logits_CV, targets_C):
  """The logit of each target, [C]."""
  return jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]


def less_target(probs_CV, targets_C):
  """Probabilities less 1 at the target: the gradient of nll by the logits."""
  words_CV = jax.lax.broadcasted_iota(jnp.int32, probs_CV.shape, 1)
  return probs_CV - (words_CV == targets_C[:, None]).astype(jnp.float32)


def pull_back(d_CV, x_CD, head, tied) -> tuple[jax.Array, jax.Array]:
  """A chunk's gradients by x (x's dtype) and head (float32), from the logits'.

  All products give float32 (kernels/matmul.py says why).
  """
  d_CV = d_CV.astype(x_CD.dtype)
  d_x_CD = matmul.product(d_CV, cast(head, x_CD), 1, 0 if tied else 1)
  d_head = matmul.product(*((d_CV, x_CD) if tied else (x_CD, d_CV)), 0, 0)
  return d_x_CD.astype(x_CD.dtype), d_head


def _losses(x_BTD, head, targets_BT, wanted_BT, tied):
  """Each target's nll and the log of its softmax's sum, float32 [B, T]."""

  def one(head, chunk):
    x_CD, targets_C = chunk
    logits_CV = project(x_CD, head, tied=tied)
    log_sum_C = jax.nn.logsumexp(logits_CV, axis=-1)
    return None, (log_sum_C - pick(logits_CV, targets_C), log_sum_C)

  rows = x_BTD, targets_BT
  return chunks.over(one, cast(head, x_BTD), rows, wanted_BT)[1]


def _total(nll_BT, log_sum_BT, weights_BT, z_loss):
  return jnp.sum(weights_BT * (nll_BT + z_loss * log_sum_BT**2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def token_nll(x_BTD, head, targets_BT, wanted_BT, tied: bool) -> jax.Array:
  """Negative log-likelihood of each target in nats, float32 [B, T].

  For losses in which a token's weight hangs on other tokens. Its gradient takes
  four matrix products where loss_sum's takes three: a chunk's logits are made
  again, with the sums of their softmax kept.

  wanted_BT is bool, or None for all tokens: what is not wanted is 0, and costs
  nothing where whole chunks of it can be left out.
  """
  return _losses(x_BTD, head, targets_BT, wanted_BT, tied)[0]


def _nll_forward(x_BTD, head, targets_BT, wanted_BT, tied):
  nll_BT, log_sum_BT = _losses(x_BTD, head, targets_BT, wanted_BT, tied)
  return nll_BT, (x_BTD, head, targets_BT, wanted_BT, log_sum_BT)


def _nll_backward(tied, residuals, d_nll_BT):
  x_BTD, head, targets_BT, wanted_BT, log_sum_BT = residuals
  if wanted_BT is not None:
    d_nll_BT = jnp.where(wanted_BT, d_nll_BT, 0)

  def one(head, chunk):
    x_CD, targets_C, log_sum_C, d_nll_C = chunk
    logits_CV = project(x_CD, head, tied=tied)
    probs_CV = jnp.exp(logits_CV - log_sum_C[:, None])
    d_CV = less_target(probs_CV, targets_C) * d_nll_C[:, None]
    d_x_CD, d_head = pull_back(d_CV, x_CD, head, tied)
    return d_head, d_x_CD

  d_head, d_x_BTD = chunks.over(
    one,
    cast(head, x_BTD),
    (x_BTD, targets_BT, log_sum_BT, d_nll_BT),
    wanted_BT,
  )
  return d_x_BTD, d_head.astype(head.dtype), None, None


token_nll.defvjp(_nll_forward, _nll_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def loss_sum(
  x_BTD,
  head,
  targets_BT,
  weights_BT,
  tied: bool,
  z_loss: float,
  sparse: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Sum of weight * (nll + z_loss * log_sum^2) over tokens, and each nll.

  log_sum is the logarithm of the softmax's denominator, which z_loss draws
  towards 0 (arXiv:2204.02311, 5).

  Args:
    x_BTD: the decoder's last hidden states.
    head: [V, D] when tied (the embedding), else [D, V].
    targets_BT: int ids to predict.
    weights_BT: float32; 0 leaves a token out. Not differentiated.
    tied: which way head lies.
    z_loss: a Python number; 0 for the plain loss.
    sparse: tokens of weight 0 have no logits made, and nll 0: worth it where
      they are many.

  Returns:
    The sum, float32, and token_nll's [B, T], which passes no gradient on. Both
    in nats.
  """
  nll_BT, log_sum_BT = _losses(
    x_BTD, head, targets_BT, weighted(weights_BT, sparse), tied
  )
  return _total(nll_BT, log_sum_BT, weights_BT, z_loss), nll_BT


def weighted(weights_BT, sparse: bool):
  """What chunks.over wants of tokens with these weights."""
  return weights_BT != 0 if sparse else None


def _loss_forward(x_BTD, head, targets_BT, weights_BT, tied, z_loss, sparse):
  def one(head, chunk):
    x_CD, targets_C, weights_C = chunk
    logits_CV = project(x_CD, head, tied=tied)
    # One exponential for the loss and for its gradient: without the barrier
    # XLA computes it twice (1.4x on this function in bfloat16 on CPU).
    most_C = jnp.max(logits_CV, axis=-1)
    exps_CV = jax.lax.optimization_barrier(jnp.exp(logits_CV - most_C[:, None]))
    sum_C = jnp.sum(exps_CV, axis=-1)
    log_sum_C = jnp.log(sum_C) + most_C
    nll_C = log_sum_C - pick(logits_CV, targets_C)
    # What the loss moves by with log_sum, whose gradient is the probability.
    slope_C = 1 + 2 * z_loss * log_sum_C
    probs_CV = exps_CV * (slope_C / sum_C)[:, None]
    d_CV = less_target(probs_CV, targets_C) * weights_C[:, None]
    d_x_CD, d_head = pull_back(d_CV, x_CD, head, tied)
    return d_head, (d_x_CD, nll_C, log_sum_C)

  d_head, (d_x_BTD, nll_BT, log_sum_BT) = chunks.over(
    one,
    cast(head, x_BTD),
    (x_BTD, targets_BT, weights_BT),
    weighted(weights_BT, sparse),
  )
  total = _total(nll_BT, log_sum_BT, weights_BT, z_loss)
  # An empty array carries the head's dtype, which a residual cannot.
  return (total, nll_BT), (d_x_BTD, d_head, jnp.zeros((0,), head.dtype))


def _loss_backward(tied, z_loss, sparse, residuals, cotangents):
  del tied, z_loss, sparse
  d_x_BTD, d_head, head_like = residuals
  cotangent, _ = cotangents
  return (
    (d_x_BTD * cotangent).astype(d_x_BTD.dtype),
    (d_head * cotangent).astype(head_like.dtype),
    None,
    None,
  )


loss_sum.defvjp(_loss_forward, _loss_backward)
