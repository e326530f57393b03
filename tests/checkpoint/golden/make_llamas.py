"""Makes llamas/*.npz: what transformers and torch compute of small Llamas.

  python tests/checkpoint/golden/make_llamas.py

Ran with transformers 5.23.0 and torch 2.13.0 (CPU), float32. A file holds
config (JSON of config.json), the weights by name, and of three rows, one whole,
one padded on the left and one on the right:

  ids, mask, positions [3, T]; logits [3, T, V]
  gradients/NAME: of the mean loss of the real next tokens
  steps [10, 3, T]: the ids of ten AdamW steps; losses [10]; after/NAME
"""

import json
import math
import pathlib

import numpy as np
import torch
import transformers

T, V, STEPS = 24, 20, 10
# Positions of a token are STRIDE apart, so that few pass a scaled context.
STRIDE = 7
OPTIMIZER = dict(
  peak_lr=1e-2,
  warmup_steps=3,
  final_lr_fraction=0.1,
  b1=0.9,
  b2=0.95,
  eps=1e-5,
  weight_decay=0.1,
  clip_norm=1.0,
)
SHAPE = dict(
  vocab_size=V,
  hidden_size=12,
  intermediate_size=16,
  num_hidden_layers=2,
  initializer_range=0.3,
  rms_norm_eps=1e-5,
  max_position_embeddings=512,
  attn_implementation="eager",
)


def llama3(theta, factor):
  return {
    "rope_type": "llama3",
    "rope_theta": theta,
    "factor": factor,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
  }


def default(theta):
  return {"rope_type": "default", "rope_theta": theta}


# name: query heads, key and value heads, head_dim (12 / heads is the usual),
# tied, RoPE.
MODELS = {
  "mha": (2, 2, 6, False, default(1e4)),
  "gqa_tied": (4, 2, 4, True, default(1e6)),
  "mqa_free_head_dim": (3, 1, 10, False, default(1e5)),
  "linear": (
    *(4, 2, 8, True),
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
  ),
  "llama3_8": (2, 1, 16, False, llama3(500.0, 8.0)),
  "llama3_32": (4, 2, 12, True, llama3(5e5, 32.0)),
}


def rate(step):
  if step < OPTIMIZER["warmup_steps"]:
    return OPTIMIZER["peak_lr"] * (step + 1) / OPTIMIZER["warmup_steps"]
  left = STEPS - OPTIMIZER["warmup_steps"]
  turn = math.pi * (step - OPTIMIZER["warmup_steps"]) / left
  low = OPTIMIZER["final_lr_fraction"]
  return OPTIMIZER["peak_lr"] * (low + (1 - low) * (1 + math.cos(turn)) / 2)


def mean_loss(model, ids, mask, positions):
  logits = model(ids, attention_mask=mask, position_ids=positions).logits
  real = (mask[:, 1:] * mask[:, :-1]).bool()
  return torch.nn.functional.cross_entropy(
    logits[:, :-1][real], ids[:, 1:][real]
  )


def main():
  folder = pathlib.Path(__file__).parent / "llamas"
  folder.mkdir(exist_ok=True)
  mask = torch.ones(3, T, dtype=torch.long)
  mask[1, :9] = 0
  mask[2, -7:] = 0
  positions = (STRIDE * (mask.cumsum(1) - 1)).clamp(min=0)
  for seed, (name, model_fields) in enumerate(MODELS.items()):
    heads, kv_heads, head_dim, tied, rope = model_fields
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
      **SHAPE,
      num_attention_heads=heads,
      num_key_value_heads=kv_heads,
      head_dim=head_dim,
      tie_word_embeddings=tied,
      rope_parameters=rope,
    )
    model = transformers.LlamaForCausalLM(config)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
      if parameter.ndim == 1:
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    # 0 pads, and is a word like any other.
    steps = torch.randint(V, (STEPS, 3, T)) * mask
    arrays = {
      "config": json.dumps(config.to_dict()),
      "optimizer": json.dumps(OPTIMIZER),
      "ids": steps[0].numpy(),
      "mask": mask.numpy(),
      "positions": positions.numpy(),
      "steps": steps.numpy(),
    }
    for key, parameter in parameters.items():
      arrays[key] = parameter.detach().numpy().copy()
    with torch.no_grad():
      out = model(steps[0], attention_mask=mask, position_ids=positions)
    arrays["logits"] = out.logits.numpy()
    mean_loss(model, steps[0], mask, positions).backward()
    for key, parameter in parameters.items():
      arrays[f"gradients/{key}"] = parameter.grad.numpy().copy()

    matrices = [p for p in parameters.values() if p.ndim > 1]
    norms = [p for p in parameters.values() if p.ndim == 1]
    adamw = torch.optim.AdamW(
      [
        {"params": matrices, "weight_decay": OPTIMIZER["weight_decay"]},
        {"params": norms, "weight_decay": 0.0},
      ],
      betas=(OPTIMIZER["b1"], OPTIMIZER["b2"]),
      eps=OPTIMIZER["eps"],
    )
    losses, lengths = [], []
    for step, ids in enumerate(steps):
      for group in adamw.param_groups:
        group["lr"] = rate(step)
      adamw.zero_grad()
      loss = mean_loss(model, ids, mask, positions)
      loss.backward()
      length = torch.nn.utils.clip_grad_norm_(
        parameters.values(), OPTIMIZER["clip_norm"]
      )
      adamw.step()
      losses.append(loss.item())
      lengths.append(length.item())
    arrays["losses"], arrays["norms"] = np.array(losses), np.array(lengths)
    for key, parameter in parameters.items():
      arrays[f"after/{key}"] = parameter.detach().numpy()
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    print(name, np.abs(arrays["logits"]).max(), losses, lengths)


if __name__ == "__main__":
  main()
