"""The picture shows what it should, for any length of run."""

import json

import matplotlib.image
import numpy as np
import pytest

from llama_jax.training import curves

BLUE, RED = (0x1F, 0x4E, 0x8C), (0xC0, 0x50, 0x4D)


def run(folder, rows):
  """A metrics.jsonl of these rows, what they lack filled in."""
  usual = {"grad_norm": 1.0, "learning_rate": 1e-3, "skipped": 0}
  usual |= {"batch_size": 8, "sequence_length": 64}
  lines = [
    json.dumps({"step": i, "loss": 4.0 - i / len(rows), **usual, **row})
    for i, row in enumerate(rows, start=1)
  ]
  (folder / "metrics.jsonl").write_text("".join(one + "\n" for one in lines))


def drawn(folder):
  path = curves.draw(folder)
  assert path == folder / "curves.png"
  assert not list(folder.glob(".*"))
  return matplotlib.image.imread(path)[..., :3]


def count(picture, color):
  """Pixels of about this color."""
  return int((np.abs(picture - np.array(color) / 255).max(-1) < 0.02).sum())


def test_no_rows(tmp_path):
  assert curves.draw(tmp_path) is None


@pytest.mark.parametrize("size", [1, 3, 400])
def test_a_plain_run(tmp_path, size):
  run(tmp_path, [{}] * size)
  picture = drawn(tmp_path)
  assert picture.shape[0] > 500 and picture.shape[1] > 500
  if size > 1:
    assert count(picture, BLUE) > 500
  assert not count(picture, RED)


def test_sources_get_a_panel_and_skipped_steps_a_mark(tmp_path):
  run(tmp_path, [{}] * 60)
  plain = drawn(tmp_path)
  rows = [{"skipped": int(i >= 20)} for i in range(60)]
  rows[20] |= {"loss": None, "grad_norm": None}
  run(tmp_path, rows)
  marked = drawn(tmp_path)
  assert marked.shape == plain.shape and count(marked, RED) > 30
  for i in range(0, 60, 3):
    rows[i] |= {"loss/books": 3.0, "loss/code": 2.0}
  rows[-1] |= {"heldout_loss/books": 3.1, "heldout_loss": 3.0}
  run(tmp_path, rows)
  assert drawn(tmp_path).shape[0] > plain.shape[0] + 200


def test_what_an_objective_tells_gets_a_panel(tmp_path):
  run(tmp_path, [{}] * 60)
  plain = drawn(tmp_path)
  rows = [{"accuracy": 0.5 + i / 200, "margin": i / 60} for i in range(60)]
  run(tmp_path, rows)
  told = drawn(tmp_path)
  assert told.shape[0] > plain.shape[0] + 200 and not count(told, RED)
  rows[-1]["heldout/accuracy"] = 0.7
  # By rating is not drawn, nor what the held-out rows do not have.
  rows[-1] |= {"accuracy/better": 0.9, "heldout/margin": None}
  run(tmp_path, rows)
  marked = drawn(tmp_path)
  assert marked.shape == told.shape and count(marked, RED) > 5
  # A dot more, left of the first step, and the line to it.
  rows[0]["before/heldout/accuracy"] = 0.5
  run(tmp_path, rows)
  assert count(drawn(tmp_path), RED) > count(marked, RED) + 50


def test_a_students_held_out_loss_stands_beside_its_nll(tmp_path):
  """Not beside what it minimises, which is another quantity."""
  rows = [{"kl": 1.0 - i / 100, "nll": 4.0 - i / 60} for i in range(60)]
  rows[-1] |= {"heldout_loss": 3.5}
  run(tmp_path, rows)
  student = drawn(tmp_path)
  # Two panels more, and the dot is in the lower one.
  top = int(student.shape[0] * 0.35)
  assert not count(student[:top], RED) and count(student[top:], RED) > 5


def test_a_held_out_loss_is_never_beyond_the_picture(tmp_path):
  rows = [{"loss": 2.0 + i % 2 / 10} for i in range(60)]
  rows[29] |= {"heldout_loss": 3.0}
  rows[-1] |= {"heldout_loss": 3.1}
  run(tmp_path, rows)
  assert count(drawn(tmp_path), RED) > 100


def test_rows_that_say_almost_nothing(tmp_path):
  """All losses not finite, or a run of an older version."""
  run(tmp_path, [{"loss": None, "grad_norm": None, "skipped": 3}] * 4)
  drawn(tmp_path)
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n' * 3)
  drawn(tmp_path)


def test_a_long_run_is_thinned_and_its_spikes_stay(tmp_path):
  rows = [{"loss": 3.0} for _ in range(20_000)]
  rows[12_345]["loss"] = 9.0
  run(tmp_path, rows)
  drawn(tmp_path)
  columns = curves._columns(tmp_path / "metrics.jsonl")
  thin = curves._thin(columns["step"], columns["loss"])
  assert len(thin[0]) <= curves.MOST_POINTS and thin[0][-1] == 20_000


@pytest.mark.parametrize("width", [2, 5, 40])
def test_the_trailing_mean_by_brute_force(width):
  rng = np.random.default_rng(0)
  line = rng.normal(size=30)
  line[[0, 1, 7, 29]] = np.nan
  line[10:16] = np.nan
  for i, mean in enumerate(curves._mean(line, width)):
    part = line[max(0, i + 1 - width) : i + 1]
    part = part[~np.isnan(part)]
    if len(part):
      assert mean == pytest.approx(part.mean())
    else:
      assert np.isnan(mean)
