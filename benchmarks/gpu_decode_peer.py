"""The peer of the GPU decoding benchmark, transformers: a worker.

Runs in an environment of its own with torch and transformers (cpu_worker.py
has the protocol, gpu_decode_rows.py says what a spec is). Weights and caches
are bfloat16, no gradient is kept. A variant is a dict:

  attention  "sdpa" or "eager"; of prefill also SDPA's "flash" and "cudnn"; of
             batching "sdpa" or "paged|eager"
  compile    a mode of torch.compile or "none"; of batching a level, 0 to 3

Decoding is a loop around the model's forward and argmax, compiled together,
over a static cache: `generate` does more on the host between two tokens.
"""

import importlib.metadata
import statistics
import time

import cpu_worker
import gpu_decode_work as work
import gpu_transformers
import numpy as np


class Peer:
  """LlamaForCausalLM."""

  def hello(self):
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    cuda = torch.cuda.is_available()
    packages = ("torch", "transformers", "numpy")
    return {
      "library": "transformers",
      "versions": {p: importlib.metadata.version(p) for p in packages},
      "device": torch.cuda.get_device_name() if cuda else "cpu",
    }

  def compare(self, config, file):
    """Largest difference of our logits, in the file, from transformers'."""
    ours = np.load(file)
    off = _logits(config, ours["ids"])[0] - ours["logits"]
    return {"off": float(np.abs(off).max())}

  def greedy(self, config, file):
    """How far our tokens, in the file, lie below transformers' best at most."""
    ours = np.load(file)
    logits = _logits(config, ours["ids"])
    return {
      "short": work.short_of_best(logits, ours["ids"], int(ours["prompt"]))
    }

  # What is timed: {"fits": False} where memory does not suffice.

  def decode(self, config, spec, variant, new, warmups, repeats):
    """Seconds of a token of all rows, of `new` with `cached` before them."""
    import torch
    from transformers import StaticCache

    def measure():
      model = _model(config)
      if variant["attention"] != "sdpa":
        model.set_attn_implementation(variant["attention"])
      start = spec["cached"] - new // 2
      cache = StaticCache(config=model.config, max_cache_len=start + new)
      prompt = _ids(config, spec["rows"], start)

      def step(ids, cache):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True)
        return logits.logits[:, -1].argmax(-1, keepdim=True)

      step = _compiled(step, variant)
      seconds = []
      for _ in range(1 + warmups + repeats):
        cache.reset()
        model(
          input_ids=prompt,
          past_key_values=cache,
          use_cache=True,
          logits_to_keep=1,
        )
        token, tokens = prompt[:, -1:], []
        _wait()
        began = time.perf_counter()
        for _ in range(new):
          if variant["compile"] != "none":
            torch.compiler.cudagraph_mark_step_begin()
          # A graph's output is overwritten when it runs again.
          token = step(token, cache).clone()
          tokens.append(token)
        torch.cat(tokens, dim=1).cpu()
        seconds.append((time.perf_counter() - began) / new)
      told = _told(seconds[1 + warmups :])
      return told | {"compile": seconds[0] * new}

    return _measured(measure)

  def prefill(self, config, spec, variant, warmups, repeats):
    """Seconds from `cached` tokens of a prompt to the next one."""

    def measure():
      model = _model(config)
      ids = _ids(config, spec["rows"], spec["cached"])

      def forward(ids):
        found = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1].argmax(-1)

      forward = _compiled(forward, variant)
      seconds = []
      with gpu_transformers.attention(variant["attention"]):
        for _ in range(1 + warmups + repeats):
          _wait()
          began = time.perf_counter()
          forward(ids).cpu()
          seconds.append(time.perf_counter() - began)
      return _told(seconds[1 + warmups :]) | {"compile": seconds[0]}

    return _measured(measure)

  def batching(self, config, spec, variant, count):
    """Seconds until the first `count` requests are answered."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    def measure():
      model = _model(config)
      if variant["attention"] != "sdpa":
        model.set_attn_implementation(variant["attention"])
      longest = [spec[name][1] for name in ("prompts", "answers")]
      manager = model.continuous_batching_context_manager(
        generation_config=GenerationConfig(
          max_new_tokens=longest[1],
          do_sample=False,
          eos_token_id=-1,
          pad_token_id=0,
        ),
        continuous_batching_config=ContinuousBatchingConfig(
          default_compile_level=variant["compile"],
          auto_switch_to_flash=False,
          # It takes nine tenths of what is free, which a CPU's is not.
          max_memory_percent=None if _cuda() else 0.02,
        ),
        **_hints(*longest, count),
      )

      def once(manager, seed):
        asked = work.requests(
          config["vocab_size"], count, spec["prompts"], spec["answers"], seed
        )
        began = time.perf_counter()
        for prompt, new in asked:
          manager.add_request(prompt, max_new_tokens=new, eos_token_id=-1)
        ended, tokens = 0, 0
        while ended < count:
          result = manager.get_result(timeout=1)
          if result is not None and result.is_finished():
            ended += 1
            tokens += len(result.generated_tokens)
          elif result is None and not manager.is_running():
            raise RuntimeError("continuous batching stopped")
        seconds = time.perf_counter() - began
        if tokens != sum(new for _, new in asked):
          raise RuntimeError(f"continuous batching gave {tokens} tokens")
        return seconds, tokens

      with manager as running:
        compiled, _ = once(running, 1)
        seconds, tokens = once(running, 0)
      return _told([seconds]) | {"compile": compiled, "tokens": tokens}

    return _measured(measure)


def _logits(config, ids):
  """Float32 logits [B, T, V] of the weights of gpu_weights."""
  import torch

  model = gpu_transformers.model(config, weights=True)
  ids = torch.from_numpy(ids).long().to(gpu_transformers.device())
  with torch.inference_mode():
    return model(input_ids=ids, use_cache=False).logits.cpu().numpy()


def _model(config):
  return gpu_transformers.model(config, weights=False, dtype="bfloat16").eval()


def _ids(config, rows, length):
  import torch

  found = work.ids(config["vocab_size"], rows, length, 0)
  return torch.from_numpy(found).long().to(gpu_transformers.device())


def _compiled(function, variant):
  import torch

  if variant["compile"] == "none":
    return function
  return torch.compile(function, mode=variant["compile"], dynamic=False)


def _hints(prompt, answer, count):
  """What continuous batching wants to know beforehand, where it asks."""
  try:
    from transformers.generation.continuous_batching.utils import WorkloadHints
  except ImportError:
    return {}
  return {
    "workload_hints": WorkloadHints(
      max_prompt_length=prompt, max_generated_length=answer, num_requests=count
    )
  }


def _cuda():
  return gpu_transformers.device() == "cuda"


def _wait():
  import torch

  if _cuda():
    torch.cuda.synchronize()


def _told(seconds):
  return {"steps": seconds, "seconds": statistics.median(seconds)}


def _measured(measure):
  """What a call measured, and the memory it took."""
  import torch

  try:
    with torch.no_grad():
      told = measure()
  except torch.OutOfMemoryError:
    return {"fits": False}
  peak = cpu_worker.peak_bytes()
  if _cuda():
    peak = torch.cuda.max_memory_allocated()
  return {"fits": True, "peak": peak} | told


if __name__ == "__main__":
  cpu_worker.serve(Peer())
