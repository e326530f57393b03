"""Sharded equals unsharded, and everything lies where the rules say."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.checkpoint import names
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes
from llama_jax.objectives import next_token
from llama_jax.parallel import hosts, mesh
from llama_jax.training import guard as guard_lib
from llama_jax.training import optimizer as optimizer_lib
from llama_jax.training import state as state_lib
from llama_jax.training import step as step_lib

NANO = sizes.get("nano")
DECODER = decoder_lib.Decoder(NANO)
# No clipping: after one step, Adam's first moment is the gradient times 1 - b1.
RECIPE = optimizer_lib.OptimizerConfig(
  peak_lr=1e-2,
  schedule="cosine",
  warmup_steps=0,
  final_lr_fraction=1.0,
  decay_fraction=0.0,
  b1=0.5,
  b2=0.9,
  eps=1e-8,
  weight_decay=0.1,
  clip_norm=float("inf"),
  moments_dtype="float32",
)
# Written out by hand, not through parallel/rules.py.
EXPECTED = {
  "embed/embedding": P("tensor", "fsdp"),
  "layers/attention_norm/scale": P(None, None),
  "layers/attention/query/kernel": P(None, "fsdp", "tensor"),
  "layers/attention/key/kernel": P(None, "fsdp", "tensor"),
  "layers/attention/value/kernel": P(None, "fsdp", "tensor"),
  "layers/attention/out/kernel": P(None, "tensor", "fsdp"),
  "layers/mlp_norm/scale": P(None, None),
  "layers/mlp/gate/kernel": P(None, "fsdp", "tensor"),
  "layers/mlp/up/kernel": P(None, "fsdp", "tensor"),
  "layers/mlp/down/kernel": P(None, "tensor", "fsdp"),
  "final_norm/scale": P(None),
}


def make_batch():
  rng = np.random.default_rng(0)
  shape = (1, 8, 16)
  segments = np.ones(shape, np.int32)
  segments[:, 1::2, 9:] = 2
  positions = np.tile(np.arange(16, dtype=np.int32), (1, 8, 1))
  positions[:, 1::2, 9:] -= 9
  # Rows hold different numbers of scored tokens.
  mask = (rng.random(shape) < np.linspace(0.2, 1, 8)[None, :, None]) * 1.0
  return {
    "tokens": rng.integers(512, size=shape, dtype=np.int32),
    "targets": rng.integers(512, size=shape, dtype=np.int32),
    "positions": positions,
    "segments": segments,
    "loss_mask": mask.astype(np.float32),
    "sources": rng.integers(2, size=shape[:2], dtype=np.int32),
  }


def loss_sum(params, *args):
  return DECODER.apply({"params": params}, *args, 0.0, method="loss_sum")


@functools.cache
def one_update(data, fsdp, tensor, params_of):
  """The state and metrics after one step on a mesh."""
  count = data * fsdp * tensor
  devices = mesh.make(
    mesh.ParallelConfig(data, fsdp, tensor), jax.devices()[:count]
  )
  optimizer = optimizer_lib.make(RECIPE)
  init = functools.partial(decoder_lib.init, DECODER)
  with jax.set_mesh(devices):
    _, placed = state_lib.shardings(init, optimizer, devices)
    params = params_of(NANO)
    shapes = jax.eval_shape(lambda: optimizer.init(params))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state = state_lib.TrainState(np.int32(0), params, zeros, guard_lib.create())
    state = jax.device_put(state, placed)
    update = jax.jit(
      step_lib.make(next_token.make(loss_sum, 2), optimizer, spike_factor=0),
      out_shardings=(placed, None),
    )
    batch = hosts.put_batch(make_batch(), devices, axis=1)
    state, metrics = update(state, batch, np.float32(RECIPE.peak_lr))
  return devices, state, metrics


def adam(state):
  """The one ScaleByAdamState in a chain's state."""
  is_adam = lambda leaf: isinstance(leaf, optax.ScaleByAdamState)  # noqa: E731
  leaves = jax.tree.leaves(state.opt_state, is_leaf=is_adam)
  return next(leaf for leaf in leaves if is_adam(leaf))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_loss_and_gradients_equal_one_device(sizes, random_params):
  _, state, metrics = one_update(*sizes, random_params)
  _, want, want_metrics = one_update(1, 1, 1, random_params)
  for name in ("loss", "grad_norm", "scored"):
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=2e-6)
  for name in ("source_loss", "source_tokens"):
    assert metrics[name].shape == (2,)
    np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=2e-5)
  ours, theirs = (names.flatten(adam(s).mu) for s in (state, want))
  for path in EXPECTED:
    scale = np.abs(theirs[path]).max()
    assert scale > 0, path
    np.testing.assert_allclose(
      ours[path], theirs[path], atol=2e-5 * scale, err_msg=path
    )


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_every_leaf_lies_where_the_rules_say(sizes, random_params):
  devices, state, _ = one_update(*sizes, random_params)
  moments = adam(state)
  for name, tree in (
    ("params", state.params),
    ("mu", moments.mu),
    ("nu", moments.nu),
  ):
    flat = names.flatten(tree)
    assert flat.keys() == EXPECTED.keys()
    for path, leaf in flat.items():
      want = NamedSharding(devices, EXPECTED[path])
      assert leaf.sharding.is_equivalent_to(want, leaf.ndim), (name, path)
      if "norm" not in path:
        parts = leaf.size // leaf.addressable_shards[0].data.size
        assert parts == sizes[1] * sizes[2], (name, path)
