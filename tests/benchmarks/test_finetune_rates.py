"""benchmarks/finetune.py: every objective is measured, on random weights."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import finetune  # noqa: E402


@pytest.mark.slow
def test_every_objective_is_measured(nano):
  plan = finetune.Plan(f"hf:{nano}", 8, 512, rounds=1, dtype="float32")
  runs = finetune.measure(plan)
  assert runs["pretraining"]["of_pretraining"] == 1
  assert all(run["of_pretraining"] > 0 for run in runs.values())
  memory = {name: run["memory_bytes"] for name, run in runs.items()}
  params = memory["pretraining"]["params"]
  assert 2 * params <= memory["pretraining"]["moments"] < 2.1 * params
  # A live reference is another model; a cached one is a few numbers.
  assert memory["DPO, live"]["reference's params"] == params
  assert memory["DPO, cached"]["reference's params"] == 0
  assert 0 < memory["DPO, cached"]["reference's log-probabilities"] < params / 5
