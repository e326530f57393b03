"""Makes reward/ beside this file: a small reward model, with transformers.

  python tests/golden/make_reward.py

Ran with transformers 5.23.0 and torch 2.13.0 (CPU, float32). The folder holds
what save_pretrained wrote, and golden.npz: ids [B, T], padded on the right;
lengths [B]; rewards float32 [B, T], the score of every token's hidden state;
scores float32 [B], what LlamaForSequenceClassification itself gives of a row.
"""

import pathlib

import numpy as np
import torch
import transformers

PAD = 0
LENGTHS = (48, 31, 2)


def main():
  folder = pathlib.Path(__file__).parent / "reward"
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
    attn_implementation="eager",
    rms_norm_eps=1e-5,
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
    num_labels=1,
    pad_token_id=PAD,
  )
  model = transformers.LlamaForSequenceClassification(config).eval()
  for parameter in model.parameters():
    if parameter.ndim == 1:
      torch.nn.init.uniform_(parameter, 0.5, 1.5)
  model.save_pretrained(folder)
  (folder / "generation_config.json").unlink(missing_ok=True)
  ids = torch.randint(PAD + 1, config.vocab_size, (len(LENGTHS), LENGTHS[0]))
  for row, length in zip(ids, LENGTHS, strict=True):
    row[length:] = PAD
  mask = (ids != PAD).long()
  with torch.no_grad():
    states = model.model(ids, attention_mask=mask).last_hidden_state
    rewards = model.score(states)[..., 0]
    scores = model(ids, attention_mask=mask).logits[..., 0]
  np.savez(
    folder / "golden.npz",
    ids=ids.numpy(),
    lengths=np.array(LENGTHS),
    rewards=rewards.numpy(),
    scores=scores.numpy(),
  )
  print(scores)


if __name__ == "__main__":
  main()
