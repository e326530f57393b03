"""Pretrains Llama 2: 7b, 13b, 34b, 70b; and nano, anywhere in minutes.

  python -m llama_jax.train --config=configs/pretrain/llama2.py:7b \\
    --workdir=DIR --config.data.prepared=DIR
  python -m llama_jax.train --config=configs/pretrain/llama2.py:nano \\
    --workdir=DIR --config.data.text=FILE_OR_FOLDER

Source: arXiv:2307.09288, 2.2 (AdamW with eps 1e-5, warmup 2,000, cosine to a
tenth, decay, clipping) and table 1 (rates, 4M tokens a batch, context 4,096,
2T tokens). Not published: the mixture (in proportion to the sources' sizes
here), initialisation, whether documents of a row see each other (they do here),
checkpoints, what is done about spikes.
The prepared folder needs rows of 4,096 tokens and the 32,000 words of LLaMA's
tokenizer (configs/data/pretrain.py:llama2).
Expected: the training perplexity of figure 5. nano: on English text the loss
falls from log(512) = 6.2 by two nats or more in 200 steps.
"""

import ml_collections

# variant -> peak rate.
_VARIANTS = {"7b": 3.0e-4, "13b": 3.0e-4, "34b": 1.5e-4, "70b": 1.5e-4}
_TOKENS = 2.0e12


def get_config(variant: str = "7b") -> ml_collections.ConfigDict:
  if variant == "nano":
    return _nano(get_config("7b"))
  if variant not in _VARIANTS:
    raise ValueError(
      f"configs/pretrain/llama2.py:{variant} is not there; use"
      f" {', '.join(_VARIANTS)} or nano."
    )
  batch_size, sequence_length = 1024, 4096  # 4M tokens
  return ml_collections.ConfigDict(
    {
      "init": "",
      "model": {
        "size": f"llama2-{variant}",
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
        "prepared": "",
        "mixture": "",
        "later_mixtures": (),
        "separate_documents": False,
        "sequence_length": sequence_length,
        "heldout": 0.0,
        "infill_rate": 0.0,
        "workers": 4,
        "seed": 0,
        "tokenizer": "",
      },
      "training": {
        "steps": round(_TOKENS / (batch_size * sequence_length)),
        "batch_size": batch_size,
        "accumulation": 1,
        "ramp": (),
        "z_loss": 0.0,
        "spike_factor": 10.0,
        "max_skipped": 10,
        "seed": 0,
      },
      "optimizer": {
        "peak_lr": _VARIANTS[variant],
        "schedule": "cosine",
        "warmup_steps": 2000,
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
        "every": 1000,
        "keep": 2,
        "keep_every": 10_000,
        "pinned": (),
      },
      "evaluation": {
        "every": 1000,
        "rows": 512,
        "tasks": (),
        "text": "",
        "window": 512,
      },
      "metrics": {"layer_norms": False, "wandb": "", "curves_every": 60.0},
    }
  )


def _nano(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The same recipe on two layers, any text, and a tokenizer made of it."""
  config.model.update(size="nano", dtype="float32")
  config.parallel.update(data=-1, fsdp=1)
  config.data.update(
    sequence_length=128, workers=1, heldout=0.02, tokenizer="train"
  )
  config.training.update(steps=200, batch_size=8)
  # Small models take larger rates: ours.
  config.optimizer.update(peak_lr=3e-3, warmup_steps=20)
  config.checkpoint.update(every=50, keep_every=0)
  config.evaluation.update(every=50, rows=16, window=128)
  config.metrics.curves_every = 10.0
  return config
