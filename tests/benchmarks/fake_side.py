"""A side of the CPU benchmarks that computes nothing and says what it likes."""

import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

import cpu_worker  # noqa: E402

# A model of 2 x (2 x 4 x 2 x 2 + 3 x 4 x 8) + 4 x 32 = 384 weights.
CONFIG = {
  "num_layers": 2,
  "embed_dim": 4,
  "num_heads": 1,
  "num_kv_heads": 1,
  "head_dim": 2,
  "mlp_dim": 8,
  "vocab_size": 32,
  "head": "words",
}


class Fake:
  """Attributes:
  slowness: seconds of what takes the others one.
  offset: how far off its logits are.
  lossy: nats that 8 bits lose.
  said: what hello and warm tell besides.
  """

  def __init__(self, slowness=1.0, offset=0.0, lossy=0.0, **said):
    self.slowness, self.offset, self.lossy = slowness, offset, lossy
    self.said = said

  def hello(self):
    print("libraries may print to standard output")
    return {"library": "fake", "threads": 1, "versions": {}} | self.said

  def load(self, weights):
    return {"config": CONFIG, "weights": weights}

  def text(self, count):
    return {"ids": list(range(count))}

  def heldout(self, count):
    return {"ids": list(range(count))}

  def export(self, folder):
    return {}

  def export_gguf(self, folder):
    return {}

  def rates(self):
    return {"copy, GB/s": 10.0 / self.slowness}

  def logits(self, ids, file, way="float32"):
    import numpy as np

    # What is rounded may be so far off.
    offset = self.offset + 0.03 * ("float16" in way)
    np.save(file, np.full((len(ids), len(ids[0]), 3), offset, np.float32))
    return {}

  def loss(self, ids, dtype):
    return {"loss": 2.0 + self.lossy * (dtype != "float32")}

  def warm(self, ids, new, dtype):
    return {"choice": "none"} | self.said

  def prefill(self, ids, dtype):
    return {"seconds": self.slowness}

  def decode(self, ids, new, dtype):
    # 8 bits take half of the time.
    rest = self.slowness * (0.5 if dtype in ("int8", "q8_0") else 1.0)
    return {"tokens": [[1] * new] * len(ids), "first": 1.0, "rest": rest}

  def warm_mixed(self, prompts, news, dtype):
    return self.mixed(prompts, news, dtype)

  def mixed(self, prompts, news, dtype):
    return {"seconds": self.slowness, "tokens": [[1] * new for new in news]}

  def start_training(self, optimizer):
    return {}

  def train_step(self, ids, dtype):
    half = 0.5 if dtype == "bfloat16" else 1.0
    return {"seconds": self.slowness * half, "loss": 2.0, "grad_norm": 1.0}

  def speak(self, weights, ids, new, dtype, began, cache):
    names = ("import", "first_token", "decoded", "compile", "set_up")
    told = dict.fromkeys(names, self.slowness)
    return told | {"peak": self.slowness * 1e9}

  def learn(self, weights, ids, steps, optimizer, dtype, began, cache):
    names = ("first_step", "compile", "set_up", "loss", "grad_norm")
    return dict.fromkeys(names, 1.0) | {"peak": self.slowness * 1e9}


def write(path, **settings):
  """The script of a side with these settings of Fake."""
  path.write_text(
    f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport fake_side\n"
    f"fake_side.cpu_worker.serve(fake_side.Fake(**{settings!r}))\n"
  )
  return path


if __name__ == "__main__":
  cpu_worker.serve(Fake())
