"""Where a step stands, against walking there step by step."""

import pytest

from llama_jax import errors
from llama_jax.data import ramp as ramp_lib

Stage = ramp_lib.Stage


def walk(stages, row_length, steps):
  """(stage, tokens, row) before each step, one at a time."""
  tokens = 0
  for _ in range(steps):
    stage = [s for s in stages if s.from_tokens <= tokens][-1]
    yield stage, tokens, tokens // row_length
    tokens += stage.batch_size * stage.sequence_length


def test_every_step_stands_where_walking_leads():
  stages = [
    Stage(0, 4, 16, 1),
    Stage(200, 4, 32, 2),  # in the middle of a batch of 64
    Stage(1000, 12, 32, 3),
  ]
  ramp = ramp_lib.Ramp(stages, 64)
  seen = set()
  for step, (stage, tokens, row) in enumerate(walk(stages, 64, 40)):
    place = ramp.at(step)
    assert (place.stage, place.tokens, place.row) == (stage, tokens, row)
    assert place.rows * 64 == stage.batch_size * stage.sequence_length
    assert place.cuts * stage.sequence_length == 64
    seen.add(stage)
  assert seen == set(stages)


def test_no_row_is_skipped_or_read_twice():
  ramp = ramp_lib.Ramp([Stage(0, 8, 32, 1), Stage(500, 8, 64, 1)], 64)
  at = 0
  for step in range(30):
    place = ramp.at(step)
    assert place.row == at
    at += place.rows


def test_llama3():
  """4M at 4,096, 8M at 8,192 after 252M tokens, 16M after 2.87T."""
  ramp = ramp_lib.Ramp(
    [
      Stage(0, 1024, 4096, 1),
      Stage(252_000_000, 1024, 8192, 1),
      Stage(2_870_000_000_000, 2048, 8192, 1),
    ],
    8192,
  )
  # 252M / 4,194,304 = 60.08
  assert ramp.at(60).stage.sequence_length == 4096
  assert ramp.at(61).stage.sequence_length == 8192
  assert ramp.at(61).tokens == 61 * 4096 * 1024
  assert ramp.at(400_000).stage.batch_size == 2048


@pytest.mark.parametrize(
  "stages, row_length, said",
  [
    ([Stage(0, 4, 48, 1)], 64, "48"),  # 48 does not divide 64
    ([Stage(0, 3, 32, 1)], 64, "multiple of 2"),
    ([Stage(0, 4, 64, 3)], 64, r"training\.accumulation=3"),
    ([Stage(0, 4, 64, 1), Stage(0, 8, 64, 1)], 64, "no step"),
    (
      [Stage(0, 4, 64, 1), Stage(512, 8, 64, 1), Stage(300, 4, 64, 1)],
      64,
      r"training\.ramp",
    ),
    ([Stage(0, 4, 128, 1)], 64, "128"),
  ],
)
def test_refusals(stages, row_length, said):
  with pytest.raises(errors.ConfigError, match=said):
    ramp_lib.Ramp(stages, row_length)
