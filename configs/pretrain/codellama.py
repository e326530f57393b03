"""Trains Code Llama from Llama 2: 7b, 13b, 34b, 70b; python; long; and nano.

  python -m llama_jax.train --config=configs/pretrain/codellama.py:7b \\
    --workdir=DIR --config.init=meta:LLAMA2_7B --config.data.prepared=DIR
  python -m llama_jax.train --config=configs/pretrain/codellama.py:7b-python ...
  python -m llama_jax.train --config=configs/pretrain/codellama.py:7b-long ...
  python -m llama_jax.train --config=configs/pretrain/codellama.py:nano \\
    --workdir=DIR --config.data.text=FILE_OR_FOLDER

Source: arXiv:2308.12950, 2.2 and table 1 (500B tokens, 70b 1T; code 85 %, text
about code 8 %, text 7 %; python: 100B more from those, Python 75 %, code 10 %,
text about code 10 %, text 5 %), 2.3 (infilling of 7b, 13b and 70b, at 0.9, done
by `prepare`), 2.4 (long: rotations of base 1e6, 16,384 tokens, 2e-5, 2M tokens
a batch, 34b 1M; 10,000 steps, 34b 11,000, 7b 3,000) and A.2 (AdamW, warmup
1,000, cosine to a thirtieth, 4M tokens a batch at 4,096, peak as Llama 2's;
python 1e-4). Not published: eps (1e-5 after arXiv:2307.09288, 2.2), the rows of
the new words (model/decoder.py, grow_vocabulary), long's schedule (constant
here), whether documents of a row see each other (they do here).
"python" alone is 7b-python, "long" 7b-long. --config.init is Llama 2 for 7b to
70b, those for python (which keeps their 32,016 words; the released one has
32,000), and either for long. The prepared folder is that of
configs/data/pretrain.py:codellama, or :python; long wants rows of 16,384.
Expected: HumanEval pass@1 of table 2: 33.5 (7b), 36.0 (13b), 48.8 (34b), 53.0
(70b). nano: on Python source the loss falls from log(512) = 6.2 by two nats or
more in 200 steps, infilling and all.
"""

import ml_collections

# Peak rates of Llama 2.
_PEAK_LR = {"7b": 3.0e-4, "13b": 3.0e-4, "34b": 1.5e-4, "70b": 1.5e-4}
_MIXTURES = {
  "": {"code": 85.0, "code_text": 8.0, "text": 7.0},
  "python": {"python": 75.0, "code": 10.0, "code_text": 10.0, "text": 5.0},
}
_LONG_STEPS = {"7b": 3000, "13b": 10_000, "34b": 11_000, "70b": 10_000}


def get_config(variant: str = "7b") -> ml_collections.ConfigDict:
  if variant == "nano":
    return _nano(get_config("7b"))
  size, _, kind = variant.rpartition("-")
  if not size and kind in _PEAK_LR:
    size, kind = kind, ""
  size = size or "7b"
  if size not in _PEAK_LR or kind not in ("", "python", "long"):
    raise ValueError(
      f"configs/pretrain/codellama.py:{variant} is not there; use"
      f" {', '.join(_PEAK_LR)}, one of them with -python or -long, or nano."
    )
  python, long = kind == "python", kind == "long"
  tokens = 1.0e11 if python else 1.0e12 if size == "70b" else 5.0e11
  batch_size, sequence_length = 1024, 4096  # 4M tokens
  steps = round(tokens / (batch_size * sequence_length))
  if long:  # 2M tokens, 34b 1M
    batch_size, sequence_length = 64 if size == "34b" else 128, 16_384
    steps = _LONG_STEPS[size]
  return ml_collections.ConfigDict(
    {
      "init": "",
      "model": {
        "size": "",
        "dtype": "bfloat16",
        "attention": "auto",
        "rematerialise": "full",
        # Words for infilling: PRE, SUF, MID, EOT and twelve that are not used.
        "vocab_size": 0 if size == "34b" or python else 32_016,
        "rope_theta": 1.0e6 if long else 0.0,
        "context_length": sequence_length if long else 0,
      },
      "parallel": {"data": 1, "fsdp": -1, "tensor": 1},
      "data": {
        "text": "",
        "prepared": "",
        "mixture": _MIXTURES["python" if python else ""],
        "later_mixtures": (),
        "separate_documents": False,
        "sequence_length": sequence_length,
        "heldout": 0.0,
        # As the folder was prepared with: a check.
        "infill_rate": 0.0 if size == "34b" or python else 0.9,
        "workers": 4,
        "seed": 0,
        "tokenizer": "",
      },
      "training": {
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": 1,
        "ramp": (),
        "z_loss": 0.0,
        "spike_factor": 10.0,
        "max_skipped": 10,
        "seed": 0,
      },
      "optimizer": {
        "peak_lr": 2e-5 if long else 1e-4 if python else _PEAK_LR[size],
        "schedule": "constant" if long else "cosine",
        "warmup_steps": 1000,
        "final_lr_fraction": 1 / 30,
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
  """The same recipe from nothing: two layers, any text, a tokenizer made of it
  with the tokens for infilling."""
  config.model.update(size="nano", dtype="float32", vocab_size=0)
  config.parallel.update(data=-1, fsdp=1)
  del config.data.mixture
  config.data.mixture = ""  # of any folder
  config.data.update(
    sequence_length=256,
    infill_rate=0.9,
    workers=1,
    heldout=0.02,
    tokenizer="train",
  )
  config.training.update(steps=200, batch_size=4)
  # Small models take larger rates: ours.
  config.optimizer.update(peak_lr=3e-3, warmup_steps=20)
  config.checkpoint.update(every=50, keep_every=0)
  config.evaluation.update(every=50, rows=16, window=128)
  config.metrics.curves_every = 10.0
  return config
