"""Quantized params in the decoder: as good as the weights they stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llama_jax import errors
from llama_jax.decoding import loop, sampling
from llama_jax.kernels import int8
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import quantize, sizes
from llama_jax.model import unrolled as unrolled_lib
from llama_jax.parallel import mesh as mesh_lib
from llama_jax.parallel import rules

# Rows of 100 in the MLP: what groups of 32 do not divide.
NANO = dataclasses.replace(sizes.get("nano"), head_dim=16)
UNTIED = dataclasses.replace(NANO, tied_embeddings=False, mlp_dim=100)
CONFIGS = pytest.mark.parametrize("config", (NANO, UNTIED), ids=("tied", "not"))
KINDS = pytest.mark.parametrize("kind", quantize.KINDS)


@pytest.fixture(scope="module")
def params_of(random_params):
  return functools.cache(
    lambda config: unrolled_lib.unstack(random_params(config))
  )


def is_quantized(leaf):
  return isinstance(leaf, int8.Quantized)


def widened(params):
  """The float32 params that quantized ones stand for."""
  return jax.tree.map(
    lambda leaf: int8.dequantize(leaf) if is_quantized(leaf) else leaf,
    params,
    is_leaf=is_quantized,
  )


@functools.partial(jax.jit, static_argnames="config")
def forward(params, ids, *, config):
  positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  decoder = decoder_lib.Decoder(config, scan=False)
  return decoder.apply({"params": params}, ids, positions, jnp.ones_like(ids))[
    0
  ]


# Activations have 16 bits: logits were seen to be off by 1e-4 of their spread
# on average. With 8 bits it would be 256 times that.
NEAR = 1e-3
IDS = np.random.default_rng(0).integers(512, size=(2, 24), dtype=np.int32)


@CONFIGS
@KINDS
def test_the_forward_is_that_of_the_widened_weights(params_of, config, kind):
  made = quantize.quantize(params_of(config), kind)
  got = forward(made, IDS, config=config)
  want = forward(widened(made), IDS, config=config)
  spread = float(jnp.std(want))
  assert jnp.abs(got - want).max() < NEAR * spread
  # And they are other weights than the model's own.
  own = forward(params_of(config), IDS, config=config)
  assert jnp.abs(got - own).max() > 1e-2 * spread


@KINDS
def test_greedy_tokens_are_those_of_the_widened_weights(params_of, kind):
  made = quantize.quantize(params_of(NANO), kind)
  generate = functools.partial(
    loop.generate,
    decoder_lib.Decoder(NANO, scan=False),
    prompts=[IDS[0, :5].tolist(), IDS[1].tolist()],
    max_new_tokens=12,
    sampling_config=sampling.SamplingConfig(),
    stop_ids=(),
  )
  assert generate(made) == generate(widened(made))


def described(params, made):
  """Of all at once, as of parts."""
  whole, parts = quantize.Report(), quantize.Report()
  whole.add(params, made)
  for name in params:
    parts.add({name: params[name]}, {name: made[name]})
  assert str(whole) == str(parts)
  return str(whole)


@CONFIGS
def test_which_matrices_become_what(params_of, config):
  """Bytes, counted from the shapes."""
  params = params_of(config)
  for kind in quantize.KINDS:
    made = quantize.quantize(params, kind)
    total = 0
    for path, leaf in jax.tree.leaves_with_path(params):
      rest = leaf.size
      if leaf.ndim == 1:
        total += 4 * rest
        continue
      words = path[0].key in ("embed", "head")
      if kind == "int4" and not words and leaf.shape[1] % 32 == 0:
        rest = rest // 2 + rest // 32 * 2
      total += rest + 4 * len(leaf)
    got = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
    assert got == total
    line = described(params, made)
    before = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert f"{before / 1e6:,.1f} MB -> {total / 1e6:,.1f} MB" in line


def test_describe_says_the_error(params_of):
  params = params_of(NANO)
  made = quantize.quantize(params, "int8")
  off = {}
  for path, was in jax.tree.leaves_with_path(params):
    if was.ndim == 2:
      leaf = functools.reduce(lambda tree, entry: tree[entry.key], path, made)
      moved = np.asarray(int8.dequantize(leaf), np.float64) - was
      name = "/".join(entry.key for entry in path)
      off[name] = np.linalg.norm(moved) / np.linalg.norm(was)
  worst = max(off, key=off.get)
  line = described(params, made)
  assert f"moved by {np.mean(list(off.values())):.2%} of its norm" in line
  assert line.endswith(f"{worst} by {off[worst]:.2%}")


def test_what_is_refused(params_of, random_params):
  with pytest.raises(
    errors.ConfigError, match=r"--quantize='int3'.*int8, int4"
  ):
    quantize.quantize(params_of(NANO), "int3")
  with pytest.raises(ValueError, match="unstack"):
    quantize.quantize(random_params(NANO), "int8")


@KINDS
def test_sharded_equals_unsharded(params_of, kind):
  """Over two tensor parts: rows of some matrices, columns of others."""
  made = quantize.quantize(params_of(NANO), kind)
  decoder = decoder_lib.Decoder(NANO, scan=False)
  boxed = jax.eval_shape(lambda: decoder_lib.init(decoder, jax.random.key(0)))
  flat = jax.tree.map(
    lambda box: rules.spec(box.names),
    boxed,
    is_leaf=lambda leaf: hasattr(leaf, "names"),
  )
  devices = mesh_lib.make(
    mesh_lib.ParallelConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2]
  )
  placed = quantize.specs(made, flat)
  down = placed["layers_0"]["mlp"]["down"]["kernel"]
  assert down.values == PartitionSpec("fsdp", "tensor")
  assert down.scale_O == PartitionSpec("fsdp")
  want = forward(made, IDS, config=NANO)
  with jax.set_mesh(devices):
    shards = jax.device_put(made, rules.shardings(devices, placed))
    got = jax.device_get(forward(shards, IDS, config=NANO))
  # Sums in another order may round an activation to the next of its steps.
  assert np.abs(got - want).max() < NEAR * jnp.std(want)
