"""Makes lora/ beside this file: adapters of a small Llama, with PEFT.

  python tests/golden/make_lora.py

Ran with peft 0.21.0, transformers 5.23.0 and torch 2.13.0 (CPU, float32).
base/ and adapter/ hold what save_pretrained wrote: a random Llama, and random
adapters of all its projections. golden.npz, computed with W + alpha / r B A in
place of each weight W, with which PEFT's own forward was compared: ids [B, T],
logits float32 [B, T, V], loss (the mean over next tokens, in nats), and its
gradients by each A and B under PEFT's names.
"""

import copy
import pathlib

import numpy as np
import peft
import torch
import transformers

RANK, ALPHA = 3, 5
PROJECTIONS = (
  "q_proj",
  "k_proj",
  "v_proj",
  "o_proj",
  "gate_proj",
  "up_proj",
  "down_proj",
)


def make_model():
  config = transformers.LlamaConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.2,
    attn_implementation="eager",
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    tie_word_embeddings=False,
  )
  model = transformers.LlamaForCausalLM(config).eval()
  for parameter in model.parameters():
    if parameter.ndim == 1:
      torch.nn.init.uniform_(parameter, 0.5, 1.5)
  return model


def main():
  folder = pathlib.Path(__file__).parent / "lora"
  torch.manual_seed(0)
  plain = make_model()
  plain.save_pretrained(folder / "base")
  beside = peft.get_peft_model(
    copy.deepcopy(plain),
    peft.LoraConfig(
      task_type="CAUSAL_LM",
      r=RANK,
      lora_alpha=ALPHA,
      target_modules=list(PROJECTIONS),
      lora_dropout=0.0,
    ),
  )
  adapters = {
    name.replace(".default", ""): parameter
    for name, parameter in beside.named_parameters()
    if ".lora_" in name
  }
  for name, parameter in adapters.items():
    if ".lora_B" in name:
      torch.nn.init.normal_(parameter, 0, 0.2)
  beside.save_pretrained(folder / "adapter")
  for name in ("base/generation_config.json", "adapter/README.md"):
    (folder / name).unlink(missing_ok=True)

  ids = torch.randint(plain.config.vocab_size, (2, 12))
  changed = {}
  for name, weight in plain.named_parameters():
    layer = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{layer}.lora_A.weight" in adapters:
      a, b = (adapters[f"{layer}.lora_{one}.weight"] for one in "AB")
      changed[name] = weight.detach() + ALPHA / RANK * b @ a
  assert len(changed) == 2 * len(PROJECTIONS)
  logits = torch.func.functional_call(plain, changed, (ids,)).logits
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
  )
  gradients = torch.autograd.grad(loss, list(adapters.values()))
  with torch.no_grad():
    torch.testing.assert_close(beside(ids).logits, logits)
  np.savez(
    folder / "golden.npz",
    ids=ids.numpy(),
    logits=logits.detach().numpy(),
    loss=loss.item(),
    **{
      name: gradient.numpy()
      for name, gradient in zip(adapters, gradients, strict=True)
    },
  )
  print(loss.item())


if __name__ == "__main__":
  main()
