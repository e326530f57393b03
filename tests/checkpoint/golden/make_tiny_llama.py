"""Makes the tiny Llamas beside this file with transformers and torch.

  python tests/checkpoint/golden/make_tiny_llama.py

Ran with transformers 5.23.0 and torch 2.13.0 (CPU). Each folder holds what
save_pretrained wrote and golden.npz: ids [T] and float32 logits [T, V].
"""

import pathlib

import numpy as np
import torch
import transformers

SHAPE = dict(
  vocab_size=40,
  hidden_size=24,
  intermediate_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  initializer_range=0.3,
  attn_implementation="eager",
)
MODELS = {
  # Grouped queries, a free head_dim, an untied head.
  "grouped": dict(
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    tie_word_embeddings=False,
  ),
  # Llama 3.1's RoPE, read far beyond its original context; a tied head.
  "stretched": dict(
    num_key_value_heads=1,
    head_dim=16,
    rms_norm_eps=1e-6,
    max_position_embeddings=256,
    rope_parameters={
      "rope_type": "llama3",
      "rope_theta": 500.0,
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 32,
    },
    tie_word_embeddings=True,
  ),
}


def main():
  here = pathlib.Path(__file__).parent
  for seed, (name, fields) in enumerate(MODELS.items()):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SHAPE, **fields)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
      if parameter.ndim == 1:
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(here / name)
    (here / name / "generation_config.json").unlink(missing_ok=True)
    ids = torch.randint(SHAPE["vocab_size"], (1, 96))
    with torch.no_grad():
      logits = model(ids).logits[0].numpy()
    np.savez(here / name / "golden.npz", ids=ids[0].numpy(), logits=logits)


if __name__ == "__main__":
  main()
