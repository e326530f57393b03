"""All that one update reads and writes, and where it lies on the mesh."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from llama_jax.parallel import rules
from llama_jax.training import guard as guard_lib


@flax.struct.dataclass
class TrainState:
  """Attributes:
  step: updates tried so far, an int32 scalar; also the data position.
  params: float32 master weights.
  opt_state: optax's.
  guard: what was left out, and what is usual.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  guard: guard_lib.Guard


def create(params, optimizer: optax.GradientTransformation) -> TrainState:
  """A fresh state around these params."""
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(params),
    guard=guard_lib.create(),
  )


def shardings(
  init_params: Callable[[jax.Array], Any],
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> tuple[TrainState, TrainState]:
  """Shapes of a state without boxes, and a NamedSharding for each leaf.

  Args:
    init_params: key -> params boxed with their logical axes. The optimizer's
      moments are made like the params and so carry the boxes too.
    optimizer: decides the moments.
    mesh: where to.
  """
  boxed = jax.eval_shape(
    lambda: create(init_params(jax.random.key(0)), optimizer)
  )
  logical = nn.get_partition_spec(boxed)
  specs = jax.tree.map(
    lambda axes: rules.spec(tuple(axes)),
    logical,
    is_leaf=lambda one: isinstance(one, jax.sharding.PartitionSpec),
  )
  shapes = jax.tree.map(
    lambda leaf: leaf.unbox(apply_constraint=False) if is_box(leaf) else leaf,
    boxed,
    is_leaf=is_box,
  )
  return shapes, rules.shardings(mesh, specs)


def is_box(leaf) -> bool:
  return isinstance(leaf, nn.meta.AxisMetadata)
