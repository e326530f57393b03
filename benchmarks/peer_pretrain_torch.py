"""The peer of peer_pretrain.py: a plain loop around transformers' Llama.

  python benchmarks/peer_pretrain_torch.py FOLDER

Runs in an environment of its own. FOLDER is what peer_pretrain.py writes; here
go peer.jsonl, a row for each evaluation, peer.json, what was used, and
peer.pt, from which the same command goes on.
"""

import importlib.metadata
import json
import os
import pathlib
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

SAVE_SECONDS = 300
# Rows whose logits exist at once when nothing is differentiated.
ROWS = 4


def load(file, rows=slice(None)):
  """Arrays of an .npz as tensors."""
  with np.load(file, allow_pickle=False) as arrays:
    return {name: torch.from_numpy(arrays[name][rows]) for name in arrays}


def token_losses(model, batch, z_loss=0.0):
  """Each target's loss, [B, T]; those without weight too."""
  segments = batch["segments"]
  mask = None
  if not bool((segments == 1).all()):
    # Causal, within a segment; padding sees itself, so that it stays finite.
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    shown = causal & same & (segments != 0)[:, None, :]
    shown = shown | torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(shown.shape).masked_fill(~shown, float("-inf"))[:, None]
  logits = model(
    input_ids=batch["tokens"].long(),
    attention_mask=mask,
    position_ids=batch["positions"].long(),
    use_cache=False,
  ).logits
  losses = F.cross_entropy(
    logits.transpose(1, 2), batch["targets"].long(), reduction="none"
  )
  if z_loss:
    losses = losses + z_loss * logits.logsumexp(-1).square()
  return losses


def update(model, optimizer, batch, recipe, step):
  """One step; (mean loss, gradient norm) before it."""
  weights = batch["loss_mask"]
  count = weights.sum().clamp(min=1)
  rows = len(weights) // recipe["accumulation"][step]
  total = 0.0
  for start in range(0, len(weights), rows):
    part = {name: a[start : start + rows] for name, a in batch.items()}
    losses = token_losses(model, part, recipe["z_loss"])
    loss = (losses * part["loss_mask"]).sum() / count
    loss.backward()
    total += loss.item()
  norm = torch.nn.utils.clip_grad_norm_(
    model.parameters(), recipe["optimizer"]["clip_norm"]
  )
  for group in optimizer.param_groups:
    group["lr"] = recipe["rates"][step]
  optimizer.step()
  optimizer.zero_grad(set_to_none=True)
  return total, norm.item()


@torch.inference_mode()
def evaluate(model, folder):
  """Held-out losses in nats per token, named as ours."""
  found, total, count = {}, 0.0, 0.0
  for file in sorted((folder / "heldout").glob("*.npz")):
    pieces = load(file)
    loss, scored = 0.0, pieces["loss_mask"].sum().item()
    for start in range(0, len(pieces["tokens"]), ROWS):
      part = {name: a[start : start + ROWS] for name, a in pieces.items()}
      losses = token_losses(model, part)
      loss += (losses * part["loss_mask"]).double().sum().item()
    found[f"heldout_loss/{file.stem}"] = loss / max(scored, 1)
    total, count = total + loss, count + scored
  return found | {"heldout_loss": total / max(count, 1)}


def make_optimizer(model, settings):
  """AdamW as ours is: decay on matrices, none on norms' scales."""
  params = list(model.parameters())
  return torch.optim.AdamW(
    [
      {
        "params": [p for p in params if p.ndim > 1],
        "weight_decay": settings["weight_decay"],
      },
      {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ],
    lr=0.0,
    betas=(settings["b1"], settings["b2"]),
    eps=settings["eps"],
  )


def rewind(file, step):
  """Drops the rows of later steps, and one that was cut short."""
  kept = []
  if file.exists():
    for line in file.read_text().splitlines():
      try:
        row = json.loads(line)
      except ValueError:
        continue
      if row["step"] <= step:
        kept.append(line + "\n")
  file.write_text("".join(kept))


def main(folder):
  recipe = json.loads((folder / "recipe.json").read_text())
  threads = len(os.sched_getaffinity(0))
  torch.set_num_threads(threads)
  model = LlamaForCausalLM.from_pretrained(folder / "init", dtype=torch.float32)
  model.train()
  optimizer = make_optimizer(model, recipe["optimizer"])
  saved, start, seconds = folder / "peer.pt", 0, 0.0
  if saved.exists():
    state = torch.load(saved, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    start, seconds = state["step"], state["seconds"]
  rewind(folder / "peer.jsonl", start)

  def save(step):
    part = folder / "peer.pt.part"
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"step": step, "seconds": seconds}, part)
    os.replace(part, saved)

  due = set(recipe["evaluate_after"])
  last = time.monotonic()
  for step in range(start, recipe["steps"]):
    began = time.monotonic()
    batch = load(folder / "steps" / f"{step}.npz")
    loss, norm = update(model, optimizer, batch, recipe, step)
    seconds += time.monotonic() - began
    row = {"step": step + 1, "tokens_seen": recipe["tokens"][step]}
    row |= {"loss": loss, "grad_norm": norm}
    if step + 1 in due:
      row |= evaluate(model, folder) | {"seconds": seconds}
      with open(folder / "peer.jsonl", "a") as rows:
        rows.write(json.dumps(row) + "\n")
    if step + 1 in due or (step + 1) % 10 == 0:
      print(
        f"peer: step {step + 1} of {recipe['steps']}, loss {loss:.4f},"
        f" held out {row.get('heldout_loss', float('nan')):.4f},"
        f" {seconds / (step + 1):.2f} s a step",
        flush=True,
      )
    if time.monotonic() - last > SAVE_SECONDS:
      save(step + 1)
      last = time.monotonic()
  save(recipe["steps"])
  about = {
    "seconds": seconds,
    "threads": threads,
    "attention": model.config._attn_implementation,
    "versions": {
      name: importlib.metadata.version(name)
      for name in ("torch", "transformers", "numpy")
    },
  }
  (folder / "peer.json").write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
