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
from llama_jax.parallel import mesh
from llama_jax.training import guard as guard_lib
from llama_jax.training import optimizer as optimizer_lib
from llama_jax.training import state as state_lib
from llama_jax.training import step as step_lib

RECIPE = optimizer_lib.OptimizerConfig(
  peak_lr=1e-2,
  schedule="cosine",
  warmup_steps=2,
  final_lr_fraction=0.1,
  decay_fraction=0.0,
  b1=0.9,
  b2=0.95,
  eps=1e-8,
  weight_decay=0.1,
  clip_norm=1.0,
  moments_dtype="float32",
)


def line(params, batch, frozen=None):
  """Least squares: sums and counts by a mask, as objectives do."""
  error = batch["x"] @ params["kernel"] - batch["y"]
  total = jnp.sum(error**2 * batch["mask"])
  return total, (batch["mask"].sum(), {})


def scaled(params, batch, frozen=None):
  """The same, its loss and gradient times what the batch says."""
  total, aux = line(params, batch)
  return total * batch["by"].mean(), aux


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


def make_update(recipe=RECIPE, objective=line, spike_factor=0):
  """(optimizer, (state, batch) -> (state, metrics)) at the peak rate."""
  optimizer = optimizer_lib.make(recipe)
  update = jax.jit(step_lib.make(objective, optimizer, spike_factor))
  return optimizer, lambda *args: update(*args, np.float32(recipe.peak_lr))


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
  assert metrics["scored"] == 7
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
    "sources": np.array([[2, 0, 2, 0]], np.int32),
  }
  objective = next_token.make(
    lambda params, *args: decoder.apply(
      {"params": params}, *args, 0.0, method="loss_sum"
    ),
    num_sources=3,
  )
  accumulate = jax.jit(functools.partial(step_lib.accumulate, objective))
  (total, (count, sums)), gradients = accumulate(params, split(batch, 4))
  (want_total, (want_count, _)), want = accumulate(params, batch)
  assert count == want_count == 23
  np.testing.assert_allclose(total, want_total, rtol=1e-6)
  # Rows 1 and 3 are source 0's, rows 0 and 2 source 2's.
  losses, tokens = sums["source_loss"]
  assert tokens.tolist() == [12 + 7, 0, 1 + 3]
  for source, rows in ((0, [1, 3]), (2, [0, 2])):
    alone = jax.tree.map(lambda a, r=rows: a[:, r], batch)
    (part, _), _ = accumulate(params, alone)
    np.testing.assert_allclose(losses[source], part, rtol=1e-5)
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
  assert (int(after.step), int(after.guard.skipped)) == (2, 1)
  assert metrics["skipped"] == metrics["skipped_in_row"] == 1
  # And the next step goes on as if it had not been.
  good, metrics = update(after, batch)
  want, _ = update(state, batch)
  assert bits(good.params) == bits(want.params)
  assert (int(good.step), int(good.guard.skipped)) == (3, 1)
  assert metrics["skipped_in_row"] == 0


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
  assert metrics["loss"] == 0 and state.guard.skipped == 0
  assert np.isfinite(state.params["kernel"]).all()


@pytest.mark.parametrize("factor", [0, 10.0])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_spike_is_left_out(factor, microbatches):
  """R9: a hundred times the usual loss and gradient, in one microbatch."""
  params, batch = line_case()
  optimizer, update = make_update(objective=scaled, spike_factor=factor)
  batch = split(batch, microbatches)
  batch["by"] = np.ones((microbatches, 1), np.float32)
  state = state_lib.create(params, optimizer)
  for _ in range(guard_lib.FIRST + 2):
    state, metrics = update(state, batch)
  assert metrics["skipped"] == 0
  spike = dict(batch, by=batch["by"].copy())
  spike["by"][-1] = 100
  before, counts = bits((state.params, state.opt_state)), []
  for one in (spike, spike, batch):
    state, metrics = update(state, one)
    counts.append((int(metrics["skipped"]), int(metrics["skipped_in_row"])))
    if factor and one is spike:
      assert bits((state.params, state.opt_state)) == before
  assert counts == ([(1, 1), (2, 2), (2, 0)] if factor else [(0, 0)] * 3)
  assert bits(state.params) != before[: len(bits(state.params))]


def test_what_is_usual_is_a_trailing_mean():
  """Against the mean of the first, then NumPy's exponential one."""
  guard, usual = guard_lib.create(), 0.0
  rng = np.random.default_rng(0)
  for seen in range(120):
    loss = 2 + rng.random()
    good, guard = guard_lib.judge(
      guard, jnp.float32(loss), jnp.float32(1.0), 10.0
    )
    assert good
    share = max(1 / (seen + 1), 0.02)
    usual = (1 - share) * usual + share * loss
    np.testing.assert_allclose(guard.loss, usual, rtol=1e-5)
  np.testing.assert_allclose(guard.norm, 1.0, rtol=1e-5)
  for loss, norm, want in (
    (24.0, 1.0, True),
    (26.0, 1.0, False),
    (2.0, 9.9, True),
    (2.0, 10.2, False),
    (np.nan, 1.0, False),
    (2.0, np.inf, False),
  ):
    good, after = guard_lib.judge(
      guard, jnp.float32(loss), jnp.float32(norm), 10.0
    )
    assert bool(good) == want, (loss, norm)
    if not want:
      assert (after.loss, after.norm, after.seen) == (
        guard.loss,
        guard.norm,
        guard.seen,
      )


def test_the_checksum_sees_every_bit():
  rng = np.random.default_rng(0)
  tree = {
    "a": rng.normal(size=(3, 2, 2)).astype(np.float32),
    "b": rng.normal(size=7).astype(np.float32),
  }
  checksum = jax.jit(step_lib.checksum)
  known = {tuple(map(int, checksum(tree)))}
  for name, leaf in tree.items():
    for place in range(leaf.size):
      for bit in (0, 5, 22, 31):
        words = leaf.copy().view(np.uint32)
        words.flat[place] ^= np.uint32(1 << bit)
        changed = tree | {name: words.view(np.float32)}
        known.add(tuple(map(int, checksum(changed))))
  assert len(known) == 1 + 4 * (12 + 7)
  # Two values that change places, and two arrays.
  swapped = tree | {"b": tree["b"][[1, 0, 2, 3, 4, 5, 6]]}
  known.add(tuple(map(int, checksum(swapped))))
  twins = {"a": tree["b"], "b": tree["b"][::-1].copy()}
  known.add(tuple(map(int, checksum(twins))))
  twins = {"a": twins["b"], "b": twins["a"]}
  known.add(tuple(map(int, checksum(twins))))
  assert len(known) == 1 + 4 * (12 + 7) + 3


def test_the_checksum_by_hand():
  """In Python's whole numbers; stacked layers count on from one another."""
  rng = np.random.default_rng(1)
  leaf = rng.normal(size=(3, 2, 5)).astype(np.float32)
  words = [int(word) for word in leaf.view(np.uint32).ravel()]
  one = sum(word * (2 * i + 1) for i, word in enumerate(words))
  two = sum(
    (word ^ (word >> 15)) * (i * 0x9E3779B2 + 1) for i, word in enumerate(words)
  )
  want = [3 * one % 2**32, 3 * two % 2**32]
  assert step_lib.checksum({"a": leaf}).tolist() == want
  assert step_lib.checksum({"a": leaf.reshape(6, 5)}).tolist() == want


def test_the_checksum_is_the_same_on_any_mesh():
  devices = mesh.make(mesh.ParallelConfig(2, 2, 2))
  leaf = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
  want = jax.jit(step_lib.checksum)({"a": leaf})
  for spec in (("fsdp", "tensor"), (("data", "fsdp"), None), (None, "tensor")):
    placed = jax.device_put(leaf, jax.NamedSharding(devices, jax.P(*spec)))
    got = jax.jit(step_lib.checksum)({"a": placed})
    np.testing.assert_array_equal(got, want)


def test_layer_norms_are_told_on_request():
  params, batch = line_case()
  params = {"kernel": params["kernel"], "layers": {"x": jnp.ones((2, 3))}}

  def objective(params, batch, frozen=None):
    total, aux = line(params, batch)
    weight = jnp.array([[1.0], [4.0]])
    return total + 7 * jnp.sum(weight * params["layers"]["x"]), aux

  optimizer = optimizer_lib.make(RECIPE)
  update = jax.jit(step_lib.make(objective, optimizer, 0, layer_norms=True))
  _, metrics = update(
    state_lib.create(params, optimizer), batch, np.float32(0.0)
  )
  # Seven scored rows divide it again.
  np.testing.assert_allclose(
    metrics["layer_grad_norms"]["layers/x"],
    np.sqrt(3) * np.array([1, 4]),
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    metrics["layer_param_norms"]["layers/x"], np.sqrt([3, 3]), rtol=1e-6
  )
  assert metrics["layer_grad_norms"]["kernel"].shape == ()
