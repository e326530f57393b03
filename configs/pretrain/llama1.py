"""Pretrains LLaMA 1: 7b, 13b, 33b, 65b; and nano, anywhere in minutes.

  python -m llama_jax.train --config=configs/pretrain/llama1.py:7b \\
    --workdir=DIR --config.data.prepared=DIR
  python -m llama_jax.train --config=configs/pretrain/llama1.py:nano \\
    --workdir=DIR --config.data.text=FILE_OR_FOLDER

Source: arXiv:2302.13971, table 1 (mixture), table 2 (rate, batch, tokens) and
2.3 (AdamW, cosine to a tenth, warmup, decay, clipping). Not published there:
eps (1e-5 after arXiv:2307.09288, 2.2), initialisation, whether documents of a
row see each other (they do here), checkpoints, what is done about spikes.
The prepared folder needs the seven sources of `mixture`, rows of 2,048 tokens
and the 32,000 words of LLaMA's tokenizer (configs/data/pretrain.py:llama1).
Expected: the training loss of figure 1; epochs over each source as in table 1,
1.10 of CommonCrawl to 2.45 of Wikipedia, where the sources have its sizes.
nano: on English text the loss falls from log(512) = 6.2 by two nats or more in
200 steps.
"""

import ml_collections

# variant -> (peak rate, tokens).
_VARIANTS = {
  "7b": (3.0e-4, 1.0e12),
  "13b": (3.0e-4, 1.0e12),
  "33b": (1.5e-4, 1.4e12),
  "65b": (1.5e-4, 1.4e12),
}


def get_config(variant: str = "7b") -> ml_collections.ConfigDict:
  if variant == "nano":
    return _nano(get_config("7b"))
  if variant not in _VARIANTS:
    raise ValueError(
      f"configs/pretrain/llama1.py:{variant} is not there; use"
      f" {', '.join(_VARIANTS)} or nano."
    )
  peak_lr, tokens = _VARIANTS[variant]
  batch_size, sequence_length = 2048, 2048  # 4M tokens
  return ml_collections.ConfigDict(
    {
      "init": "",
      "model": {
        "size": f"llama-{variant}",
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
        "mixture": {
          "commoncrawl": 67.0,
          "c4": 15.0,
          "github": 4.5,
          "wikipedia": 4.5,
          "books": 4.5,
          "arxiv": 2.5,
          "stackexchange": 2.0,
        },
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
        "steps": round(tokens / (batch_size * sequence_length)),
        "batch_size": batch_size,
        "accumulation": 1,
        "ramp": (),
        "z_loss": 0.0,
        "spike_factor": 10.0,
        "max_skipped": 10,
        "seed": 0,
      },
      "optimizer": {
        "peak_lr": peak_lr,
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
  del config.data.mixture
  config.data.mixture = ""  # of any folder
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
