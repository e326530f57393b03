"""metrics.jsonl outlives kills and resumes; the curves are drawn."""

import json

import matplotlib.image
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.training import metrics as metrics_lib


def values(step):
  return {
    "loss": np.float32(5 - step / 10),
    "grad_norm": np.float32(1),
    "learning_rate": np.float32(1e-3),
    "tokens": np.float32(64),
    "skipped": np.int32(0),
  }


def write(folder, first, last, steps=9):
  metrics = metrics_lib.Metrics(folder, first, steps)
  for step in range(first + 1, last + 1):
    metrics.add(step, values(step))
  metrics.close()


def steps_of(folder):
  return [row["step"] for row in metrics_lib.read(folder / "metrics.jsonl")]


def test_one_row_a_step(tmp_path):
  write(tmp_path, 0, 5)
  rows = metrics_lib.read(tmp_path / "metrics.jsonl")
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
  assert rows[1]["loss"] == float(np.float32(4.8))
  assert rows[1]["tokens_per_second"] > 0
  assert list((tmp_path / "tensorboard").iterdir())


def test_a_resume_drops_later_rows(tmp_path):
  """Five were written and the checkpoint is of step 3."""
  write(tmp_path, 0, 5)
  write(tmp_path, 3, 6)
  assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
  write(tmp_path, 0, 2)
  assert steps_of(tmp_path) == [1, 2]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_row_that_a_kill_cut_short(tmp_path, cut):
  write(tmp_path, 0, 4)
  file = tmp_path / "metrics.jsonl"
  file.write_bytes(file.read_bytes()[:-cut])
  kept = steps_of(tmp_path)
  # Without its newline alone the last row is still whole.
  assert kept == ([1, 2, 3, 4] if cut == 1 else [1, 2, 3])
  write(tmp_path, 3, 5)
  assert steps_of(tmp_path) == [1, 2, 3, 4, 5]
  for line in file.read_text().splitlines():
    json.loads(line)


def test_damage_inside_is_told(tmp_path):
  write(tmp_path, 0, 3)
  file = tmp_path / "metrics.jsonl"
  lines = file.read_text().splitlines()
  file.write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + "\n")
  with pytest.raises(errors.BadFileError, match=r"metrics\.jsonl, line 2"):
    metrics_lib.read(file)


def test_curves_are_drawn(tmp_path):
  assert metrics_lib.draw(tmp_path) is None
  write(tmp_path, 0, 9)
  path = metrics_lib.draw(tmp_path)
  assert path == tmp_path / "curves.png"
  picture = matplotlib.image.imread(path)
  assert picture.shape[0] > 300 and picture.shape[1] > 300
  # The mean's dark blue (#1f4e8c) is there.
  blue = np.array([0x1F, 0x4E, 0x8C]) / 255
  near = np.abs(picture[..., :3] - blue.reshape(1, 1, 3)).max(-1) < 0.02
  assert near.sum() > 100
  assert not list(tmp_path.glob(".*"))
