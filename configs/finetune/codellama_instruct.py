"""Code Llama - Instruct: instructions, with code and text rehearsed.

  python -m llama_jax.train --workdir=DIR --config.init=REF \
    --config=configs/finetune/codellama_instruct.py:FOLDER \
    --config.data.chat_template=llama2

Source: arXiv:2308.12950, 2.5 and 2.6: 524,288 tokens a batch, about 5B tokens,
6 % of code and 2 % of text rehearsed; FOLDER/instruct holds conversations
(self-instruct data that passed its tests, and Llama 2's), FOLDER/code and
FOLDER/text rows of {"text"}. Not published: the rate (that of the long-context
stage here), schedule, warmup.
Expected: HumanEval pass@1 as in table 2, from 34.8 for 7B.
"""

import ml_collections


def get_config(folder: str = "instruct") -> ml_collections.ConfigDict:
  mixture = {"instruct": 92.0, "code": 6.0, "text": 2.0}
  text = {name: f"{folder}/{name}" for name in mixture}
  return ml_collections.ConfigDict(
    {
      "init": "",
      "objective": {"name": "next_token"},
      "model": {
        "size": "",
        "dtype": "bfloat16",
        "attention": "auto",
        "rematerialise": "full",
        "vocab_size": 0,
        "rope_theta": 0.0,
        "context_length": 0,
      },
      "parallel": {"data": 1, "fsdp": -1, "tensor": 1},
      "data": {
        "text": text,
        "form": "conversations",
        "chat_template": "",
        "packed": True,
        "max_skipped": 0.05,
        "prepared": "",
        "mixture": mixture,
        "later_mixtures": (),
        "separate_documents": True,
        "sequence_length": 16384,
        "heldout": 0.02,
        "infill_rate": 0.0,
        "workers": 4,
        "seed": 0,
        "tokenizer": "",
      },
      "training": {
        "epochs": 0.0,
        "steps": 9537,
        "batch_size": 32,
        "accumulation": 1,
        "ramp": (),
        "z_loss": 0.0,
        "spike_factor": 10.0,
        "max_skipped": 10,
        "seed": 0,
      },
      "optimizer": {
        "peak_lr": 2e-5,
        "schedule": "cosine",
        "warmup_steps": 0,
        "final_lr_fraction": 0.1,
        "decay_fraction": 0.0,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-5,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "moments_dtype": "float32",
      },
      "checkpoint": {
        "every": 100,
        "keep": 2,
        "keep_every": 0,
        "pinned": (),
      },
      "evaluation": {
        "every": 100,
        "rows": 512,
        "tasks": (),
        "text": "",
        "window": 512,
      },
      "metrics": {"layer_norms": False, "wandb": "", "curves_every": 60.0},
    }
  )
