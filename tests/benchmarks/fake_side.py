"""A side of the CPU benchmark that computes nothing and says what it likes."""

import pathlib
import sys

import numpy as np

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cpu_worker  # noqa: E402

# How often slower, and how far off, this side pretends to be.
SLOWNESS = 1.0
OFFSET = 0.0


class Fake:
  def hello(self):
    print("libraries may print to standard output")
    return {"library": "fake", "threads": 1, "versions": {}}

  def load(self, weights):
    return {"config": {"num_layers": 2}, "weights": weights}

  def text(self, count):
    return {"ids": list(range(count))}

  def export(self, folder):
    return {}

  def rates(self):
    return {"copy, GB/s": 10.0 / SLOWNESS}

  def logits(self, ids, file):
    np.save(file, np.full((len(ids), len(ids[0]), 3), OFFSET, np.float32))
    return {}

  def warm(self, ids, new, dtype):
    return {"choice": "none"}

  def prefill(self, ids, dtype):
    return {"seconds": SLOWNESS}

  def decode(self, ids, new, dtype):
    return {"tokens": [[1] * new] * len(ids), "first": 1.0, "rest": SLOWNESS}

  def start_training(self, optimizer):
    return {}

  def train_step(self, ids, dtype):
    half = 0.5 if dtype == "bfloat16" else 1.0
    return {"seconds": SLOWNESS * half, "loss": 2.0, "grad_norm": 1.0}

  def speak(self, weights, ids, new, dtype, began, cache):
    names = ("import", "first_token", "decoded", "compile", "set_up")
    return dict.fromkeys(names, SLOWNESS)

  def learn(self, weights, ids, steps, optimizer, dtype, began, cache):
    names = ("first_step", "compile", "set_up", "loss", "grad_norm")
    return dict.fromkeys(names, 1.0) | {"peak": SLOWNESS * 1e9}


if __name__ == "__main__":
  cpu_worker.serve(Fake())
