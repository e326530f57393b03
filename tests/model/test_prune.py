"""Pruning: what does nothing goes unnoticed, and what does least goes first."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.model import attention, prune, rope, sizes
from llama_jax.model import config as config_lib
from llama_jax.model import decoder as decoder_lib
from llama_jax.parallel import mesh, rules

# Every dimension has something to spare: L 4, K 3, G 3, D 48, F 40.
LARGE = dataclasses.replace(
  sizes.get("nano"),
  vocab_size=64,
  num_layers=4,
  num_kv_heads=3,
  num_heads=9,
  head_dim=8,
  embed_dim=48,
  mlp_dim=40,
  tied_embeddings=False,
)
SMALL = dataclasses.replace(
  LARGE, num_layers=2, num_kv_heads=2, num_heads=4, embed_dim=30, mlp_dim=24
)


def make_batch(rows=4, length=16):
  """Rows of which the last ends in padding."""
  rng = np.random.default_rng(1)
  segments = np.ones((rows, length), np.int32)
  segments[-1, -5:] = 0
  return {
    "tokens": rng.integers(64, size=(rows, length), dtype=np.int32),
    "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    "segments": segments,
  }


def model_of(config):
  return decoder_lib.Decoder(
    config, attention="reference", rematerialise="none"
  )


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params):
  return model.apply({"params": params}, *make_batch().values())[0]


def unused(config, params, target, seed=0):
  """Params of config in which all that target has no room for does nothing."""
  rng = np.random.default_rng(seed)
  params = jax.tree.map(np.array, params)
  layers = params["layers"]

  def spare(size, kept):
    return rng.permutation(size)[kept:]

  for layer in range(config.num_layers):
    down_FD = layers["mlp"]["down"]["kernel"][layer]
    down_FD[spare(config.mlp_dim, target.mlp_dim)] = 0
    out_KGHD = layers["attention"]["out"]["kernel"][layer].reshape(
      config.num_kv_heads, config.num_groups, config.head_dim, -1
    )
    out_KGHD[spare(config.num_kv_heads, target.num_kv_heads)] = 0
    for out_GHD in out_KGHD:
      out_GHD[spare(config.num_groups, target.num_groups)] = 0
  for layer in spare(config.num_layers, target.num_layers):
    layers["mlp"]["down"]["kernel"][layer] = 0
    layers["attention"]["out"]["kernel"][layer] = 0
  gone = spare(config.embed_dim, target.embed_dim)
  params["embed"]["embedding"][:, gone] = 0
  layers["mlp"]["down"]["kernel"][..., gone] = 0
  layers["attention"]["out"]["kernel"][..., gone] = 0
  return params


def test_what_is_unused_changes_no_logit(random_params):
  # What the norms add to squares is all that their correction cannot undo.
  large, small = (
    dataclasses.replace(config, norm_eps=1e-9) for config in (LARGE, SMALL)
  )
  params = unused(large, random_params(large, spread=0.3), small)
  want = logits_of(model_of(large), params)
  found = prune.measure(model_of(large), params, [make_batch()])
  pruned = prune.prune(large, params, found, small)
  shapes = jax.eval_shape(
    lambda: nn.unbox(decoder_lib.init(model_of(small), jax.random.key(0)))
  )
  assert jax.tree.map(jnp.shape, pruned) == jax.tree.map(jnp.shape, shapes)
  got = logits_of(model_of(small), pruned)
  np.testing.assert_allclose(got, want, atol=3e-5 * float(jnp.std(want)))
  # The other way round, what is of use would go.
  turned = jax.tree.map(lambda a: a.max() - a, found)
  turned = turned._replace(shares_nD=found.shares_nD)
  other = prune.prune(large, params, turned, small)
  off = logits_of(model_of(small), other) - want
  assert np.abs(off).max() > 0.1 * float(jnp.std(want))


@pytest.fixture(scope="module")
def measured(random_params):
  params = random_params(LARGE, spread=0.3)
  return params, prune.measure(model_of(LARGE), params, [make_batch()])


def test_nothing_to_cut_leaves_all_as_it_was(measured):
  params, found = measured
  pruned = prune.prune(LARGE, params, found, LARGE)
  jax.tree.map(np.testing.assert_array_equal, pruned, params)


def walk(params):
  """(a layer's params, its input, its output), layer by layer."""
  batch = make_batch()
  tokens = attention.Tokens(
    batch["positions"],
    batch["segments"],
    *rope.table(LARGE, batch["positions"]),
  )
  block = decoder_lib.Block(LARGE, jnp.dtype("float32"), "reference")

  @jax.jit
  def apply(held, x):
    return block.apply({"params": held}, x, tokens)[0]

  x = params["embed"]["embedding"][batch["tokens"]]
  for layer in range(LARGE.num_layers):
    held = jax.tree.map(lambda leaf, i=layer: leaf[i], params["layers"])
    y = apply(held, x)
    yield held, x, y, apply
    x = y


def real(x):
  """Float64 [t, D] without padding."""
  return np.asarray(x, np.float64)[make_batch()["segments"] > 0]


def test_a_layer_is_worth_what_it_turns(measured):
  params, found = measured
  for layer, (_, x, y, _) in enumerate(walk(params)):
    x, y = real(x), real(y)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosine = ((x * y).sum(1) / lengths).mean()
    np.testing.assert_allclose(found.layers_L[layer], 1 - cosine, rtol=1e-5)


def test_heads_and_channels_are_worth_what_is_lost_without_them(measured):
  """By leaving one out: the norm of the difference it makes to the stream."""
  params, found = measured
  held, x, _, apply = next(walk(params))
  # Only then is a block's output linear in each.
  silent = jax.tree.map(np.array, held)
  silent["mlp"]["down"]["kernel"][:] = 0

  def lost(held, module, rows):
    less = jax.tree.map(np.array, held)
    kernel = dict(attention="out", mlp="down")[module]
    less[module][kernel]["kernel"][rows] = 0
    difference = real(apply(held, x)) - real(apply(less, x))
    return np.linalg.norm(difference, axis=1).mean()

  for head in (0, 4, 8):
    want = lost(silent, "attention", slice(8 * head, 8 * head + 8))
    np.testing.assert_allclose(found.heads_LN[0, head], want, rtol=1e-4)
  for channel in (0, 21, 39):
    want = lost(held, "mlp", channel)
    np.testing.assert_allclose(found.channels_LF[0, channel], want, rtol=1e-4)


def test_embedding_channels_are_worth_what_is_behind_the_norms(measured):
  params, found = measured
  for layer, (held, x, _, _) in enumerate(walk(params)):
    squares = real(x) ** 2
    over = squares.mean(1, keepdims=True) + LARGE.norm_eps
    normal = real(x) / np.sqrt(over) * held["attention_norm"]["scale"]
    for got, want in (
      (found.embed_nD[2 * layer], np.abs(normal)),
      (found.shares_nD[2 * layer], squares / over),
    ):
      np.testing.assert_allclose(got, want.mean(0), rtol=1e-4)
  assert found.embed_nD.shape == found.shares_nD.shape == (9, 48)


def test_norms_are_corrected_for_the_channels_that_are_gone(measured):
  """By how much less they divide squares by, in the mean over tokens."""
  params, found = measured
  target = dataclasses.replace(LARGE, embed_dim=30)
  pruned = prune.prune(LARGE, params, found, target)
  columns = np.asarray(pruned["embed"]["embedding"]).T
  kept = [
    any(np.array_equal(one, column) for column in columns)
    for one in params["embed"]["embedding"].T
  ]
  assert sum(kept) == 30
  for layer, (held, x, _, _) in enumerate(walk(params)):
    squares = real(x) ** 2
    left, all_ = (
      part.mean(1) + LARGE.norm_eps for part in (squares[:, kept], squares)
    )
    want = held["attention_norm"]["scale"][kept] * (left / all_).mean() ** 0.5
    got = pruned["layers"]["attention_norm"]["scale"][layer]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_batches_add_up(measured):
  """Two halves, of other numbers of tokens, are the whole."""
  params, found = measured
  batch = make_batch()
  halves = [
    {name: a[rows] for name, a in batch.items()}
    for rows in (slice(0, 2), slice(2, 4))
  ]
  parts = prune.measure(model_of(LARGE), params, halves)
  for one, other in zip(parts, found, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_a_mesh_measures_the_same(random_params):
  config = dataclasses.replace(LARGE, num_kv_heads=2, num_heads=4)
  params = random_params(config, spread=0.3)
  model = model_of(config)
  want = prune.measure(model, params, [make_batch()])
  devices = mesh.make(mesh.ParallelConfig(2, 2, 2))
  boxed = jax.eval_shape(lambda: decoder_lib.init(model, jax.random.key(0)))
  placed = jax.tree.map(
    lambda axes: rules.spec(tuple(axes)),
    nn.get_partition_spec(boxed),
    is_leaf=lambda one: isinstance(one, jax.P),
  )
  with jax.set_mesh(devices):
    params = jax.device_put(params, rules.shardings(devices, placed))
    got = prune.measure(model, params, [make_batch()])
  for one, other in zip(got, want, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4)


def test_heads_to_tie_and_to_untie(measured, random_params):
  params, found = measured
  tied = dataclasses.replace(SMALL, tied_embeddings=True)
  pruned = prune.prune(LARGE, params, found, tied)
  assert "head" not in pruned
  config = dataclasses.replace(LARGE, tied_embeddings=True)
  params = random_params(config, spread=0.3)
  each = [
    logits_of(model_of(target), prune.prune(config, params, found, target))
    for target in (tied, SMALL)
  ]
  np.testing.assert_allclose(*each, rtol=1e-5, atol=1e-5)


def test_llama_3_2_3b_can_be_cut_out_of_8b_and_1b_cannot():
  """Whose heads are half as long."""
  large = sizes.get("llama3.1-8b")
  prune.check(large, sizes.get("llama3.2-3b"))
  with pytest.raises(errors.ConfigError, match=r"model.head_dim=64 cannot"):
    prune.check(large, sizes.get("llama3.2-1b"))


@pytest.mark.parametrize(
  "fields, said",
  [
    (dict(num_layers=5), ["model.num_layers=5", "use 4 or less"]),
    (dict(embed_dim=50), ["model.embed_dim=50", "use 48 or less"]),
    (dict(mlp_dim=41), ["model.mlp_dim=41", "use 40 or less"]),
    (dict(num_kv_heads=4, num_heads=4), ["model.num_kv_heads=4"]),
    (
      dict(num_kv_heads=2, num_heads=8),
      ["model.num_heads / model.num_kv_heads=4", "use 3 or less"],
    ),
    (dict(head_dim=4), ["model.head_dim=4", "model.head_dim=8"]),
    (dict(vocab_size=65), ["model.vocab_size=65", "use 64"]),
    (dict(rope_theta=5.0), ["model.rope_theta=5.0"]),
    (dict(head="scalar"), ["model.head=scalar"]),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_reached(fields, said, measured):
  params, found = measured
  target: config_lib.LlamaConfig = dataclasses.replace(LARGE, **fields)
  with pytest.raises(errors.ConfigError) as caught:
    prune.prune(LARGE, params, found, target)
  assert all(word in str(caught.value) for word in said), str(caught.value)


def test_there_is_nothing_to_measure_on(random_params):
  with pytest.raises(errors.UserError, match="there is none"):
    prune.measure(model_of(LARGE), random_params(LARGE), [])
