"""The peer of the CPU benchmark, transformers: a worker (see cpu_worker.py).

Runs in an environment of its own that has torch, transformers and gguf.

bfloat16 means autocast in training. For inference both autocast and bfloat16
weights are tried, and for decoding both a growing and a static cache; what is
fastest while warming up is what is measured.
"""

import contextlib
import copy
import itertools
import pathlib
import statistics
import time

import cpu_worker


class Peer:
  """Plain use of transformers: eager, its default attention (sdpa)."""

  def __init__(self):
    self._model = None
    self._halved = None
    self._choices = {}

  def hello(self):
    import importlib.metadata

    import gguf  # noqa: F401  (its absence should show here)
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401

    torch.set_num_threads(cpu_worker.cores())
    packages = ("torch", "transformers", "gguf", "numpy")
    return {
      "library": "transformers",
      "threads": torch.get_num_threads(),
      "versions": {p: importlib.metadata.version(p) for p in packages},
      "mkldnn": torch.backends.mkldnn.is_available(),
      "isa": torch.backends.cpu.get_cpu_capability(),
    }

  def load(self, weights):
    """gguf:FILE or hf:DIR, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(cpu_worker.cores())
    scheme, _, path = weights.partition(":")
    options = {"dtype": torch.float32}
    if scheme == "gguf":
      file = pathlib.Path(path)
      path, options["gguf_file"] = str(file.parent), file.name
    self._model = AutoModelForCausalLM.from_pretrained(path, **options)
    # No stop token: all rows decode to the end, as on our side.
    self._model.config.eos_token_id = None
    self._model.generation_config = GenerationConfig(pad_token_id=0)
    self._halved = None
    return {"attention": self._model.config._attn_implementation}

  def rates(self):
    import torch

    torch.set_num_threads(cpu_worker.cores())
    found = {}
    for dtype in ("float32", "bfloat16"):
      for m, k, n in cpu_worker.GEMMS:
        a = torch.randn(m, k).to(getattr(torch, dtype))
        b = torch.randn(k, n).to(getattr(torch, dtype))
        seconds = cpu_worker.seconds_of(lambda a=a, b=b: a @ b)
        found[f"gemm {dtype} {m}x{k}x{n}, GFLOP/s"] = (
          2 * m * k * n / seconds / 1e9
        )
    source = torch.ones(cpu_worker.COPY_BYTES // 4)
    target = torch.ones_like(source)
    seconds = cpu_worker.seconds_of(lambda: target.copy_(source))
    found["copy, GB/s"] = 2 * cpu_worker.COPY_BYTES / seconds / 1e9
    return found

  def logits(self, ids, file):
    import numpy as np
    import torch

    with torch.inference_mode():
      logits = self._model(input_ids=torch.tensor(ids)).logits
    np.save(file, logits.float().numpy())
    return {}

  def warm(self, ids, new, dtype):
    """Tries each way to decode and keeps the fastest."""
    found = {}
    for precision in self._precisions(dtype):
      for cache in ("dynamic", "static"):
        if (precision, cache) == ("bfloat16 autocast", "static"):
          continue  # transformers 5.23 refuses: its cache stays float32
        stamps = self._generate(ids, new, precision, cache)[1]
        steps = [b - a for a, b in itertools.pairwise(stamps[1:])]
        found[precision, cache] = statistics.median(steps)
    best = min(found, key=found.get)
    self._choices["decode", len(ids), dtype] = best
    return {
      "choice": ", ".join(best),
      "seconds a token": {", ".join(key): s for key, s in found.items()},
    }

  def prefill(self, ids, dtype):
    key = ("prefill", len(ids), dtype)
    if key not in self._choices:
      found = {}
      for precision in self._precisions(dtype):
        self._prefill(ids, precision)
        found[precision] = self._prefill(ids, precision)
      self._choices[key] = min(found, key=found.get)
    precision = self._choices[key]
    return {"seconds": self._prefill(ids, precision), "choice": precision}

  def decode(self, ids, new, dtype):
    default = (self._precisions(dtype)[0], "dynamic")
    choice = self._choices.get(("decode", len(ids), dtype), default)
    tokens, stamps = self._generate(ids, new, *choice)
    return {
      "tokens": tokens,
      "first": stamps[1] - stamps[0],
      "rest": stamps[-1] - stamps[1],
    }

  def start_training(self, optimizer):
    import torch

    self._halved = None
    self._model.config.use_cache = False
    self._model.train()
    params = list(self._model.parameters())
    matrices = [p for p in params if p.ndim > 1]
    scales = [p for p in params if p.ndim == 1]
    self._clip_norm = optimizer["clip_norm"]
    self._optimizer = torch.optim.AdamW(
      [
        {"params": matrices, "weight_decay": optimizer["weight_decay"]},
        {"params": scales, "weight_decay": 0.0},
      ],
      lr=optimizer["peak_lr"],
      betas=(optimizer["b1"], optimizer["b2"]),
      eps=optimizer["eps"],
    )
    return {}

  def train_step(self, ids, dtype):
    import torch

    ids = torch.tensor(ids)
    began = time.perf_counter()
    with _autocast(dtype == "bfloat16"):
      loss = self._model(input_ids=ids, labels=ids).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(
      self._model.parameters(), self._clip_norm
    )
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)
    answer = {"loss": loss.item(), "grad_norm": norm.item()}
    return answer | {"seconds": time.perf_counter() - began}

  def speak(self, weights, ids, new, dtype, began, cache):
    del cache  # nothing is compiled
    importing = time.perf_counter()
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    imported = time.perf_counter() - importing
    self.load(weights)
    loaded = time.time()
    first = self.decode(ids, new, dtype)
    decoded = time.time()
    return {
      "import": imported,
      "load": loaded - began - imported,
      "first_token": decoded - first["rest"] - began,
      "decoded": decoded - began,
      "compile": 0.0,
      "set_up": 0.0,
      "peak": cpu_worker.peak_bytes(),
    }

  def learn(self, weights, ids, steps, optimizer, dtype, began, cache):
    del cache
    self.load(weights)
    self.start_training(optimizer)
    first = self.train_step(ids, dtype)
    first_step = time.time() - began
    for _ in range(steps - 1):
      self.train_step(ids, dtype)
    return {
      "first_step": first_step,
      "loss": first["loss"],
      "grad_norm": first["grad_norm"],
      "compile": 0.0,
      "set_up": 0.0,
      "peak": cpu_worker.peak_bytes(),
    }

  def _precisions(self, dtype):
    if dtype == "float32":
      return ("float32",)
    return ("bfloat16 weights", "bfloat16 autocast")

  def _in(self, precision):
    import torch

    if precision != "bfloat16 weights":
      return self._model
    if self._halved is None:
      self._halved = copy.deepcopy(self._model).to(torch.bfloat16)
    return self._halved

  def _prefill(self, ids, precision):
    import torch

    model = self._in(precision)
    ids = torch.tensor(ids)
    began = time.perf_counter()
    with torch.inference_mode(), _autocast(precision == "bfloat16 autocast"):
      model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    return time.perf_counter() - began

  def _generate(self, ids, new, precision, cache, mask=None):
    """The new tokens, and times: of the call and of each row's tokens."""
    import torch

    model = self._in(precision)
    options = {}
    if cache == "static":
      options = {"cache_implementation": "static", "disable_compile": True}
    ids = torch.tensor(ids)
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask)
    clock = Clock()
    with torch.inference_mode(), _autocast(precision == "bfloat16 autocast"):
      began = time.perf_counter()
      found = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        use_cache=True,
        streamer=clock,
        **options,
      )
    # The first stamp is that of the prompt.
    return found[:, ids.shape[1] :].tolist(), [began, *clock.stamps[1:]]


class Clock:
  """A streamer that only notes when tokens come."""

  def __init__(self):
    self.stamps = []

  def put(self, tokens):
    del tokens
    self.stamps.append(time.perf_counter())

  def end(self):
    pass


def _autocast(enabled):
  if not enabled:
    return contextlib.nullcontext()
  import torch

  return torch.autocast("cpu", dtype=torch.bfloat16)


if __name__ == "__main__":
  cpu_worker.serve(Peer())
