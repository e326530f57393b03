"""Supervised finetuning of Llama 2 into a chat model; :smollm2 on two cores.

  python -m llama_jax.train --config=configs/finetune/llama2_sft.py \
    --workdir=DIR --config.init=REF --config.data.text=FILE.jsonl \
    --config.data.chat_template=llama2

Source: arXiv:2307.09288, 3.1: 2e-5, cosine, decay 0.1, batch 64, 4,096 tokens,
two epochs, loss on the answers alone. Not published: warmup, where the cosine
ends (a tenth here, as in pretraining). The paper joins prompts and answers of
a row by a special token; here they are segments that do not see each other.
Expected: the held-out loss of answers falls, at most through the first epoch.
smollm2: by 0.1 nats or more on Alpaca's answers in 60 steps.
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  if variant == "smollm2":
    return _smollm2(get_config())
  if variant:
    raise ValueError(
      f"configs/finetune/llama2_sft.py:{variant} is not there; use smollm2,"
      " or nothing for the paper's."
    )
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
        "text": "",
        "form": "conversations",
        "chat_template": "",
        "packed": True,
        "max_skipped": 0.05,
        "prepared": "",
        "mixture": "",
        "later_mixtures": (),
        "separate_documents": True,
        "sequence_length": 4096,
        "heldout": 0.02,
        "infill_rate": 0.0,
        "workers": 4,
        "seed": 0,
        "tokenizer": "",
      },
      "training": {
        "epochs": 2.0,
        "steps": 0,
        "batch_size": 64,
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


def _smollm2(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The same recipe on SmolLM2-135M-Instruct, for two cores: numbers ours."""
  config.model.update(dtype="auto", attention="chunked")
  config.parallel.update(data=-1, fsdp=1)
  config.data.update(sequence_length=512, workers=1, heldout=0.1)
  config.training.update(batch_size=4, epochs=0.0, steps=60)
  config.optimizer.update(peak_lr=2e-05, warmup_steps=5)
  config.checkpoint.update(every=30)
  config.evaluation.update(every=30, rows=32)
  return config
