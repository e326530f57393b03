"""Pretrains Llama 3: 8b, 70b, 405b; 10m in an hour, nano in minutes, anywhere.

  python -m llama_jax.train --config=configs/pretrain/llama3.py:8b \\
    --workdir=DIR --config.data.prepared=DIR
  python -m llama_jax.train --config=configs/pretrain/llama3.py:nano \\
    --workdir=DIR --config.data.text=FILE_OR_FOLDER
  python -m llama_jax.train --config=configs/pretrain/llama3.py:anneal \\
    --workdir=DIR --config.data.prepared=DIR --config.init=orbax:RUN

Source: arXiv:2407.21783, table 3 (peak rates) and 3.4.1 (405B: warmup 8,000,
cosine to 8e-7 over 1.2M steps; 4M tokens a batch at 4,096, 8M at 8,192 after
252M tokens, 16M after 2.87T; documents of a row do not see each other), 3.1.2
(the mixture), 3.4.3 (annealing: the rate linearly to 0 on the best data, then
the mean of its checkpoints, `python -m llama_jax.average`). The paper anneals
at a context of 128K and prints "final 40M tokens", 2.5 steps of its batch:
training.steps is a knob. Not published: AdamW's betas, eps, decay and clipping
(as arXiv:2307.09288, 2.2), warmup and final rate of 8b and 70b (as 405b's),
initialisation, checkpoints, what is done about spikes.
The prepared folder needs the four sources of `mixture`, rows of 8,192 tokens
and Llama 3's tokenizer (configs/data/pretrain.py:llama3).
Expected: nano, on English text: the loss falls from log(512) = 6.2 by two nats
or more in 200 steps. 10m: see benchmarks/README.md.
"""

import ml_collections

# variant -> peak rate.
_VARIANTS = {"8b": 3.0e-4, "70b": 1.5e-4, "405b": 8.0e-5}


def get_config(variant: str = "8b") -> ml_collections.ConfigDict:
  if variant in _OTHERS:
    return _OTHERS[variant](get_config("8b"))
  if variant not in _VARIANTS:
    raise ValueError(
      f"configs/pretrain/llama3.py:{variant} is not there; use"
      f" {', '.join([*_VARIANTS, *_OTHERS])}."
    )
  return ml_collections.ConfigDict(
    {
      "init": "",
      "model": {
        "size": f"llama3.1-{variant}"
        if variant == "405b"
        else f"llama3-{variant}",
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
          "general": 50.0,
          "maths": 25.0,
          "code": 17.0,
          "multilingual": 8.0,
        },
        "later_mixtures": (),
        "separate_documents": True,
        "sequence_length": 4096,
        "heldout": 0.0,
        "infill_rate": 0.0,
        "workers": 4,
        "seed": 0,
        "tokenizer": "",
      },
      "training": {
        "steps": 1_200_000,
        "batch_size": 1024,  # 4M tokens
        "accumulation": 1,
        "ramp": (
          {
            "from_tokens": 252_000_000,
            "batch_size": 1024,
            "sequence_length": 8192,
            "accumulation": 1,
          },
          {
            "from_tokens": 2_870_000_000_000,
            "batch_size": 2048,
            "sequence_length": 8192,
            "accumulation": 1,
          },
        ),
        "z_loss": 0.0,
        "spike_factor": 10.0,
        "max_skipped": 10,
        "seed": 0,
      },
      "optimizer": {
        "peak_lr": _VARIANTS[variant],
        "schedule": "cosine",
        "warmup_steps": 8000,
        "final_lr_fraction": 0.01,
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


def _small(config: ml_collections.ConfigDict) -> None:
  config.model.dtype = "float32"
  config.parallel.update(data=-1, fsdp=1)
  config.data.workers = 1
  # Small models take larger rates: ours.
  config.optimizer.update(peak_lr=3e-3)
  config.checkpoint.keep_every = 0


def _nano(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The same recipe on two layers, any text, and a tokenizer made of it; both
  lengths of the paper's ramp, a hundredth as long."""
  _small(config)
  config.model.size = "nano"
  del config.data.mixture
  config.data.mixture = ""  # of any folder
  config.data.update(sequence_length=64, heldout=0.02, tokenizer="train")
  config.training.update(steps=200, batch_size=8, ramp=_double(50, 8, 64))
  config.optimizer.warmup_steps = 20
  config.checkpoint.every = 50
  config.evaluation.update(every=50, rows=16, window=128)
  config.metrics.curves_every = 10.0
  return config


def _ten_million(
  config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """Ten million parameters on the paper's mixture, for an hour on two cores."""
  _small(config)
  config.model.size = "llama-10m"
  config.data.sequence_length = 256
  config.training.update(steps=2500, batch_size=8, ramp=_double(500, 8, 256))
  # At 3e-3 the loss swings in the warmup and stays 1 % higher.
  config.optimizer.update(peak_lr=1e-3, warmup_steps=100)
  config.checkpoint.every = 250
  config.evaluation.update(every=250, rows=32)
  return config


def _anneal(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """From a trained model, the rate linearly to 0 on the best data."""
  config.model.size = ""
  del config.data.mixture
  config.data.mixture = ""  # of any folder
  config.data.sequence_length = 8192
  config.training.update(steps=1000, batch_size=2048, ramp=())
  config.optimizer.update(
    schedule="linear", warmup_steps=0, final_lr_fraction=0.0, peak_lr=3e-5
  )
  config.checkpoint.update(every=100, keep=10)
  return config


def _double(step: int, batch_size: int, sequence_length: int):
  """One stage of a ramp: from this step on, sequences twice as long."""
  return (
    {
      "from_tokens": step * batch_size * sequence_length,
      "batch_size": batch_size,
      "sequence_length": 2 * sequence_length,
      "accumulation": 1,
    },
  )


_OTHERS = {"nano": _nano, "10m": _ten_million, "anneal": _anneal}
