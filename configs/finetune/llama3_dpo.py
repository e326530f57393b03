"""Direct preference optimisation of a round of Llama 3; :smollm2 on two cores.

  python -m llama_jax.train --config=configs/finetune/llama3_dpo.py \
    --workdir=DIR --config.init=REF --config.data.text=FILE.jsonl \
    --config.data.chat_template=llama3

Source: arXiv:2407.21783, 4.1.4: 1e-5, beta 0.1, the tokens that begin and end
an answer masked in both, 0.2 times the chosen answer's negative log-likelihood;
and 4.2.1: only what is rated better or significantly better (data.drop_ratings;
what has no rating is kept).
Not published: batch, length, epochs, warmup, schedule, decay, and whether the
likelihood is a token's mean (it is here, after arXiv:2404.19733).
Expected: margin and accuracy on held-out pairs rise, and the chosen answer's
log-probability does not fall as without the last term (docs/finetuning.md has
what smollm2 came to; HH's longer pairs need --config.data.max_skipped=0.5).
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  if variant == "smollm2":
    return _smollm2(get_config())
  if variant:
    raise ValueError(
      f"configs/finetune/llama3_dpo.py:{variant} is not there; use smollm2,"
      " or nothing for the paper's."
    )
  return ml_collections.ConfigDict(
    {
      "init": "",
      "objective": {
        "name": "dpo",
        "beta": 0.1,
        "nll_weight": 0.2,
        "label_smoothing": 0.0,
        "length_normalised": False,
        "mask_formatting": True,
        "reference": "cached",
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
        "text": "",
        "form": "preferences",
        "chat_template": "",
        "packed": True,
        "max_skipped": 0.05,
        "drop_ratings": ("slightly_better", "unsure"),
        "prepared": "",
        "mixture": "",
        "later_mixtures": (),
        "separate_documents": True,
        "sequence_length": 8192,
        "heldout": 0.02,
        "infill_rate": 0.0,
        "workers": 4,
        "seed": 0,
        "tokenizer": "",
      },
      "training": {
        "epochs": 1.0,
        "steps": 0,
        "batch_size": 128,
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
  config.data.update(sequence_length=512, workers=1, heldout=0.15)
  config.training.update(batch_size=4, epochs=0.0, steps=64)
  # The paper's 1e-5 shows nothing in so few steps.
  config.optimizer.update(peak_lr=5e-5, warmup_steps=5)
  config.checkpoint.update(every=32)
  config.evaluation.update(every=32, rows=64)
  return config
