"""Where arrays lie follows from one table, which refuses strangers."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax.parallel import mesh, rules


def test_spec():
  assert rules.spec(("layers", "embed", "heads")) == P(None, "fsdp", "tensor")
  assert rules.spec(("batch", None)) == P(("data", "fsdp"), None)
  with pytest.raises(KeyError):
    rules.spec(("embedd",))


def test_rules_name_each_logical_axis_once_and_real_mesh_axes():
  names = [name for name, _ in rules.RULES]
  assert len(set(names)) == len(names)
  for _, axes in rules.RULES:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    assert set(axes) <= set(mesh.AXES)


def test_constrain_does_nothing_without_a_mesh():
  x = jnp.ones((4, 4))
  assert rules.constrain(x, "batch", None) is x


def test_constrain_places_inside_jit():
  with jax.set_mesh(mesh.make(mesh.ParallelConfig(2, 2, 2))):
    place = jax.jit(lambda x: rules.constrain(2 * x, "batch", "heads"))
    shards = place(jnp.ones((8, 6))).addressable_shards
  assert {s.data.shape for s in shards} == {(2, 3)}
