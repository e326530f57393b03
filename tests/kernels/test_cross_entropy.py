"""The chunked loss against jax's own log_softmax over whole logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.kernels import chunks, cross_entropy

V, D = 37, 12


def make_case(B, T, tied, dtype=jnp.float32):
  rng = np.random.default_rng(B * 100 + T)
  x = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
  head = jnp.asarray(rng.normal(size=(V, D) if tied else (D, V)), jnp.float32)
  targets = jnp.asarray(rng.integers(V, size=(B, T)))
  weights = jnp.asarray(
    rng.integers(3, size=(B, T)) * rng.choice([0.5, 1.0], size=(B, T)),
    jnp.float32,
  )
  return x, head, targets, weights


def plain_loss(x, head, targets, weights, tied, z_loss=0.0):
  """Whole logits, and autodiff through them."""
  logits = jnp.einsum("btd,vd->btv", x, head if tied else head.T)
  logprobs = jax.nn.log_softmax(logits, axis=-1)
  chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
  squares = jax.scipy.special.logsumexp(logits, axis=-1) ** 2
  return jnp.sum(weights * (z_loss * squares - chosen))


def loss_sum(x, head, targets, weights, tied, z_loss=0.0):
  # A function of this file's, so that no other test's compiled chunks serve.
  return cross_entropy.loss_sum(x, head, targets, weights, tied, z_loss)[0]


def both(loss):
  """The jitted loss and its two gradients."""
  return jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=(4, 5))


@pytest.fixture
def small_chunks(monkeypatch):
  monkeypatch.setitem(chunks.TOKENS, "cpu", 8)


def numpy_loss(x, head, targets, weights, tied):
  """Value and both gradients, by hand, in float64."""
  x, head, weights = (np.asarray(a, np.float64) for a in (x, head, weights))
  words = head if tied else head.T
  logits = x @ words.T
  probs = np.exp(logits - logits.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  hit = np.eye(V)[np.asarray(targets)]
  d_logits = (probs - hit) * weights[..., None]
  d_words = np.einsum("btv,btd->vd", d_logits, x)
  nll = -np.log((probs * hit).sum(-1))
  return (
    nll,
    (nll * weights).sum(),
    (d_logits @ words, d_words if tied else d_words.T),
  )


# 3 x 5: chunks of two columns, the last cut short; 9 x 4: more rows than a
# chunk has tokens; 1 x 1: one chunk.
@pytest.mark.parametrize("B, T", [(1, 1), (3, 5), (9, 4)])
@pytest.mark.parametrize("tied", [True, False])
def test_value_and_gradients(small_chunks, B, T, tied):
  case = make_case(B, T, tied)
  value, gradients = both(loss_sum)(*case, tied)
  _, want, want_gradients = numpy_loss(*case, tied)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  for ours, theirs in zip(gradients, want_gradients, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("B, T", [(1, 1), (3, 5), (9, 4)])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_each_token(small_chunks, B, T, tied):
  """Weights that are known only once all tokens are."""
  x, head, targets, weights = case = make_case(B, T, tied)

  def total(x, head):
    return (
      weights * cross_entropy.token_nll(x, head, targets, None, tied)
    ).sum()

  value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(x, head)
  _, want, want_gradients = numpy_loss(*case, tied)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  for ours, theirs in zip(gradients, want_gradients, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


# 0.1 is a thousand times what is usual: the squares are half of the loss.
@pytest.mark.parametrize(
  "tied, z_loss", [(True, 0.0), (True, 0.1), (False, 0.1)]
)
def test_value_and_gradients_equal_autodiff(small_chunks, tied, z_loss):
  case = make_case(3, 7, tied)
  value, gradients = both(loss_sum)(*case, tied, z_loss)
  want, want_gradients = both(plain_loss)(*case, tied, z_loss)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  for ours, theirs in zip(gradients, want_gradients, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_value_without_a_gradient(small_chunks):
  """Another code path than the one under a gradient."""
  x, head, targets, weights = case = make_case(3, 7, False)
  nll, want, _ = numpy_loss(*case, False)

  @jax.jit
  def ours(x, head):
    return (
      *cross_entropy.loss_sum(x, head, targets, weights, False, 0.0),
      cross_entropy.token_nll(x, head, targets, None, tied=False),
      cross_entropy.loss_sum(x, head, targets, weights, False, 0.1)[0],
    )

  total, *each, with_z_loss = ours(x, head)
  np.testing.assert_allclose(total, want, rtol=1e-6)
  for ours in each:
    np.testing.assert_allclose(ours, nll, atol=1e-5)
  want = plain_loss(*case, False, 0.1)
  np.testing.assert_allclose(with_z_loss, want, rtol=1e-6)


def test_each_nll_stands_beside_the_gradient_and_passes_none(small_chunks):
  """The nll is for reports: it knows neither weights nor z_loss."""
  x, head, targets, weights = case = make_case(3, 7, False)
  want, _, _ = numpy_loss(*case, False)

  def loss(x, head, by):
    total, nll = cross_entropy.loss_sum(x, head, targets, weights, False, 0.1)
    return total + by * nll.sum(), nll

  grad = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
  gradients, nll = grad(x, head, 0.0)
  np.testing.assert_allclose(nll, want, atol=1e-5)
  for a, b in zip(gradients, grad(x, head, 7.0)[0], strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("tied", [True, False])
def test_what_has_no_weight_can_be_left_out(small_chunks, tied, z_loss):
  """Sum and gradients as they were, and no nll where there is no weight."""
  x, head, targets, weights = case = make_case(5, 9, tied)
  assert 0 < (weights == 0).sum() < weights.size / 2

  def sparse(*args):
    return cross_entropy.loss_sum(*args, sparse=True)

  (value, each), gradients = jax.jit(
    jax.value_and_grad(sparse, (0, 1), has_aux=True), static_argnums=(4, 5)
  )(*case, tied, z_loss)
  want, want_gradients = both(plain_loss)(*case, tied, z_loss)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  for ours, theirs in zip(gradients, want_gradients, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
  nll, _, _ = numpy_loss(*case, tied)
  wanted = np.asarray(weights) > 0
  np.testing.assert_allclose(each, nll * wanted, atol=1e-5)

  def squares(x, head):
    each = cross_entropy.token_nll(x, head, targets, wanted, tied)
    return (each**2).sum(), each

  def plain_squares(x, head):
    logits = jnp.einsum("btd,vd->btv", x, head if tied else head.T)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    each = -jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
    return (wanted * each**2).sum()

  gradients, each = jax.jit(jax.grad(squares, (0, 1), has_aux=True))(x, head)
  np.testing.assert_allclose(each, nll * wanted, atol=1e-5)
  for ours, theirs in zip(
    gradients, jax.grad(plain_squares, (0, 1))(x, head), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-4)


def test_masked_tokens_have_no_gradient(small_chunks):
  x, head, targets, _ = make_case(2, 9, False)
  weights = jnp.zeros((2, 9)).at[0, 4].set(1.0)
  _, (d_x, _) = both(loss_sum)(x, head, targets, weights, False)
  d_x = np.abs(d_x).sum(-1)
  assert d_x[0, 4] > 0
  assert d_x.sum() == d_x[0, 4]


def test_a_cotangent_scales_both_gradients(small_chunks):
  x, head, targets, weights = make_case(2, 9, True)

  def scaled(x, head, by):
    return by * loss_sum(x, head, targets, weights, True)

  gradients = jax.jit(jax.grad(scaled, (0, 1)))
  one, seven = (gradients(x, head, by) for by in (1.0, 7.0))
  for a, b in zip(one, seven, strict=True):
    np.testing.assert_allclose(7 * a, b, rtol=1e-6)


def test_large_logits_stay_finite(small_chunks):
  x, head, targets, weights = make_case(1, 8, True)
  value, grads = both(loss_sum)(1e3 * x, head, targets, weights, True)
  assert all(np.isfinite(leaf).all() for leaf in (value, *grads))


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_hidden_states(small_chunks, tied):
  x, head, targets, weights = make_case(3, 5, tied, jnp.bfloat16)
  value, (d_x, d_head) = both(loss_sum)(x, head, targets, weights, tied)
  _, want, (want_x, want_head) = numpy_loss(x, head, targets, weights, tied)
  assert value.dtype == d_head.dtype == jnp.float32
  assert d_x.dtype == jnp.bfloat16
  # The head is rounded to 8 bits of mantissa for the products.
  np.testing.assert_allclose(value, want, rtol=5e-3)
  scale = np.abs(want_head).max()
  np.testing.assert_allclose(d_head, want_head, atol=0.02 * scale)
  scale = np.abs(want_x).max()
  np.testing.assert_allclose(d_x.astype(jnp.float32), want_x, atol=0.02 * scale)


def compiled(function, B, T, words):
  shapes = (
    jax.ShapeDtypeStruct((B, T, 16), jnp.float32),
    jax.ShapeDtypeStruct((words, 16), jnp.float32),
    jax.ShapeDtypeStruct((B, T), jnp.int32),
    jax.ShapeDtypeStruct((B, T), jnp.float32),
  )
  grad = jax.jit(jax.grad(lambda *args: function(*args, True), (0, 1)))
  return grad.lower(*shapes).compile()


def largest_buffer(program, words):
  """The most tokens that any [..., words] array of a program holds."""
  shapes = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", program.as_text())
  sizes = [[int(n) for n in shape.split(",")] for shape in shapes]
  with_words = [s for s in sizes if words in s]
  return max(int(np.prod(s)) // words for s in with_words)


def test_whole_logits_never_exist():
  B, T, words = 4, 1024, 20011
  chunk = chunks.TOKENS["cpu"]
  ours = compiled(loss_sum, B, T, words)
  plain = compiled(plain_loss, B, T, words)
  assert largest_buffer(ours, words) == chunk < B * T
  logits = B * T * words * 4
  # A few chunks' worth: logits, probabilities, the gradient of both.
  assert ours.memory_analysis().temp_size_in_bytes < logits / 2
  # The measure itself sees whole logits where they are.
  assert largest_buffer(plain, words) == B * T
  assert plain.memory_analysis().temp_size_in_bytes > logits
