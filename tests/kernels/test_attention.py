"""Every attention kernel against attention written out in NumPy float64.

Splash runs in interpret mode, and cuDNN's place is taken by plain products, so
that what stands around them is what is tested here.

Tolerances: float32 products of some hundred terms, values of order 1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import errors, kernels
from llama_jax.kernels import cached, chunked, cudnn, reference, splash

HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (3, 1)}


def plain_attention(q, k, v, q_pos, k_pos, q_seg, k_seg):
  """[B, T, N, H] float64, one query at a time; NaN where nothing is seen."""
  B, T, N, H = q.shape
  G = N // k.shape[2]
  out = np.full((B, T, N, H), np.nan)
  for b in range(B):
    for t in range(T):
      seen = (k_pos[b] <= q_pos[b, t]) & (k_seg[b] == q_seg[b, t])
      if q_seg[b, t] == 0 or not seen.any():
        continue
      for n in range(N):
        scores = k[b, seen, n // G].astype(np.float64) @ q[b, t, n] / H**0.5
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // G]
  return out


def make_case(seed, B, T, N, K, H, segments_BT):
  """Random q, k, v; positions counted from 0 in each segment."""
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(B, T, N, H)).astype(np.float32)
  k, v = (rng.normal(size=(B, T, K, H)).astype(np.float32) for _ in range(2))
  positions = np.zeros((B, T), np.int32)
  for b in range(B):
    for t in range(1, T):
      if segments_BT[b, t] == segments_BT[b, t - 1]:
        positions[b, t] = positions[b, t - 1] + 1
  return q, k, v, positions, segments_BT


def packed(B, T):
  """Row 0 one segment; other rows two, then a tail of padding."""
  segments = np.ones((B, T), np.int32)
  for b in range(1, B):
    segments[b, T // 3 :] = 2
    segments[b, T - 1 - T // 5 :] = 0
  return segments


def attend(name, q, k, v, positions, segments):
  def self_attention(q, k, v, pos, seg):
    where = {"q_pos_BT": pos, "k_pos_BS": pos, "q_seg_BT": seg, "k_seg_BS": seg}
    return kernels.ATTENTION[name](q, k, v, **where)

  return jax.jit(self_attention)(q, k, v, positions, segments)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """So that short sequences are many tiles; and no kernel needs its device."""
  monkeypatch.setattr(chunked, "TILE", 8)
  monkeypatch.setattr(chunked, "BLOCK", 8)
  # Sequences in blocks and in loops over tiles: both among those below.
  monkeypatch.setattr(chunked, "SHORT", 20)
  monkeypatch.setattr(splash, "INTERPRET", True)
  monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")


# 7: less than a block; 16: whole blocks; 37: a last block cut short; 150: more
# rows than 16 blocks of 8 hold.
@pytest.mark.parametrize(
  "heads, T",
  [(heads, T) for heads in HEADS for T in (7, 37)]
  + [("GQA", 1), ("GQA", 16), ("MQA", 150)],
)
@pytest.mark.parametrize("name", kernels.ATTENTION)
def test_equals_plain_attention(name, heads, T):
  N, K = HEADS[heads]
  q, k, v, pos, seg = make_case(T, 2, T, N, K, 6, packed(2, T))
  out = np.asarray(attend(name, q, k, v, pos, seg))
  want = plain_attention(q, k, v, pos, pos, seg, seg)
  real = ~np.isnan(want)
  np.testing.assert_allclose(out[real], want[real], atol=2e-6)
  # Padding sees nothing; what stands there must not poison anything.
  assert np.isfinite(out).all()


@pytest.mark.parametrize("name", kernels.ATTENTION)
def test_left_padding(name):
  segments = np.ones((2, 21), np.int32)
  segments[1, :9] = 0
  q, k, v, pos, seg = make_case(0, 2, 21, 4, 2, 8, segments)
  out = np.asarray(attend(name, q, k, v, pos, seg))
  want = plain_attention(q, k, v, pos, pos, seg, seg)
  real = ~np.isnan(want)
  np.testing.assert_allclose(out[real], want[real], atol=2e-6)
  assert np.isfinite(out).all()


OTHERS = sorted(set(kernels.ATTENTION) - {"reference"})


# The rows of "one" are one document and its padding, which cuDNN can do.
@pytest.mark.parametrize(
  "name, heads, rows",
  [(name, "GQA", rows) for name in OTHERS for rows in ("packed", "one")]
  + [("chunked", heads, "packed") for heads in ("MHA", "MQA")],
)
def test_gradients_equal_the_references(name, heads, rows, B=2, T=21):
  N, K = HEADS[heads]
  segments = packed(B, T)
  if rows == "one":
    segments[segments == 2] = 1
  q, k, v, pos, seg = make_case(1, B, T, N, K, 6, segments)
  cotangent = np.random.default_rng(2).normal(size=q.shape).astype(np.float32)
  cotangent[seg == 0] = 0

  def gradients(name):
    def loss(*qkv):
      return jnp.sum(attend(name, *qkv, pos, seg) * cotangent)

    return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

  for ours, want in zip(gradients(name), gradients("reference"), strict=True):
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(ours, want, atol=5e-6)


@pytest.mark.parametrize("B, T", [(1, 53), (5, 16)])
def test_gradients_of_blocks_equal_the_references(monkeypatch, B, T):
  """What test_gradients_equal_the_references sees of the loops."""
  monkeypatch.setattr(chunked, "SHORT", T)
  test_gradients_equal_the_references("chunked", "GQA", "packed", B, T)


@pytest.mark.parametrize("name", OTHERS)
def test_bfloat16_gradients(name):
  """No farther from float32's than a bfloat16 rounding of each product."""
  q, k, v, pos, seg = make_case(7, 2, 40, 6, 2, 8, packed(2, 40))
  cotangent = np.random.default_rng(8).normal(size=q.shape)
  cotangent[seg == 0] = 0

  def gradients(name, dtype):
    def loss(*qkv):
      out = attend(name, *qkv, pos, seg)
      return jnp.sum(out.astype(jnp.float32) * cotangent.astype(np.float32))

    return jax.grad(loss, (0, 1, 2))(
      *(jnp.asarray(a, dtype) for a in (q, k, v))
    )

  low = gradients(name, jnp.bfloat16)
  for ours, want in zip(low, gradients("reference", jnp.float32), strict=True):
    assert ours.dtype == jnp.bfloat16
    scale = np.abs(want).max()
    np.testing.assert_allclose(
      np.asarray(ours, np.float32), want, atol=0.02 * scale
    )


@pytest.mark.parametrize("name", OTHERS)
def test_other_queries_than_keys(name):
  """A few new tokens over a row of keys, as a chunked prefill has them."""
  q, k, v, pos, seg = make_case(9, 2, 37, 4, 2, 8, packed(2, 37))
  last = slice(20, 31)
  where = {
    "q_pos_BT": pos[:, last],
    "k_pos_BS": pos,
    "q_seg_BT": seg[:, last],
    "k_seg_BS": seg,
  }
  out = jax.jit(kernels.ATTENTION[name])(q[:, last], k, v, **where)
  want = plain_attention(q[:, last], k, v, pos[:, last], pos, seg[:, last], seg)
  real = ~np.isnan(want)
  np.testing.assert_allclose(np.asarray(out)[real], want[real], atol=2e-6)


@pytest.mark.parametrize("short", [0, chunked.SHORT])
def test_a_long_row_equals_the_reference(monkeypatch, short):
  """With tiles of the size that is used, in loops and in blocks."""
  monkeypatch.undo()
  monkeypatch.setattr(chunked, "SHORT", short)
  T = 3 * chunked.TILE + 3
  seg = np.ones((1, T), np.int32)
  seg[:, 300:], seg[:, 600:] = 2, 0
  q, k, v, pos, seg = make_case(10, 1, T, 2, 1, 8, seg)
  out = np.asarray(attend("chunked", q, k, v, pos, seg))
  want = np.asarray(attend("reference", q, k, v, pos, seg))
  np.testing.assert_allclose(out[seg != 0], want[seg != 0], atol=2e-6)


@pytest.mark.parametrize(
  "segments, counted, want",
  [
    ([1, 1, 1], [0, 1, 2], True),
    ([7, 7, 0], [0, 1, 0], True),
    ([0, 0, 0], [0, 0, 0], True),
    ([0, 1, 1], [0, 0, 1], False),
    ([1, 0, 1], [0, 0, 2], False),
    ([1, 1, 2], [0, 1, 2], False),
    ([1, 1, 1], [0, 0, 1], False),
    ([1, 1, 1], [1, 2, 3], False),
  ],
)
def test_rows_that_cudnn_can_take(segments, counted, want):
  both = [np.asarray([[0, 1, 2], a], np.int32) for a in (counted, segments)]
  both[1][0] = 1
  assert bool(cudnn.plain(*both)) == want


def test_which_kernel_runs_where(monkeypatch):
  def auto(platform, dtype="bfloat16", head_dim=128):
    monkeypatch.setattr(kernels, "platform", lambda: platform)
    return kernels.resolve("auto", dtype, head_dim)

  assert auto("cpu") == auto("gpu", "float32") == auto("gpu", head_dim=20)
  assert (auto("cpu"), auto("gpu"), auto("tpu")) == (
    "chunked",
    "cudnn",
    "splash",
  )
  assert kernels.resolve("reference", "float32", 64) == "reference"


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_a_kernel_that_cannot_run_here_says_why_and_what_can(name):
  with pytest.raises(errors.ConfigError) as caught:
    kernels.resolve(name, "bfloat16", 64)
  message = str(caught.value)
  assert f"model.attention='{name}'" in message and "this is a cpu" in message
  assert "use auto or one of reference, chunked." in message


def test_reference_gradient_is_the_numerical_one():
  q, k, v, pos, seg = make_case(3, 1, 5, 2, 1, 4, np.ones((1, 5), np.int32))
  rng = np.random.default_rng(4)
  toward = [rng.normal(size=a.shape).astype(np.float32) for a in (q, k, v)]

  def loss(q, k, v):
    return jnp.sum(jnp.sin(attend("reference", q, k, v, pos, seg)))

  slopes = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
  slope = sum(np.sum(g * d) for g, d in zip(slopes, toward, strict=True))

  def plain_loss(step):
    moved = [a + step * d for a, d in zip((q, k, v), toward, strict=True)]
    return np.sin(plain_attention(*moved, pos, pos, seg, seg)).sum()

  numerical = (plain_loss(1e-4) - plain_loss(-1e-4)) / 2e-4
  np.testing.assert_allclose(slope, numerical, rtol=1e-4)


@pytest.mark.parametrize("name", kernels.ATTENTION)
def test_bfloat16_stays_near_and_keeps_its_dtype(name):
  q, k, v, pos, seg = make_case(5, 1, 30, 4, 2, 8, packed(1, 30))
  low = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
  out = attend(name, *low, pos, seg)
  assert out.dtype == jnp.bfloat16
  want = plain_attention(q, k, v, pos, pos, seg, seg)
  # bfloat16 has 8 bits of mantissa: half a percent of values of order 1.
  np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=0.05)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("T", [1, 3])
def test_cached_attention(heads, T):
  """T new tokens over S slots, some unused, rows of different lengths."""
  N, K = HEADS[heads]
  B, S, H = 3, 20, 6
  rng = np.random.default_rng(6)
  q = rng.normal(size=(B, T, N, H)).astype(np.float32)
  k, v = (rng.normal(size=(B, S, K, H)).astype(np.float32) for _ in range(2))
  used = 14
  k_seg = np.zeros((B, S), np.int32)
  k_pos = np.zeros((B, S), np.int32)
  q_pos = np.zeros((B, T), np.int32)
  for b, padded in enumerate((0, 2, 9)):
    k_seg[b, padded:used] = 1
    k_pos[b, padded:used] = np.arange(used - padded)
    q_pos[b] = np.arange(used - padded)[-T:]
  q_seg = np.ones((B, T), np.int32)
  where = {
    "q_pos_BT": q_pos,
    "k_pos_BS": k_pos,
    "q_seg_BT": q_seg,
    "k_seg_BS": k_seg,
  }
  # As four panels of five slots.
  k_nHXP = k.transpose(0, 2, 3, 1).reshape(B * K, H, 4, 5)
  out = jax.jit(cached.attend)(
    q,
    k_nHXP.swapaxes(1, 2),
    v.transpose(0, 2, 1, 3).reshape(B * K, S, H),
    **where,
  )
  want = plain_attention(q, k, v, q_pos, k_pos, q_seg, k_seg)
  np.testing.assert_allclose(out, want, atol=2e-6)
  np.testing.assert_allclose(
    jax.jit(reference.attend)(q, k, v, **where), want, atol=2e-6
  )


def test_cached_reads_no_slot_past_many_tokens_whose_place_is_known():
  """Three sequences in a row: the first two go on from slots before."""
  B, N, K, H, before, T = 1, 6, 2, 8, 128, 200
  S = 384  # Six panels, of which the last is not reached.
  rng = np.random.default_rng(3)
  q = rng.normal(size=(B, T, N, H)).astype(np.float32)
  k, v = (rng.normal(size=(B, S, K, H)).astype(np.float32) for _ in range(2))
  k_pos, k_seg = np.zeros((2, B, S), np.int32)
  k_pos[0, :128] = [*range(64), *range(64)]
  k_seg[0, :50], k_seg[0, 64:128] = 1, 2
  new = [(1, 50, 90), (2, 64, 30), (3, 0, 70), (0, 0, 10)]
  q_seg = np.concatenate([np.full(n, s) for s, _, n in new])[None]
  q_pos = np.concatenate([np.arange(a, a + n) for _, a, n in new])[None]
  k_pos[:, before : before + T] = q_pos
  k_seg[:, before : before + T] = q_seg
  where = {
    "q_pos_BT": q_pos.astype(np.int32),
    "k_pos_BS": k_pos,
    "q_seg_BT": q_seg.astype(np.int32),
    "k_seg_BS": k_seg,
  }
  held = (
    k.transpose(0, 2, 3, 1).reshape(B * K, H, 6, 64).swapaxes(1, 2),
    v.transpose(0, 2, 1, 3).reshape(B * K, S, H),
  )
  want = plain_attention(q, k, v, q_pos, k_pos, q_seg, k_seg)
  real = q_seg[0] != 0
  for known in (before, None):
    run = jax.jit(functools.partial(cached.attend, before=known))
    out = run(q, *held, **where)
    np.testing.assert_allclose(out[:, real], want[:, real], atol=2e-6)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
  "first, T",
  [(0, 1), (63, 1), (64, 1), (60, 9), (0, 128), (1, 128), (100, 92), (191, 1)],
)
def test_cached_writes_and_reads_slots_across_panels(first, T):
  B, K, H, S = 2, 2, 4, 192
  rng = np.random.default_rng(0)
  old, new = (
    rng.normal(size=(2, B, n, K, H)).astype(np.float32) for n in (S, T)
  )
  write = jax.jit(cached.write)
  held = write(*cached.empty(B, K, S, H, jnp.float32), *old, 0)
  held = write(*held, *new, np.int32(first))
  whole = cached.read(*held, B, 0, S)
  part = jax.jit(cached.read, static_argnums=(2, 4))(*held, B, first, T)
  for k, (got, some) in enumerate(zip(whole, part, strict=True)):
    want = old[k].copy()
    want[:, first : first + T] = new[k]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(some, new[k])
