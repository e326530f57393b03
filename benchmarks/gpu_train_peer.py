"""The peer of the GPU training benchmark, transformers: a worker.

Runs in an environment of its own with torch and transformers (cpu_worker.py
has the protocol, gpu_train_ours.py says what a spec is). A variant is a dict:

  attention   "sdpa" as torch chooses, or its "cudnn" or "flash" kernel
  compile     a mode of torch.compile, or "eager"
  head        "chunked": the vocabulary loss in chunks, its gradient formed in
              the forward pass; "whole": cross entropy of all logits, compiled
  precision   "masters": float32 weights, gradients and moments, bfloat16
              autocast (what our side has); "bfloat16": all four in bfloat16
  checkpoint  recompute each layer in the backward pass
  microbatch  rows of one forward pass; gradients add up in place

In all of them AdamW is fused, gradients are clipped, all tokens but a row's
last are scored, and rows are dense.
"""

import contextlib
import gc
import importlib.metadata
import statistics
import time

import cpu_worker
import gpu_train_work as work
import gpu_transformers
import numpy as np

# Tokens whose logits exist at once in the chunked head.
CHUNK_TOKENS = 4096


class Peer:
  """LlamaForCausalLM in a plain loop."""

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

  def compare(self, config, spec, file):
    """Largest difference of our logits, in the file, from transformers'."""
    import torch

    model = gpu_transformers.model(config, weights=True)
    ids = _rows(spec, config, 0)["tokens"][:1].long()
    with torch.inference_mode():
      logits = model(input_ids=ids, use_cache=False).logits
    off = logits.float().cpu().numpy() - np.load(file)
    return {"off": float(np.abs(off).max())}

  def first(self, config, spec):
    """Loss and gradient norm of one update of the same weights."""
    half = spec["dtype"] != "float32"
    variant = {
      "attention": "sdpa",
      "compile": "eager",
      "head": "chunked",
      "precision": "masters" if half else "float32",
      "checkpoint": False,
      "microbatch": spec["rows"],
    }
    training = Training(config, spec, variant, weights=True)
    loss, norm = training.step(0)
    return {"loss": float(loss), "grad_norm": float(norm)}

  def train(self, config, spec, variant, warmups, steps):
    """Times updates; or {"fits": False} where memory does not suffice."""
    import torch

    training = None
    try:
      began = time.perf_counter()
      training = Training(config, spec, variant)
      float(training.step(0)[0])
      compiled = time.perf_counter() - began
      seconds, losses = training.run(warmups, steps)
    except torch.OutOfMemoryError:
      return {"fits": False}
    finally:
      del training
      gc.collect()
    peak = cpu_worker.peak_bytes()
    if torch.cuda.is_available():
      peak = torch.cuda.max_memory_allocated()
    return {
      "fits": True,
      "compile": compiled,
      "steps": seconds,
      "seconds": statistics.median(seconds),
      "loss": losses,
      "peak": peak,
    }


class Training:
  """A model, its optimizer and the update."""

  def __init__(self, config, spec, variant, weights=False):
    import torch

    self._variant = variant
    self._model = gpu_transformers.model(config, weights)
    if variant["precision"] == "bfloat16":
      self._model.to(torch.bfloat16)
    self._model.train()
    if variant["checkpoint"]:
      self._model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
      )
    self._trunk, self._whole = self._model.model, _whole_loss
    if variant["compile"] != "eager":
      self._trunk = torch.compile(
        self._trunk, mode=variant["compile"], dynamic=False
      )
      self._whole = torch.compile(_whole_loss, dynamic=False)
    params = list(self._model.parameters())
    recipe = work.OPTIMIZER
    self._optimizer = torch.optim.AdamW(
      [
        {
          "params": [p for p in params if p.ndim > 1],
          "weight_decay": recipe["weight_decay"],
        },
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
      ],
      lr=recipe["peak_lr"],
      betas=(recipe["b1"], recipe["b2"]),
      eps=recipe["eps"],
      fused=True,
    )
    self._rows = [_rows(spec, config, seed) for seed in range(2)]

  def step(self, index):
    """(mean loss, gradient norm), still on the device."""
    import torch

    rows = self._rows[index % len(self._rows)]
    size = self._variant["microbatch"]
    scored = rows["loss_mask"].sum()
    loss = 0.0
    for start in range(0, len(rows["tokens"]), size):
      part = {n: a[start : start + size] for n, a in rows.items()}
      backend = gpu_transformers.attention(self._variant["attention"])
      with _autocast(self._variant), backend:
        x = self._trunk(
          input_ids=part["tokens"].long(), use_cache=False
        ).last_hidden_state
        x = x.reshape(-1, x.shape[-1])
        targets = part["targets"].reshape(-1).long()
        weights = part["loss_mask"].reshape(-1) / scored
        head = self._model.lm_head.weight
        if self._variant["head"] == "whole":
          mean = self._whole(x, head, targets, weights)
        else:
          mean = _chunked_loss()(x, head, targets, weights)
      mean.backward()
      loss = loss + mean.detach()
    norm = torch.nn.utils.clip_grad_norm_(
      self._model.parameters(), work.OPTIMIZER["clip_norm"]
    )
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)
    return loss, norm

  def run(self, warmups, steps):
    """(seconds of each update, losses): by the device's clock if it has one."""
    import torch

    cuda = torch.cuda.is_available()
    stamps, losses = [], []
    for index in range(warmups + steps + 1):
      losses.append(self.step(index)[0])
      if cuda:
        stamps.append(torch.cuda.Event(enable_timing=True))
        stamps[-1].record()
      else:
        stamps.append(time.perf_counter())
    if cuda:
      torch.cuda.synchronize()
      stamps = [stamps[0].elapsed_time(stamp) / 1e3 for stamp in stamps]
    losses = [float(loss) for loss in losses]
    return np.diff(stamps)[warmups:].tolist(), losses


def _whole_loss(x, head, targets, weights):
  import torch.nn.functional as F

  logits = F.linear(x, head.to(x.dtype)).float()
  return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def _chunk_gradient(logits, targets, weights):
  """Sum of weight * nll over a chunk, and the gradient of its logits."""
  import torch

  wide = logits.float()
  log_sum = wide.logsumexp(-1, keepdim=True)
  nll = log_sum[:, 0] - wide.gather(1, targets[:, None])[:, 0]
  words = torch.arange(wide.shape[1], device=wide.device)
  hit = words[None, :] == targets[:, None]
  gradient = (torch.exp(wide - log_sum) - hit.float()) * weights[:, None]
  return (nll * weights).sum(), gradient.to(logits.dtype)


def _chunked_loss():
  """The autograd function, made where torch is there."""
  import torch

  if not _MADE:

    class ChunkedLoss(torch.autograd.Function):
      """Weighted next-token loss that never holds all logits."""

      @staticmethod
      def forward(ctx, x, head, targets, weights):
        gradient = _chunk_gradient
        if x.is_cuda:
          gradient = torch.compile(_chunk_gradient, dynamic=False)
        narrow = head.to(x.dtype)
        d_x, d_head = torch.empty_like(x), torch.zeros_like(head)
        total = torch.zeros((), device=x.device)
        with torch.autocast(x.device.type, enabled=False):
          for start in range(0, len(x), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            found, d_logits = gradient(
              x[part] @ narrow.T, targets[part], weights[part]
            )
            total += found
            d_x[part] = d_logits @ narrow
            d_head += d_logits.T @ x[part]
        ctx.save_for_backward(d_x, d_head)
        return total

      @staticmethod
      def backward(ctx, d_total):
        d_x, d_head = ctx.saved_tensors
        return d_x * d_total.to(d_x.dtype), d_head * d_total, None, None

    _MADE.append(ChunkedLoss)
  return _MADE[0].apply


_MADE = []


def _rows(spec, config, seed):
  import torch

  found = work.rows(
    config["vocab_size"], spec["rows"], spec["sequence"], 0, seed
  )
  names, device = ("tokens", "targets", "loss_mask"), gpu_transformers.device()
  return {n: torch.from_numpy(found[n].copy()).to(device) for n in names}


def _autocast(variant):
  import torch

  if variant["precision"] != "masters":
    return contextlib.nullcontext()
  return torch.autocast(gpu_transformers.device(), dtype=torch.bfloat16)


if __name__ == "__main__":
  cpu_worker.serve(Peer())
