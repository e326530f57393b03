"""Llama 2's reward models: helpfulness, or safety:FOLDER; smollm2 on two cores.

  python -m llama_jax.train --config=configs/finetune/llama2_reward.py \
    --workdir=DIR --config.init=REF --config.data.text=FILE.jsonl \
    --config.data.chat_template=llama2
  python -m llama_jax.train --workdir=DIR --config.init=REF \
    --config=configs/finetune/llama2_reward.py:safety:FOLDER ...

Source: arXiv:2307.09288, 3.2: from the chat checkpoint, one epoch, 1e-5 (70B:
5e-6), cosine to a tenth, warmup 3 % of the steps and at least 5, 512 pairs a
batch; margins by rating, the small ones, which did best on average; safety:
90 % safety and 10 % helpfulness data (FOLDER/safety, FOLDER/helpfulness) and a
classification loss whose formula and weight are not published (ours:
objectives/reward.py, 1.0). A batch counts rows, into which pairs are packed, so
that 512 of them hold more than 512 pairs: divide training.batch_size by the
pairs of a row (those to train on over the rows, which the run prints), or give
each its own row with data.packed=False.
Expected: accuracy by rating rises with the rating; 62 to 63 % on average.
"""

import ml_collections


def get_config(variant: str = "helpfulness") -> ml_collections.ConfigDict:
  if variant == "smollm2":
    return _smollm2(get_config())
  kind, _, folder = variant.partition(":")
  if (kind, bool(folder)) not in (("helpfulness", False), ("safety", True)):
    raise ValueError(
      f"configs/finetune/llama2_reward.py:{variant} is not there; use"
      " helpfulness, safety:FOLDER or smollm2."
    )
  text, mixture, safety_weight = "", "", 0.0
  if kind == "safety":
    mixture = {"safety": 90.0, "helpfulness": 10.0}
    text = {name: f"{folder}/{name}" for name in mixture}
    safety_weight = 1.0
  return ml_collections.ConfigDict(
    {
      "init": "",
      "objective": {
        "name": "reward",
        "margins": "small",
        "safety_weight": safety_weight,
      },
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
        "form": "preferences",
        "chat_template": "",
        "packed": True,
        "max_skipped": 0.05,
        "prepared": "",
        "mixture": mixture,
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
        "epochs": 1.0,
        "steps": 0,
        "batch_size": 512,
        "accumulation": 1,
        "ramp": (),
        "z_loss": 0.0,
        "spike_factor": 10.0,
        "max_skipped": 10,
        "seed": 0,
      },
      "optimizer": {
        "peak_lr": 1e-5,
        "schedule": "cosine",
        "warmup_steps": 5,
        "warmup_fraction": 0.03,
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
  config.data.update(sequence_length=1024, workers=1, heldout=0.1)
  config.training.update(batch_size=2, epochs=0.0, steps=60)
  config.optimizer.update(peak_lr=1e-05, warmup_steps=5)
  config.checkpoint.update(every=30)
  config.evaluation.update(every=30, rows=32)
  return config
