"""The learning rate, by hand and against optax."""

import dataclasses
import math

import numpy as np
import optax
import pytest

from llama_jax.training import schedule as schedule_lib


@dataclasses.dataclass(frozen=True)
class Shape:
  peak_lr: float = 0.02
  schedule: str = "cosine"
  warmup_steps: int = 4
  final_lr_fraction: float = 0.1
  decay_fraction: float = 0.2


def rates(shape, steps, batch=32):
  """Of a run whose steps all have `batch` tokens."""
  warmup = min(shape.warmup_steps, steps) * batch
  return [
    schedule_lib.learning_rate(shape, s, s * batch, warmup, steps * batch)
    for s in range(steps + 1)
  ]


@pytest.mark.parametrize("steps, warmup", [(20, 4), (20, 0), (7, 1), (30, 29)])
def test_cosine_is_that_of_optax(steps, warmup):
  shape = Shape(warmup_steps=warmup)
  cosine = optax.cosine_decay_schedule(0.02, steps - warmup, alpha=0.1)
  want = [
    0.02 * (s + 1) / warmup if s < warmup else float(cosine(s - warmup))
    for s in range(steps + 1)
  ]
  np.testing.assert_allclose(rates(shape, steps), want, rtol=1e-5)


@pytest.mark.parametrize(
  "shape, want",
  [
    (Shape(), {0: 0.005, 3: 0.02, 4: 0.02, 12: 0.011, 20: 0.002}),
    (Shape(schedule="linear"), {3: 0.02, 4: 0.02, 12: 0.011, 20: 0.002}),
    (
      Shape(schedule="linear", final_lr_fraction=0.0),
      {4: 0.02, 8: 0.015, 20: 0.0},
    ),
    (Shape(schedule="constant"), {0: 0.005, 4: 0.02, 20: 0.02}),
    (
      Shape(schedule="wsd", final_lr_fraction=0.0),
      {0: 0.005, 4: 0.02, 16: 0.02, 18: 0.01, 20: 0.0},
    ),
    # A decay that would begin within the warmup begins after it.
    (
      Shape(schedule="wsd", decay_fraction=1.0, final_lr_fraction=0.0),
      {3: 0.02, 4: 0.02, 12: 0.01, 20: 0.0},
    ),
  ],
)
def test_values_by_hand(shape, want):
  ours = rates(shape, 20)
  for step, rate in want.items():
    assert math.isclose(ours[step], rate, rel_tol=1e-9, abs_tol=1e-12), step


def test_it_is_counted_in_tokens():
  """Half of the tokens after the warmup is the middle of the cosine, however
  few steps they were in."""
  shape = Shape(warmup_steps=10)
  total, warmup = 1_000_000, 10_000
  half = (total + warmup) // 2
  for step in (11, 400):
    rate = schedule_lib.learning_rate(shape, step, half, warmup, total)
    assert math.isclose(rate, 0.011, rel_tol=1e-9)


def test_warmup_longer_than_the_run():
  ours = rates(Shape(warmup_steps=100), 10)[:10]
  assert ours == sorted(ours) and ours[0] > 0 and ours[-1] <= 0.02
