"""The chunked distillation loss against whole logits, by hand in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.kernels import chunks, divergence
from llama_jax.parallel import mesh

V, D, E = 37, 12, 20
FORWARD = divergence.Mixture(0.0, 1.0, 0.0, 1.0)
REVERSE = divergence.Mixture(0.0, 0.0, 1.0, 1.0)
ALL = divergence.Mixture(data=0.5, forward=0.3, reverse=0.7, temperature=2.5)
STORED = divergence.Mixture(data=0.5, forward=0.3, reverse=0.0, temperature=2.5)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setitem(chunks.TOKENS, "cpu", 8)


def make_states(rng, B, T, width, tied, dtype=jnp.float32):
  head = rng.normal(size=(V, width) if tied else (width, V)) / width**0.5
  return divergence.States(
    jnp.asarray(2 * rng.normal(size=(B, T, width)), dtype),
    jnp.asarray(head, jnp.float32),
    tied,
  )


def make_case(B, T, tied, teacher_tied=False, dtype=jnp.float32):
  """Student, teacher (wider), targets, weights."""
  rng = np.random.default_rng(B * 100 + T)
  return (
    make_states(rng, B, T, D, tied, dtype),
    make_states(rng, B, T, E, teacher_tied, dtype),
    jnp.asarray(rng.integers(V, size=(B, T))),
    jnp.asarray(rng.choice([0, 0.5, 1, 2], size=(B, T)), jnp.float32),
  )


def whole_logits(states):
  head = np.asarray(states.head, np.float64)
  x_BTD = np.asarray(states.x_BTD.astype(jnp.float32), np.float64)
  return x_BTD @ (head.T if states.tied else head)


def log_softmax(logits):
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_hand(student, teacher, targets, weights, mixture, stored=None):
  """Value, [B, T] of each token, gradients by x and head; in float64.

  The stored teacher's k words and their rest are made here of whole logits, and
  the loss's gradient is that of every probability apart.
  """
  data, forward, reverse, t = mixture
  logits = whole_logits(student)
  log_p = log_softmax(whole_logits(teacher) / t)
  log_q = log_softmax(logits / t)
  logprobs = log_softmax(logits)
  p, q, probs = np.exp(log_p), np.exp(log_q), np.exp(logprobs)
  hit = np.eye(V)[np.asarray(targets)]
  told = {"nll": -(logprobs * hit).sum(-1)}
  if stored is None:
    told["forward"] = (p * (log_p - log_q)).sum(-1)
    told["reverse"] = (q * (log_q - log_p)).sum(-1)
    by_q = forward * -p / q
    by_q += reverse * (log_q - log_p + 1)
  else:
    known = np.argsort(-p, -1)[..., :stored, None] == np.arange(V)
    known = known.any(-2)
    # One word of all that are not known, for either.
    r, s = ((a * ~known).sum(-1, keepdims=True) for a in (p, q))
    told["forward"] = (np.where(known, p * (log_p - log_q), 0)).sum(-1)
    if stored < V:
      told["forward"] += (r * np.log(r / s))[..., 0]
    by_q = forward * np.where(known, -p / q, -r / np.where(known, 1, s))
  # From probabilities to logits: the softmax's Jacobian.
  d_logits = t * q * (by_q - (q * by_q).sum(-1, keepdims=True))
  d_logits += data * (probs - hit)
  d_logits *= np.asarray(weights)[..., None]
  head = np.asarray(student.head, np.float64)
  d_x = d_logits @ (head if student.tied else head.T)
  x = np.asarray(student.x_BTD.astype(jnp.float32), np.float64)
  d_head = np.einsum("btv,btd->vd", d_logits, x)
  loss = data * told["nll"] + t * t * forward * told["forward"]
  if reverse:
    loss += t * t * reverse * told["reverse"]
  total = (loss * np.asarray(weights)).sum()
  return total, told, (d_x, d_head if student.tied else d_head.T)


def ours(student, teacher, targets, weights, mixture, stored=None):
  """The jitted loss, what is told of it, and the two gradients."""

  # A new function each time, or chunks of another size would serve.
  @jax.jit
  def both(student, teacher):
    if stored is not None:
      teacher = divergence.top(teacher, stored, mixture.temperature)

    def loss(student):
      return divergence.loss_sum(student, teacher, targets, weights, mixture)

    return jax.value_and_grad(loss, has_aux=True)(student)

  (total, told), d_student = both(student, teacher)
  return total, told, (d_student.x_BTD, d_student.head)


def assert_same(got, want, atol=1e-5):
  total, told, gradients = got
  np.testing.assert_allclose(total, want[0], rtol=1e-5, atol=1e-6)
  assert told.keys() == want[1].keys()
  for name, each in want[1].items():
    np.testing.assert_allclose(told[name], each, atol=atol, err_msg=name)
  for one, other in zip(gradients, want[2], strict=True):
    np.testing.assert_allclose(one, other, atol=atol)


# 3 x 5: chunks of two columns, the last cut short; 9 x 4: more rows than a
# chunk has tokens; 1 x 1: one chunk.
@pytest.mark.parametrize(
  "B, T, tied, teacher_tied, mixture",
  [
    (1, 1, True, False, FORWARD),
    (3, 5, False, True, REVERSE),
    (3, 5, False, False, ALL),
    (9, 4, True, True, ALL),
  ],
)
def test_value_and_gradients(B, T, tied, teacher_tied, mixture):
  case = make_case(B, T, tied, teacher_tied)
  assert_same(ours(*case, mixture), by_hand(*case, mixture))


def test_a_stored_teacher():
  case = make_case(3, 5, False)
  want = by_hand(*case, STORED, stored=5)
  assert_same(ours(*case, STORED, stored=5), want)


def test_a_teacher_stored_whole_is_the_live_one():
  case = make_case(3, 5, True)
  want = by_hand(*case, STORED)
  del want[1]["reverse"]
  assert_same(ours(*case, STORED, stored=V), want)


def test_what_is_stored():
  _, teacher, _, _ = make_case(3, 5, True)
  top = jax.jit(divergence.top, static_argnums=(1, 2))
  ids, logprobs, rest = top(teacher, 4, 2.0)
  want = log_softmax(whole_logits(teacher) / 2)
  order = np.argsort(-want, -1)[..., :4]
  np.testing.assert_array_equal(ids, order)
  found = np.take_along_axis(want, order, -1)
  np.testing.assert_allclose(logprobs, found, atol=1e-5)
  np.testing.assert_allclose(rest, 1 - np.exp(found).sum(-1), atol=1e-6)


@pytest.mark.parametrize("stored", [False, True])
def test_what_has_no_weight_can_be_left_out(stored):
  student, teacher, targets, weights = make_case(5, 9, True)
  mixture = STORED if stored else ALL
  if stored:
    teacher = divergence.top(teacher, 5, mixture.temperature)

  def loss(student, sparse):
    return divergence.loss_sum(
      student, teacher, targets, weights, mixture, sparse
    )

  grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
  (want, want_told), want_gradient = grad(student, False)
  (value, told), gradient = grad(student, True)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  for ours, theirs in zip(
    jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  for name, each in told.items():
    np.testing.assert_allclose(
      each, want_told[name] * (weights > 0), atol=1e-6, err_msg=name
    )


def test_chunked_equals_unchunked(monkeypatch):
  case = make_case(3, 7, True)
  chunked = ours(*case, ALL)
  monkeypatch.setitem(chunks.TOKENS, "cpu", 1000)
  assert_same(chunked, ours(*case, ALL), atol=5e-6)


def test_value_without_a_gradient():
  case = make_case(3, 7, False)
  total, told = jax.jit(
    lambda student: divergence.loss_sum(student, *case[1:], ALL)
  )(case[0])
  want, want_told, _ = by_hand(*case, ALL)
  np.testing.assert_allclose(total, want, rtol=1e-5)
  for name, each in want_told.items():
    np.testing.assert_allclose(told[name], each, atol=1e-5, err_msg=name)


def test_what_is_differentiated():
  """The sum by the student, times its cotangent; not what is told."""
  student, teacher, targets, weights = make_case(2, 9, True)

  def loss(student, teacher, weights, scale, told_too):
    total, told = divergence.loss_sum(student, teacher, targets, weights, ALL)
    return scale * total + told_too * sum(a.sum() for a in told.values())

  grad = jax.jit(jax.grad(loss, (0, 1, 2)))
  one, *others = grad(student, teacher, weights, 1.0, 0.0)
  seven, *_ = grad(student, teacher, weights, 7.0, 3.0)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(seven), strict=True):
    np.testing.assert_allclose(7 * a, b, rtol=1e-6)
  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(others))


def test_masked_tokens_have_no_gradient():
  student, _, targets, _ = make_case(2, 9, False)
  weights = np.zeros((2, 9), np.float32)
  weights[0, 4] = 1
  # Padding has no stored words: zeros.
  top = divergence.Top(
    np.zeros((2, 9, 3), np.int32), np.zeros((2, 9, 3), np.float32), weights / 5
  )
  top.ids_BTk[0, 4] = 3, 1, 4
  top.logprobs_BTk[0, 4] = np.log([0.5, 0.2, 0.1])
  d_x, d_head = ours(student, top, targets, weights, STORED)[2]
  d_x = np.abs(d_x).sum(-1)
  assert d_x[0, 4] > 0 and d_x.sum() == d_x[0, 4]
  assert np.isfinite(d_head).all()


def of_logits(student, teacher, mixture):
  """Value and gradient at logits [V] themselves: the head is the identity."""
  states = [
    divergence.States(jnp.asarray(a, jnp.float32)[None, None], eye, True)
    for a, eye in ((a, jnp.eye(len(a))) for a in (student, teacher))
  ]
  rest = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
  total, _, (d_x, _) = ours(*states, *rest, mixture)
  return float(total), np.asarray(d_x)[0, 0]


def test_signs_of_the_gradients():
  """What the student deems likelier than the teacher does goes down.

  By hand, for the reverse: q (log q / p - KL), where q / p is 1/2, 9 and 1.
  """
  p, q = np.array([0.8, 0.05, 0.15]), np.array([0.4, 0.45, 0.15])
  value, gradient = of_logits(np.log(q), np.log(p), REVERSE)
  want = 0.4 * np.log(0.5) + 0.45 * np.log(9)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  np.testing.assert_allclose(
    gradient, q * (np.log(q / p) - want), rtol=1e-4, atol=1e-6
  )
  assert gradient[0] < 0 < gradient[1]
  # It is as likely for both: the forward divergence would leave it.
  assert gradient[2] < 0


def test_a_hot_teacher_is_matched_in_logits():
  """Gradients tend to (z - v) / V for centred logits (arXiv:1503.02531, 2)."""
  rng = np.random.default_rng(0)
  z, v = rng.normal(size=(2, 16))
  z, v = z - z.mean(), v - v.mean()
  _, gradient = of_logits(z, v, divergence.Mixture(0.0, 1.0, 2.0, 300.0))
  np.testing.assert_allclose(gradient, 3 * (z - v) / 16, atol=6e-3)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
  student, _, targets, weights = make_case(3, 5, True)
  mixture = ALL._replace(data=0.0)
  total, told, gradients = ours(student, student, targets, weights, mixture)
  for value in (total, told["forward"], told["reverse"], *gradients):
    np.testing.assert_allclose(value, 0, atol=1e-5)


@pytest.mark.parametrize("mixture, k", [(ALL, None), (STORED, 3)])
def test_large_logits_stay_finite(mixture, k):
  student, *rest = make_case(1, 8, True)
  far = jax.tree.map(lambda a: 1e3 * a, student)
  for leaf in jax.tree.leaves(ours(far, *rest, mixture, stored=k)):
    assert np.isfinite(leaf).all()


def test_bfloat16_hidden_states():
  case = make_case(3, 5, True, dtype=jnp.bfloat16)
  total, _, (d_x, d_head) = ours(*case, ALL)
  want, _, (want_x, want_head) = by_hand(*case, ALL)
  assert total.dtype == d_head.dtype == jnp.float32
  assert d_x.dtype == jnp.bfloat16
  # Heads are rounded to 8 bits of mantissa for the products.
  np.testing.assert_allclose(total, want, rtol=2e-2)
  for one, other in ((d_x, want_x), (d_head, want_head)):
    scale = np.abs(other).max()
    one = one.astype(jnp.float32)
    np.testing.assert_allclose(one, other, atol=0.03 * scale)


def two_losses(student, teacher, targets, weights, k):
  """What is told, and the sum of both kinds of loss."""
  top = divergence.top(teacher, k, STORED.temperature)
  live, told = divergence.loss_sum(student, teacher, targets, weights, ALL)
  stored, told_too = divergence.loss_sum(student, top, targets, weights, STORED)
  return live + 2 * stored, (told, told_too)


def test_a_mesh_equals_one_device():
  B, T, words = 8, 6, 40
  rng = np.random.default_rng(0)
  student, teacher = (
    divergence.States(
      rng.normal(size=(B, T, width)).astype(np.float32),
      rng.normal(size=(words, width)).astype(np.float32),
      True,
    )
    for width in (12, 20)
  )
  targets = rng.integers(words, size=(B, T))
  weights = rng.choice([0, 1], size=(B, T)).astype(np.float32)
  both = jax.jit(jax.value_and_grad(two_losses, has_aux=True), static_argnums=4)
  want = both(student, teacher, targets, weights, 5)
  devices = mesh.make(mesh.ParallelConfig(2, 2, 2))

  def place(a, *axes):
    return jax.device_put(a, jax.NamedSharding(devices, jax.P(*axes)))

  rows = ("data", "fsdp")
  with jax.set_mesh(devices):
    placed = [
      divergence.States(
        place(one.x_BTD, rows), place(one.head, "tensor", "fsdp"), True
      )
      for one in (student, teacher)
    ]
    got = both(*placed, place(targets, rows), place(weights, rows), 5)
  for one, other in zip(
    jax.tree.leaves(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def largest_buffer(program, words):
  """The most tokens that any [..., words] array of a program holds."""
  shapes = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", program.as_text())
  sizes = [[int(n) for n in shape.split(",")] for shape in shapes]
  return max(int(np.prod(s)) // words for s in sizes if words in s)


def test_whole_logits_never_exist(monkeypatch):
  monkeypatch.setitem(chunks.TOKENS, "cpu", 512)
  B, T, words = 4, 1024, 20011

  def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  states = [
    divergence.States(shaped(B, T, width), shaped(words, width), True)
    for width in (16, 24)
  ]
  rows = shaped(B, T, dtype=jnp.int32), shaped(B, T)
  program = (
    jax.jit(jax.grad(two_losses, has_aux=True), static_argnums=4)
    .lower(*states, *rows, 7)
    .compile()
  )
  assert largest_buffer(program, words) == chunks.TOKENS["cpu"] < B * T
  # A dozen arrays of a chunk, where whole logits of both alone are 16.
  logits = B * T * words * 4
  assert program.memory_analysis().temp_size_in_bytes < 2 * logits


def test_errors():
  student, teacher, *rest = make_case(1, 2, True)
  other = divergence.States(teacher.x_BTD, teacher.head[:, :-1], False)
  with pytest.raises(errors.ConfigError, match="has 36 words and the model 37"):
    divergence.loss_sum(student, other, *rest, ALL)
  with pytest.raises(errors.ConfigError, match=r"objective\.top_k=38 is more"):
    divergence.top(teacher, V + 1, 1.0)
