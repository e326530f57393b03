"""Any recipe of this folder with LoRA: adapters beside a frozen model.

  python -m llama_jax.train --config=configs/finetune/lora.py:RECIPE \
    --workdir=DIR --config.init=REF --config.data.text=FILE.jsonl \
    [--config.lora.rank=64] [--config.lora.base_dtype=int8]

RECIPE is another file's name and what it takes, such as llama3_dpo:smollm2;
llama2_sft without one.

Source: arXiv:2106.09685, 4.1. Rank, alpha, targets and ten times the recipe's
learning rate are ours.
Expected: near what the recipe gives, with a fraction of its memory: 17 GB are
held for 8B beside its activations, 10 GB with lora.base_dtype=int8; an update
of 4 x 4,096 tokens takes 12 GB more (as compiled for a TPU).
"""

import pathlib

import ml_collections

from llama_jax import errors, shell


def get_config(recipe: str = "") -> ml_collections.ConfigDict:
  name, _, variant = (recipe or "llama2_sft").partition(":")
  file = pathlib.Path(__file__).with_name(f"{name}.py")
  if not file.is_file() or file == pathlib.Path(__file__):
    raise errors.ConfigError(
      f"configs/finetune/lora.py:{recipe} names no recipe of that folder; use"
      " one such as lora.py:llama2_sft or lora.py:llama3_dpo:smollm2."
    )
  config = shell.load_config(f"{file}:{variant}" if variant else str(file))
  config.lora = {
    "rank": 16,
    "alpha": 32.0,
    "targets": ("query", "key", "value", "out", "gate", "up", "down"),
    "base_dtype": "bfloat16",
  }
  config.optimizer.peak_lr *= 10
  return config
