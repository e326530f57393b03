"""Next-token loss over a large vocabulary without the whole logits.

Whole float32 logits of 16k tokens over 128k words are 8.4 GB. Here they exist
for one chunk of tokens at a time, and the loss's gradient is formed while they
do: three matrix products in all, none of them recomputed.

B batch, T tokens, C tokens of a chunk, D embed, V vocab.
"""

import functools

import jax
import jax.numpy as jnp

from llama_jax.kernels import int8, matmul

# Tokens (of all rows together) whose logits exist at once.
CHUNK_TOKENS = 512


def project(x_BTD, head, *, tied: bool) -> jax.Array:
  """Logits [B, T, V] in float32. head is [V, D] when tied, else [D, V].

  A tied one may be quantized (kernels/int8.py).
  """
  B, T, D = x_BTD.shape
  x_tD = x_BTD.reshape(B * T, D)
  if isinstance(head, int8.Quantized):
    logits_tV = int8.matmul(x_tD, head)
  elif tied:
    logits_tV = matmul.product_rows(x_tD, head.astype(x_BTD.dtype))
  else:
    logits_tV = matmul.product(x_tD, head.astype(x_BTD.dtype), 1, 0)
  return logits_tV.reshape(B, T, -1)


def cut_chunks(x_BTD, *others_BT):
  """Cuts [B, T, ...] along T into a leading axis of chunks, padded by zeros.

  Along T and not along tokens, so that a batch sharded on B stays in place.
  """
  B, T = x_BTD.shape[:2]
  size = min(T, max(1, CHUNK_TOKENS // B))
  count = -(-T // size)

  def cut(a):
    pad = [(0, 0), (0, count * size - T)] + [(0, 0)] * (a.ndim - 2)
    a = jnp.pad(a, pad).reshape(B, count, size, *a.shape[2:])
    return jnp.moveaxis(a, 1, 0)

  return tuple(cut(a) for a in (x_BTD, *others_BT))


def join_chunks(chunks, T):
  """The inverse of cut_chunks for one array."""
  joined = jnp.moveaxis(chunks, 0, 1)
  return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :T]


def pick(logits_BCV, targets_BC):
  """The logit of each target, [B, C]."""
  return jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]


def less_target(probs_BCV, targets_BC):
  """Probabilities less 1 at the target: the gradient of nll by the logits."""
  words_BCV = jax.lax.broadcasted_iota(jnp.int32, probs_BCV.shape, 2)
  return probs_BCV - (words_BCV == targets_BC[..., None]).astype(jnp.float32)


def pull_back(d_BCV, x_BCD, head, tied) -> tuple[jax.Array, jax.Array]:
  """A chunk's gradients by x (x's dtype) and head (float32), from the logits'.

  All products give float32 (kernels/matmul.py says why).
  """
  B, C, D = x_BCD.shape
  d_tV = d_BCV.astype(x_BCD.dtype).reshape(B * C, -1)
  x_tD = x_BCD.reshape(B * C, D)
  d_x_tD = matmul.product(d_tV, head.astype(x_BCD.dtype), 1, 0 if tied else 1)
  d_head = matmul.product(*((d_tV, x_tD) if tied else (x_tD, d_tV)), 0, 0)
  return d_x_tD.astype(x_BCD.dtype).reshape(B, C, D), d_head


def _losses(x_BTD, head, targets_BT, tied):
  """Each target's nll and the log of its softmax's sum, float32 [B, T]."""

  def one(_, chunk):
    x_BCD, targets_BC = chunk
    logits_BCV = project(x_BCD, head, tied=tied)
    log_sum_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    return None, (log_sum_BC - pick(logits_BCV, targets_BC), log_sum_BC)

  _, each = jax.lax.scan(one, None, cut_chunks(x_BTD, targets_BT))
  return tuple(join_chunks(a, x_BTD.shape[1]) for a in each)


def _total(nll_BT, log_sum_BT, weights_BT, z_loss):
  return jnp.sum(weights_BT * (nll_BT + z_loss * log_sum_BT**2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_nll(x_BTD, head, targets_BT, tied: bool) -> jax.Array:
  """Negative log-likelihood of each target in nats, float32 [B, T].

  For losses in which a token's weight hangs on other tokens. Its gradient takes
  four matrix products where loss_sum's takes three: a chunk's logits are made
  again, with the sums of their softmax kept.
  """
  return _losses(x_BTD, head, targets_BT, tied)[0]


def _nll_forward(x_BTD, head, targets_BT, tied):
  nll_BT, log_sum_BT = _losses(x_BTD, head, targets_BT, tied)
  return nll_BT, (x_BTD, head, targets_BT, log_sum_BT)


def _nll_backward(tied, residuals, d_nll_BT):
  x_BTD, head, targets_BT, log_sum_BT = residuals

  def one(d_head, chunk):
    x_BCD, targets_BC, log_sum_BC, d_nll_BC = chunk
    logits_BCV = project(x_BCD, head, tied=tied)
    probs_BCV = jnp.exp(logits_BCV - log_sum_BC[..., None])
    d_BCV = less_target(probs_BCV, targets_BC) * d_nll_BC[..., None]
    d_x_BCD, by_head = pull_back(d_BCV, x_BCD, head, tied)
    return d_head + by_head, d_x_BCD

  d_head, d_x = jax.lax.scan(
    one,
    jnp.zeros(head.shape, jnp.float32),
    cut_chunks(x_BTD, targets_BT, log_sum_BT, d_nll_BT),
  )
  return join_chunks(d_x, x_BTD.shape[1]), d_head.astype(head.dtype), None


token_nll.defvjp(_nll_forward, _nll_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def loss_sum(
  x_BTD, head, targets_BT, weights_BT, tied: bool, z_loss: float
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

  Returns:
    The sum, float32, and token_nll's [B, T], which passes no gradient on. Both
    in nats.
  """
  nll_BT, log_sum_BT = _losses(x_BTD, head, targets_BT, tied)
  return _total(nll_BT, log_sum_BT, weights_BT, z_loss), nll_BT


def _loss_forward(x_BTD, head, targets_BT, weights_BT, tied, z_loss):
  def one(d_head, chunk):
    x_BCD, targets_BC, weights_BC = chunk
    logits_BCV = project(x_BCD, head, tied=tied)
    # One exponential for the loss and for its gradient: without the barrier
    # XLA computes it twice (1.4x on this function in bfloat16 on CPU).
    most_BC = jnp.max(logits_BCV, axis=-1)
    exps_BCV = jax.lax.optimization_barrier(
      jnp.exp(logits_BCV - most_BC[..., None])
    )
    sum_BC = jnp.sum(exps_BCV, axis=-1)
    log_sum_BC = jnp.log(sum_BC) + most_BC
    nll_BC = log_sum_BC - pick(logits_BCV, targets_BC)
    # What the loss moves by with log_sum, whose gradient is the probability.
    slope_BC = 1 + 2 * z_loss * log_sum_BC
    probs_BCV = exps_BCV * (slope_BC / sum_BC)[..., None]
    d_BCV = less_target(probs_BCV, targets_BC) * weights_BC[..., None]
    d_x_BCD, by_head = pull_back(d_BCV, x_BCD, head, tied)
    d_head = d_head + by_head
    return d_head, (d_x_BCD, nll_BC, log_sum_BC)

  d_head, each = jax.lax.scan(
    one,
    jnp.zeros(head.shape, jnp.float32),
    cut_chunks(x_BTD, targets_BT, weights_BT),
  )
  d_x_BTD, nll_BT, log_sum_BT = (join_chunks(a, x_BTD.shape[1]) for a in each)
  total = _total(nll_BT, log_sum_BT, weights_BT, z_loss)
  # An empty array carries the head's dtype, which a residual cannot.
  return (total, nll_BT), (d_x_BTD, d_head, jnp.zeros((0,), head.dtype))


def _loss_backward(tied, z_loss, residuals, cotangents):
  del tied, z_loss
  d_x_BTD, d_head, head_like = residuals
  cotangent, _ = cotangents
  return (
    (d_x_BTD * cotangent).astype(d_x_BTD.dtype),
    (d_head * cotangent).astype(head_like.dtype),
    None,
    None,
  )


loss_sum.defvjp(_loss_forward, _loss_backward)
