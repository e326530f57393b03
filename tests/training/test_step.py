"""One update: accumulation, skipping, clipping."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.checkpoint import names
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes
from llama_jax.objectives import next_token
from llama_jax.training import optimizer as optimizer_lib
from llama_jax.training import state as state_lib
from llama_jax.training import step as step_lib

RECIPE = optimizer_lib.OptimizerConfig(
  peak_lr=1e-2,
  warmup_steps=2,
  final_lr_fraction=0.1,
  b1=0.9,
  b2=0.95,
  eps=1e-8,
  weight_decay=0.1,
  clip_norm=1.0,
)
STEPS = 10


def line(params, batch, frozen=None):
  """Least squares: sums and counts by a mask, as objectives do."""
  error = batch["x"] @ params["kernel"] - batch["y"]
  total = jnp.sum(error**2 * batch["mask"])
  return total, (batch["mask"].sum(), {})


def line_case(rows=12):
  rng = np.random.default_rng(0)
  params = {"kernel": jnp.asarray(rng.normal(size=3), jnp.float32)}
  batch = {
    "x": rng.normal(size=(1, rows, 3)).astype(np.float32),
    "y": rng.normal(size=(1, rows)).astype(np.float32),
    # The first rows count almost nothing, the last all: quarters of a batch
    # hold 1, 1, 2 and 3 scored rows.
    "mask": np.zeros((1, rows), np.float32),
  }
  batch["mask"][0, [1, 5, 7, 8, 9, 10, 11]] = 1
  return params, batch


def split(batch, parts):
  return jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[2:]), batch)


def make_update(recipe=RECIPE, objective=line):
  optimizer = optimizer_lib.make(recipe, STEPS)
  schedule = optimizer_lib.schedule(recipe, STEPS)
  return optimizer, jax.jit(step_lib.make(objective, optimizer, schedule))


def adam(opt_state):
  is_adam = lambda leaf: isinstance(leaf, optax.ScaleByAdamState)  # noqa: E731
  leaves = jax.tree.leaves(opt_state, is_leaf=is_adam)
  return next(leaf for leaf in leaves if is_adam(leaf))


def line_gradient(params, batch):
  """By hand, over all scored rows of the whole batch."""
  x, y, mask = (np.float64(batch[name][0]) for name in ("x", "y", "mask"))
  error = x @ np.float64(params["kernel"]) - y
  loss = (error**2 * mask).sum() / mask.sum()
  return loss, 2 * (x * (error * mask)[:, None]).sum(0) / mask.sum()


@pytest.mark.parametrize("parts", [1, 4, 6])
def test_microbatches_of_unequal_counts_equal_one_batch(parts):
  params, batch = line_case()
  recipe = dataclasses.replace(RECIPE, clip_norm=float("inf"))
  optimizer, update = make_update(recipe)
  state, metrics = update(
    state_lib.create(params, optimizer), split(batch, parts)
  )
  loss, gradient = line_gradient(params, batch)
  assert metrics["tokens"] == 7
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
  np.testing.assert_allclose(
    metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-6
  )
  np.testing.assert_allclose(
    adam(state.opt_state).mu["kernel"], 0.1 * gradient, rtol=1e-5
  )


def test_microbatches_of_the_model_equal_one_batch(random_params):
  decoder = decoder_lib.Decoder(sizes.get("nano"))
  params = random_params(decoder.config)
  rng = np.random.default_rng(1)
  B, T = 4, 12
  ids = rng.integers(512, size=(1, B, T), dtype=np.int32)
  mask = np.zeros((1, B, T), np.float32)
  for row, count in enumerate((1, 12, 3, 7)):
    mask[0, row, :count] = 1
  batch = {
    "tokens": ids,
    "targets": np.roll(ids, -1, axis=-1),
    "positions": np.tile(np.arange(T, dtype=np.int32), (1, B, 1)),
    "segments": np.ones_like(ids),
    "loss_mask": mask,
  }
  objective = next_token.make(
    lambda params, *args: decoder.apply(
      {"params": params}, *args, method="loss_sum"
    )
  )
  accumulate = jax.jit(functools.partial(step_lib.accumulate, objective))
  total, count, gradients = accumulate(params, split(batch, 4))
  want_total, want_count, want = accumulate(params, batch)
  assert count == want_count == 23
  np.testing.assert_allclose(total, want_total, rtol=1e-6)
  want = names.flatten(want)
  for path, gradient in names.flatten(gradients).items():
    scale = np.abs(want[path]).max()
    np.testing.assert_allclose(
      gradient, want[path], atol=1e-5 * scale, err_msg=path
    )


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_changes_nothing(poison):
  """1e30 squares to infinity only inside: the loss itself is what tells."""
  params, batch = line_case()
  optimizer, update = make_update()
  state, _ = update(state_lib.create(params, optimizer), batch)
  bad = dict(batch, y=batch["y"].copy())
  bad["y"][0, 5] = poison
  after, metrics = update(state, bad)
  assert bits(after.params) == bits(state.params)
  assert bits(after.opt_state) == bits(state.opt_state)
  assert (int(after.step), int(after.skipped)) == (2, 1)
  assert metrics["skipped"] == 1
  # It also leaves the schedule where it was, and the next step goes on.
  good, metrics = update(after, batch)
  want, want_metrics = update(state, batch)
  assert bits(good.params) == bits(want.params)
  assert metrics["learning_rate"] == want_metrics["learning_rate"]
  assert (int(good.step), int(good.skipped)) == (3, 1)


def test_clipping():
  params, batch = line_case()
  _, gradient = line_gradient(params, batch)
  norm = np.linalg.norm(gradient)
  assert norm > 0.5
  for clip in (0.25, 1e3):
    recipe = dataclasses.replace(RECIPE, clip_norm=clip)
    optimizer, update = make_update(recipe)
    state, metrics = update(state_lib.create(params, optimizer), batch)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(
      adam(state.opt_state).mu["kernel"],
      0.1 * gradient * min(1, clip / norm),
      rtol=1e-5,
    )


def test_a_batch_without_scored_tokens_is_no_division_by_zero():
  params, batch = line_case()
  optimizer, update = make_update()
  batch["mask"][:] = 0
  state, metrics = update(state_lib.create(params, optimizer), batch)
  assert metrics["loss"] == 0 and state.skipped == 0
  assert np.isfinite(state.params["kernel"]).all()
