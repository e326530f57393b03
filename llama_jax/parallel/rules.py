"""Which mesh axis each logical axis of an array lies on.

Params and activations name what their axes mean; this table alone says where
they go. An axis that no rule names is replicated.
"""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
  ("batch", ("data", "fsdp")),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", "tensor"),
  ("layers", None),
  ("norm", None),
)


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
  """The mesh axes of an array whose axes mean these."""
  table = dict(RULES)
  return PartitionSpec(
    *(None if axis is None else table[axis] for axis in axes)
  )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation's sharding inside jit; does nothing without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes))


def batch_parts() -> tuple[tuple[str, ...], int]:
  """The mesh axes a batch lies on, and in how many parts; 1 without a mesh."""
  (axes,) = spec(("batch",))
  mesh = jax.sharding.get_abstract_mesh()
  return axes, math.prod(mesh.shape.get(axis, 1) for axis in axes)


def shardings(mesh: jax.sharding.Mesh, specs):
  """NamedShardings for a tree of PartitionSpecs."""
  return jax.tree.map(
    lambda one: NamedSharding(mesh, one),
    specs,
    is_leaf=lambda one: isinstance(one, PartitionSpec),
  )
