"""What the chunked kernel promises beside its values: memory, tiles, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.kernels import chunked, reference
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes

# chunked.SHORT: loops over tiles for every sequence, or blocks of rows.
WAYS = {"loops": 0, "blocks": chunked.SHORT}


def self_attention(kernel):
  """(q, k, v, positions, segments) -> gradients of a sum by q, k, v."""

  def loss(q, k, v, pos, seg):
    where = {"q_pos_BT": pos, "k_pos_BS": pos, "q_seg_BT": seg, "k_seg_BS": seg}
    return jnp.sum(kernel(q, k, v, **where) ** 2)

  return jax.grad(loss, (0, 1, 2))


def shapes(B, T, N, K, H, sharding=lambda *axes: None):
  def array(*shape, axes, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(*axes))

  q, k, v = (
    array(B, T, n, H, axes=("batch", None, "heads", None), dtype=jnp.float32)
    for n in (N, K, K)
  )
  pos, seg = (
    array(B, T, axes=("batch", None), dtype=jnp.int32) for _ in range(2)
  )
  return q, k, v, pos, seg


def temporary_bytes(kernel, T):
  program = jax.jit(self_attention(kernel)).lower(*shapes(1, T, 4, 2, 16))
  return program.compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_length_and_not_its_square():
  whole = 4 * 4096**2 * 4  # one float32 [N, T, T]
  half, full = (temporary_bytes(chunked.attend, T) for T in (2048, 4096))
  assert full < 2.3 * half
  assert full < whole / 10
  # The measure itself sees the whole scores where they are.
  assert temporary_bytes(reference.attend, 4096) > whole


@pytest.mark.parametrize("rematerialise", ["none", "full"])
def test_memory_of_a_training_step_grows_with_length(rematerialise):
  config = sizes.get("nano")
  decoder = decoder_lib.Decoder(config, rematerialise=rematerialise)
  params = jax.eval_shape(lambda: decoder_lib.init(decoder, jax.random.key(0)))

  def temporary(T):
    ints = jax.ShapeDtypeStruct((1, T), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, T), jnp.float32)

    def loss(params, *batch):
      return decoder.apply({"params": params}, *batch, 0.0, method="loss_sum")[
        0
      ]

    batch = (ints, ints, ints, ints, weights)
    program = jax.jit(jax.grad(loss)).lower(params, *batch).compile()
    return program.memory_analysis().temp_size_in_bytes

  half, full = temporary(2048), temporary(4096)
  assert full < 2.3 * half
  assert full < config.num_layers * config.num_heads * 4096**2 * 4 / 4


@pytest.mark.parametrize("short", WAYS.values(), ids=WAYS)
def test_a_mesh_moves_no_queries_keys_or_values(monkeypatch, short):
  """Batch and heads stay on their devices; only which tiles to skip, one bit
  each, is agreed on."""
  monkeypatch.setattr(chunked, "SHORT", short)
  mesh = jax.make_mesh(
    (4, 2), ("batch", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )

  def sharding(*axes):
    return NamedSharding(mesh, PartitionSpec(*axes))

  T = 3 * chunked.TILE
  args = shapes(4, T, 4, 2, 16, sharding)
  program = jax.jit(self_attention(chunked.attend)).lower(*args).compile()
  text = program.as_text()
  for collective in ("all-gather", "all-to-all", "collective-permute"):
    assert f" {collective}(" not in text
  reduced = [line for line in text.split("\n") if " all-reduce(" in line]
  assert all("pred[3,3]" in line for line in reduced), reduced

  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=a.shape).astype(np.float32) for a in args[:3]]
  pos = np.tile(np.arange(T, dtype=np.int32), (4, 1))
  arrays += [pos, np.ones_like(pos)]
  want = jax.jit(self_attention(chunked.attend))(*arrays)
  placed = [
    jax.device_put(a, b.sharding) for a, b in zip(arrays, args, strict=True)
  ]
  for ours, theirs in zip(program(*placed), want, strict=True):
    # Each device's products have other shapes, and so other orders of sums.
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kind", ["one document", "packed", "padded"])
def test_skipped_tiles_are_those_that_no_query_sees(monkeypatch, kind):
  """Against every pair of tokens; and what can be skipped mostly is."""
  monkeypatch.setattr(chunked, "TILE", 16)
  T = 128
  pos = np.tile(np.arange(T, dtype=np.int32), (2, 1))
  seg = np.ones_like(pos)
  if kind == "packed":
    for start, number in ((32, 2), (100, 3)):
      seg[:, start:], pos[:, start:] = number, np.arange(T - start)
  if kind == "padded":
    seg[:, 50:] = 0
  tiles = chunked.Tiles(*(chunked._cut(a, 16) for a in (pos, pos, seg, seg)))
  seen = np.asarray(chunked._seen(tiles, aligned=True))
  each = np.asarray(reference.visible(pos, pos, seg, seg)).any(0)
  each = each.reshape(8, 16, 8, 16).any((1, 3))
  assert (seen >= each).all()
  # The borders of documents cost some tiles; without borders none.
  assert seen.sum() <= each.sum() * (1.25 if kind == "packed" else 1)


@pytest.mark.parametrize("short", WAYS.values(), ids=WAYS)
def test_where_nothing_is_seen_there_is_nothing(monkeypatch, short):
  """A padded row is 0, and nothing flows back from it."""
  monkeypatch.setattr(chunked, "SHORT", short)
  rng = np.random.default_rng(1)
  q, k, v = (
    rng.normal(size=(1, 9, n, 4)).astype(np.float32) for n in (2, 1, 1)
  )
  pos = np.arange(9, dtype=np.int32)[None]
  seg = np.where(pos < 6, 1, 0)

  def attend(q, k, v):
    where = {"q_pos_BT": pos, "k_pos_BS": pos, "q_seg_BT": seg, "k_seg_BS": seg}
    return chunked.attend(q, k, v, **where)

  @jax.jit
  def both(q, k, v, cotangent):
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(cotangent)

  # Cotangents on padding, which no loss has, move nothing either.
  cotangent = np.zeros_like(q)
  cotangent[0, 6:] = 1
  out, gradients = both(q, k, v, cotangent)
  assert (out[0, 6:] == 0).all() and (out[0, :6] != 0).all()
  for gradient in gradients:
    assert (gradient == 0).all()
