"""Trains a two-layer Llama from nothing, in seconds: for tests and dry runs.

  python -m llama_jax.train --config=configs/nano.py --workdir=DIR \\
    --config.data.text=FILE_OR_FOLDER --config.data.tokenizer=PATH

Source: none; every number is ours. --config.model.size names another size.
Expected: on any English text the loss falls from log(vocabulary) by a nat or
more in 100 steps.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      "init": "",
      "model": {
        "size": "nano",
        "dtype": "float32",
        "attention": "chunked",
        "rematerialise": "full",
      },
      "parallel": {"data": -1, "fsdp": 1, "tensor": 1},
      "data": {"text": "", "sequence_length": 64, "seed": 0, "tokenizer": ""},
      "training": {
        "steps": 100,
        "batch_size": 8,
        "accumulation": 1,
        "seed": 0,
      },
      "optimizer": {
        "peak_lr": 3e-3,
        "warmup_steps": 10,
        "final_lr_fraction": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
      },
      "checkpoint": {"every": 50, "keep": 2},
    }
  )
