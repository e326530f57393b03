"""The recipe: AdamW in NumPy, who decays, what is refused."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.model import sizes
from llama_jax.training import optimizer as optimizer_lib

RECIPE = optimizer_lib.OptimizerConfig(
  peak_lr=0.02,
  schedule="cosine",
  warmup_steps=4,
  final_lr_fraction=0.1,
  decay_fraction=0.0,
  b1=0.9,
  b2=0.95,
  eps=1e-5,
  weight_decay=0.3,
  clip_norm=0.8,
  moments_dtype="float32",
)


def rate(step, steps, warmup, peak=0.02, final=0.1):
  if step < warmup:
    return peak * (step + 1) / warmup
  part = min((step - warmup) / (steps - warmup), 1)
  return peak * (final + (1 - final) * (1 + math.cos(math.pi * part)) / 2)


def test_matrices_decay_and_scales_do_not(random_params):
  config = dataclasses.replace(sizes.get("nano"), tied_embeddings=False)
  mask = optimizer_lib.decayed(random_params(config))
  flat, _ = jax.tree_util.tree_flatten_with_path(mask)
  by_path = {"/".join(k.key for k in path): value for path, value in flat}
  assert len(by_path) == 12
  for path, value in by_path.items():
    assert value == (not path.endswith("scale")), path


def numpy_adamw(params, gradients):
  """Loshchilov and Hutter (arXiv:1711.05101) with the norm clipped first."""
  mu = {name: 0.0 for name in params}
  nu = {name: 0.0 for name in params}
  for step, gradient in enumerate(gradients):
    norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
    lr = rate(step, 10, 4)
    for name, value in params.items():
      g = gradient[name] * min(1, RECIPE.clip_norm / norm)
      mu[name] = 0.9 * mu[name] + 0.1 * g
      nu[name] = 0.95 * nu[name] + 0.05 * g**2
      m = mu[name] / (1 - 0.9 ** (step + 1))
      v = nu[name] / (1 - 0.95 ** (step + 1))
      decay = 0.0 if name == "scale" else RECIPE.weight_decay
      moved = m / (np.sqrt(v) + RECIPE.eps) + decay * value
      params = params | {name: value - lr * moved}
  return params


def ours(recipe, start, gradients):
  """Where the recipe leads from start."""
  optimizer = optimizer_lib.make(recipe)
  params = {name: np.float32(a) for name, a in start.items()}
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for step, gradient in enumerate(gradients):
    gradient = {name: np.float32(g) for name, g in gradient.items()}
    direction, state = update(gradient, state, params)
    for leaf in jax.tree.leaves(state):
      assert not leaf.ndim or leaf.dtype == recipe.moments_dtype
    params = {
      name: params[name] - np.float32(rate(step, 10, 4)) * direction[name]
      for name in params
    }
  return params


def a_start_and_gradients():
  rng = np.random.default_rng(0)
  start = {"kernel": rng.normal(size=(3, 4)), "scale": rng.normal(size=4)}
  # Norms from below the clip to far above it.
  gradients = [
    {name: by * rng.normal(size=a.shape) for name, a in start.items()}
    for by in (0.01, 1.0, 30.0, 0.1, 1.0, 5.0)
  ]
  return start, gradients


def test_equals_adamw_in_numpy():
  start, gradients = a_start_and_gradients()
  params = ours(RECIPE, start, gradients)
  want = numpy_adamw(start, gradients)
  for name in want:
    np.testing.assert_allclose(params[name], want[name], rtol=1e-4, atol=1e-6)


def test_moments_in_bfloat16_lead_nearly_there():
  """Their rounding, 1 in 256, moves a step by about as much."""
  start, gradients = a_start_and_gradients()
  recipe = dataclasses.replace(RECIPE, moments_dtype="bfloat16")
  rounded = ours(recipe, start, gradients)
  want = numpy_adamw(start, gradients)
  for name in want:
    moved = np.abs(want[name] - start[name]).max()
    np.testing.assert_allclose(rounded[name], want[name], atol=moved / 50)
    assert np.abs(rounded[name] - want[name]).max() > 1e-5 * moved


@pytest.mark.parametrize(
  "field, value",
  [
    ("peak_lr", -1.0),
    ("warmup_steps", -1),
    ("warmup_fraction", 1.5),
    ("final_lr_fraction", 1.5),
    ("b1", 1.5),
    ("eps", float("nan")),
    ("weight_decay", -0.1),
    ("clip_norm", 0.0),
    ("decay_fraction", 2.0),
    ("schedule", "cosin"),
    ("moments_dtype", "float16"),
  ],
)
def test_refusals_name_the_knob(field, value):
  with pytest.raises(errors.ConfigError, match=rf"optimizer\.{field}="):
    dataclasses.replace(RECIPE, **{field: value})
