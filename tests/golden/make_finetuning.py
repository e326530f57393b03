"""Makes finetuning.npz beside this file: SFT and DPO by PyTorch alone.

  python tests/golden/make_finetuning.py

Ran with transformers 5.23.0 and torch 2.13.0 (CPU, float32). A small random
transformers Llama; each answer is a sequence of its own, without packing,
padding or a mask of attention. Losses are the papers' formulas, written down:
arXiv:2305.18290, eq. 7, with arXiv:2407.21783's likelihood term.

config: JSON of transformers' config. NAME of each weight, and of the
reference's under reference/. ids_I, trained_I: sequence I and which of its
tokens are the answer's; sequences 2 i and 2 i + 1 are chosen and rejected.
KIND/loss and KIND/gradients/NAME for KIND of sft, dpo, dpo_smooth, dpo_mean.
sft: the mean over the trained tokens of the chosen ones.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

CONFIG = {
  "architectures": ["LlamaForCausalLM"],
  "vocab_size": 96,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 48,
  "rms_norm_eps": 1e-5,
  "max_position_embeddings": 128,
  "rope_theta": 10000.0,
  "tie_word_embeddings": False,
  "attention_bias": False,
  "mlp_bias": False,
  "hidden_act": "silu",
}
# Tokens of a prompt, of the chosen and of the rejected answer.
LENGTHS = ((5, 7, 4), (9, 3, 8), (2, 6, 6))
# beta, weight of the likelihood, label smoothing, whether means are compared
KINDS = {
  "dpo": (0.1, 0.2, 0.0, False),
  "dpo_smooth": (0.5, 0.0, 0.1, False),
  "dpo_mean": (2.0, 0.2, 0.0, True),
}


def make_model(seed):
  torch.manual_seed(seed)
  config = transformers.LlamaConfig(**CONFIG, attn_implementation="eager")
  model = transformers.LlamaForCausalLM(config).float()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
  return model


def sequences():
  rng = np.random.default_rng(0)
  found = []
  for prompt, *answers in LENGTHS:
    start = rng.integers(1, CONFIG["vocab_size"], prompt)
    for length in answers:
      ids = np.append(start, rng.integers(1, CONFIG["vocab_size"], length))
      found.append((ids, np.arange(len(ids)) >= prompt))
  return found


def logprob(model, ids, trained):
  """(sum over the answer's tokens, how many they are)"""
  ids = torch.tensor(ids)[None]
  each = torch.log_softmax(model(ids).logits[0, :-1], -1)
  said = each.gather(-1, ids[0, 1:, None])[:, 0]
  mask = torch.tensor(trained[1:])
  return said[mask].sum(), int(mask.sum())


def sft(model, found):
  sums, counts = zip(*(logprob(model, *one) for one in found[::2]), strict=True)
  return -sum(sums) / sum(counts)


def dpo(model, reference, found, beta, nll_weight, smoothing, mean):
  losses = []
  for chosen, rejected in zip(found[::2], found[1::2], strict=True):
    gains = []
    for one in (chosen, rejected):
      own, count = logprob(model, *one)
      with torch.no_grad():
        other, _ = logprob(reference, *one)
      gains.append((own - other) / (count if mean else 1))
    margin = beta * (gains[0] - gains[1])
    own, count = logprob(model, *chosen)
    losses.append(
      -(1 - smoothing) * torch.nn.functional.logsigmoid(margin)
      - smoothing * torch.nn.functional.logsigmoid(-margin)
      - nll_weight * own / count
    )
  return sum(losses) / len(losses)


def main():
  model, reference = make_model(0), make_model(1)
  found = sequences()
  arrays = {"config": json.dumps({**CONFIG, "model_type": "llama"})}
  for prefix, one in (("", model), ("reference/", reference)):
    for name, weight in one.named_parameters():
      arrays[prefix + name] = weight.detach().numpy().copy()
  for index, (ids, trained) in enumerate(found):
    arrays[f"ids_{index}"] = ids
    arrays[f"trained_{index}"] = trained
  losses = {"sft": lambda: sft(model, found)}
  for kind, settings in KINDS.items():
    losses[kind] = lambda settings=settings: dpo(
      model, reference, found, *settings
    )
  for kind, loss in losses.items():
    model.zero_grad()
    value = loss()
    value.backward()
    arrays[f"{kind}/loss"] = value.detach().numpy()
    for name, weight in model.named_parameters():
      arrays[f"{kind}/gradients/{name}"] = weight.grad.numpy().copy()
  np.savez_compressed(
    pathlib.Path(__file__).parent / "finetuning.npz", **arrays
  )


if __name__ == "__main__":
  main()
