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
        "vocab_size": 0,
        "rope_theta": 0.0,
        "context_length": 0,
      },
      "parallel": {"data": -1, "fsdp": 1, "tensor": 1},
      "data": {
        "text": "",
        "prepared": "",
        "mixture": "",
        "later_mixtures": (),
        "separate_documents": True,
        "sequence_length": 64,
        "heldout": 0.0,
        "infill_rate": 0.0,
        "workers": 1,
        "seed": 0,
        "tokenizer": "",
      },
      "training": {
        "steps": 100,
        "batch_size": 8,
        "accumulation": 1,
        "ramp": (),
        "z_loss": 0.0,
        "spike_factor": 10.0,
        "max_skipped": 10,
        "seed": 0,
      },
      "optimizer": {
        "peak_lr": 3e-3,
        "schedule": "cosine",
        "warmup_steps": 10,
        "final_lr_fraction": 0.1,
        "decay_fraction": 0.0,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "moments_dtype": "float32",
      },
      "checkpoint": {
        "every": 50,
        "keep": 2,
        "keep_every": 0,
        "pinned": (),
      },
      "evaluation": {
        "every": 0,
        "rows": 64,
        "tasks": (),
        "text": "",
        "window": 512,
      },
      "metrics": {"layer_norms": False, "wandb": "", "curves_every": 30.0},
    }
  )
