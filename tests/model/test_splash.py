"""A model with the TPU kernel: on a mesh of simulated devices, and compiled for
TPUs that are not there."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llama_jax import kernels
from llama_jax.kernels import splash
from llama_jax.model import attention, rope, sizes
from llama_jax.model import decoder as decoder_lib
from llama_jax.parallel import mesh as mesh_lib
from llama_jax.parallel import rules

NANO = sizes.get("nano")


# Rows for every device, and one row, which none can be given a part of.
@pytest.mark.parametrize("rows", [4, 1])
def test_on_a_mesh_each_device_runs_its_own_heads_and_rows(monkeypatch, rows):
  monkeypatch.setattr(splash, "INTERPRET", True)
  monkeypatch.setattr(kernels, "platform", lambda: "tpu")
  T = 40
  rng = np.random.default_rng(0)
  q, k, v = (
    rng.normal(size=(rows, T, n, 8)).astype(np.float32) for n in (4, 2, 2)
  )
  positions = np.tile(np.arange(T, dtype=np.int32), (rows, 1))
  segments = np.where(positions < 30, 1, 2).astype(np.int32)
  tokens = attention.Tokens(
    positions, segments, *rope.table(NANO, jnp.asarray(positions))
  )

  def run(kernel):
    def loss(q, k, v):
      out = attention.attend(kernel, q, k, v, tokens)
      return jnp.sum(out**2), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

  want = run("reference")
  mesh = mesh_lib.make(mesh_lib.ParallelConfig(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    ours = run("splash")
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_sharded_gradient_compiles_for_tpus(tpu_topology, head_dim):
  mesh = mesh_lib.make(
    mesh_lib.ParallelConfig(data=1, fsdp=2, tensor=2), tpu_topology.devices
  )
  config = dataclasses.replace(NANO, head_dim=head_dim)
  decoder = decoder_lib.Decoder(
    config, dtype="bfloat16", attention="auto", rematerialise="attention"
  )

  def loss(params, *batch):
    return decoder.apply({"params": params}, *batch, 0.0, method="loss_sum")[0]

  with jax.set_mesh(mesh):
    boxed = jax.eval_shape(lambda: decoder_lib.init(decoder, jax.random.key(0)))
    placed = nn.logical_to_mesh_sharding(
      nn.get_partition_spec(boxed), mesh, rules.RULES
    )
    params = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      nn.unbox(boxed),
      placed,
    )
    rows = NamedSharding(mesh, rules.spec(("batch", None)))
    ints = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=rows)
    weights = jax.ShapeDtypeStruct((4, 1024), jnp.float32, sharding=rows)
    batch = (ints, ints, ints, ints, weights)
    program = jax.jit(jax.grad(loss)).lower(params, *batch).compile()
  calls = [
    line
    for line in program.as_text().split("\n")
    if "custom-call(" in line and "splash" in line
  ]
  # Forward once, and not again in the backward pass, which is two calls.
  kinds = [re.search(r"splash_mqa_(fwd|dq|dkv)", line)[1] for line in calls]
  assert sorted(kinds) == ["dkv", "dq", "fwd"]
