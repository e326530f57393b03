"""benchmarks/peer_pretrain.py: what it hands over, and how it compares."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from llama_jax import checkpoint, errors, experiment, shell
from llama_jax import run as run_lib
from llama_jax.checkpoint import names
from llama_jax.data import packing

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peer_pretrain  # noqa: E402

STEPS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory, python_source, tokenizer_folder):
  """A nano run, its held-out rows made up."""
  folder = tmp_path_factory.mktemp("run")
  (folder / "source.txt").write_text(python_source[0])
  config = shell.load_config(str(ROOT / "configs/nano.py"))
  config.data.text = str(folder / "source.txt")
  config.data.tokenizer = str(tokenizer_folder)
  config.data.separate_documents = True
  config.training.steps = 8
  config.training.batch_size = 8
  config.evaluation.every = 2
  config.evaluation.rows = 2
  rng = np.random.default_rng(0)
  length = config.data.sequence_length
  documents = [
    packing.Document(rng.integers(512, size=n).tolist(), n)
    for n in (20, 90, 150, 31)
  ]
  rows = list(packing.pack(documents, length))
  made = run_lib.set_up(experiment.read(config), folder)
  return dataclasses.replace(made, heldout={"books": rows})


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
  folder = tmp_path_factory.mktemp("exchange")
  peer_pretrain.export(run, folder, STEPS)
  return folder


def arrays(file):
  with np.load(file, allow_pickle=False) as found:
    return dict(found)


def test_the_batches_are_the_runs(run, exported):
  for step in range(STEPS):
    found = arrays(exported / "steps" / f"{step}.npz")
    want = run.batches.get(step)
    assert set(found) == set(peer_pretrain.FIELDS)
    for name, array in found.items():
      np.testing.assert_array_equal(array, want[name])
      assert array.dtype == want[name].dtype
  assert len(list((exported / "steps").iterdir())) == STEPS


def test_the_first_params_are_the_runs(run, exported):
  loaded = checkpoint.load(f"hf:{exported / 'init'}").params
  with jax.set_mesh(run.devices):
    want = names.flatten(run.first().params)
  found = names.flatten(loaded)
  assert found.keys() == want.keys()
  for path, leaf in want.items():
    np.testing.assert_array_equal(np.asarray(found[path]), leaf, err_msg=path)


def test_the_heldout_pieces_and_the_recipe(run, exported):
  found = arrays(exported / "heldout" / "books.npz")
  want = [
    packing.inputs(row, 0, run.ramp.row_length, True)
    for row in run.heldout["books"][:2]
  ]
  for name in peer_pretrain.FIELDS:
    np.testing.assert_array_equal(found[name], [one[name] for one in want])
  recipe = json.loads((exported / "recipe.json").read_text())
  assert recipe["rates"] == [run.rate(step) for step in range(STEPS)]
  # Every second step, and the last that the peer makes.
  assert recipe["evaluate_after"] == [2, 3]
  assert recipe["optimizer"]["b2"] == 0.95
  tokens = 8 * run.ramp.row_length
  assert recipe["tokens"] == [tokens, 2 * tokens, 3 * tokens]


def test_more_steps_later_and_another_config_never(run, exported):
  before = (exported / "steps" / "0.npz").stat().st_mtime_ns
  peer_pretrain.export(run, exported, STEPS + 1)
  assert (exported / "steps" / "0.npz").stat().st_mtime_ns == before
  assert (exported / "steps" / f"{STEPS}.npz").is_file()
  (exported / "steps" / f"{STEPS}.npz").unlink()
  peer_pretrain.export(run, exported, STEPS)
  training = dataclasses.replace(run.asked.training, seed=7)
  asked = dataclasses.replace(run.asked, training=training)
  other = dataclasses.replace(run, asked=asked)
  with pytest.raises(errors.UserError, match="another config"):
    peer_pretrain.export(other, exported, STEPS)


def row(step, held, **more):
  return {"step": step, "tokens_seen": 100 * step, "skipped": 1} | {
    "loss": 3.0,
    "heldout_loss": held,
    "heldout_loss/books": held,
    **more,
  }


def test_comparing_by_hand():
  ours = [row(1, 4.0), row(2, 3.03), {"step": 3}, row(4, 2.0), row(5, 1.98)]
  peer = [row(2, 3.0), row(3, 2.5), row(5, 2.0)]
  result = peer_pretrain.compare(ours, peer)
  assert [one["step"] for one in result["rows"]] == [2, 5]
  assert result["rows"][0]["tokens_seen"] == 200
  assert result["rows"][0]["heldout_loss/books"] == pytest.approx(
    [3.03, 3.0, 0.01]
  )
  assert result["rows"][1]["loss"] == [3.0, 3.0, 0.0]
  assert result["worst"] == pytest.approx(0.01)
  assert result["last"] == pytest.approx(0.01)
  assert result["skipped"] == 1
  shown = peer_pretrain.table(result)
  assert "3.0300 3.0000 +1.00%" in shown and "1.9800 2.0000 -1.00%" in shown
  with pytest.raises(errors.UserError, match="no step"):
    peer_pretrain.compare(ours, [row(9, 1.0)])
