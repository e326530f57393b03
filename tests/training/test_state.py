"""The state's shapes and shardings say what the state itself will be."""

import functools

import jax
import numpy as np
import optax

from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes
from llama_jax.parallel import mesh
from llama_jax.training import state as state_lib


def test_shapes_and_shardings_match_the_state(random_params):
  decoder = decoder_lib.Decoder(sizes.get("nano"))
  optimizer = optax.adamw(1e-3)
  shapes, placed = state_lib.shardings(
    functools.partial(decoder_lib.init, decoder),
    optimizer,
    mesh.make(mesh.ParallelConfig(2, 2, 2)),
  )
  state = state_lib.create(random_params(decoder.config), optimizer)
  assert jax.tree.structure(shapes) == jax.tree.structure(state)
  assert jax.tree.structure(placed) == jax.tree.structure(state)
  for shape, leaf in zip(
    jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True
  ):
    assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
  # Scalars are everywhere.
  assert placed.step.is_fully_replicated
  assert placed.guard.norm.is_fully_replicated


def test_a_fresh_state_has_done_nothing():
  params = {"kernel": np.ones(3, np.float32)}
  state = state_lib.create(params, optax.adamw(1e-3))
  assert (state.step, state.guard.skipped, state.guard.seen) == (0, 0, 0)
  assert state.params is params
  for leaf in jax.tree.leaves(state.opt_state):
    assert not np.any(leaf)
