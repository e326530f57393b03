"""Llama 3.2 1B and 3B: a small model trained on the words of a larger one.

  python -m llama_jax.train --config=configs/finetune/llama32_distill.py:1b \\
    --workdir=DIR --config.init=REF --config.data.prepared=DIR \\
    --config.objective.teacher=REF

Source: arXiv:2407.21783 for the teachers, and Meta's model card of Llama 3.2
(1B and 3B pruned from 8B, then pretrained on the logits of 8B and 70B). Not
published: the divergence (forward and cross-entropy half and half here), the
temperature, weights, rate, batch and tokens (Llama 3 8B's here). One teacher at
a time. init: what model/prune.py cut out of the teacher; without it, give
--config.model.size=llama3.2-1b or llama3.2-3b. 1B's heads are half as wide as
8B's, which pruning here cannot make: from 8B it can be had without init only.
Expected: at the same tokens a lower held-out loss than the same student's
trained plainly. smollm2 and plain: these two for SmolLM2-135M without some of
its layers, on two cores: 3.41 and 3.63 where few documents are read four times,
level where each is new (docs/finetuning.md).
"""

import ml_collections

_SIZES = ("1b", "3b")


def get_config(variant: str = "1b") -> ml_collections.ConfigDict:
  if variant in ("smollm2", "plain"):
    return _smollm2(get_config(), variant == "plain")
  if variant not in _SIZES:
    raise ValueError(
      f"configs/finetune/llama32_distill.py:{variant} is not there; use"
      f" {', '.join(_SIZES)}, smollm2, or plain."
    )
  return ml_collections.ConfigDict(
    {
      "init": "",
      "objective": {
        "name": "distill",
        "teacher": "",
        "data": 0.5,
        "forward": 0.5,
        "reverse": 0.0,
        "temperature": 1.0,
        "top_k": 0,
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
        "form": "documents",
        "chat_template": "",
        "packed": True,
        "max_skipped": 0.05,
        "prepared": "",
        "mixture": "",
        "later_mixtures": (),
        "separate_documents": True,
        "sequence_length": 8192,
        "heldout": 0.0,
        "infill_rate": 0.0,
        "workers": 4,
        "seed": 0,
        "tokenizer": "",
      },
      "training": {
        "epochs": 0.0,
        "steps": 100_000,
        "batch_size": 512,
        "accumulation": 1,
        "ramp": (),
        "z_loss": 0.0,
        "spike_factor": 10.0,
        "max_skipped": 10,
        "seed": 0,
      },
      "optimizer": {
        "peak_lr": 3e-4,
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
        "keep_every": 0,
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


def _smollm2(
  config: ml_collections.ConfigDict, plain: bool
) -> ml_collections.ConfigDict:
  """A cut SmolLM2-135M-Instruct and what it is measured by: numbers ours."""
  if plain:
    config.objective = ml_collections.ConfigDict({"name": "next_token"})
  config.model.update(dtype="auto", attention="chunked")
  config.parallel.update(data=-1, fsdp=1)
  config.data.update(sequence_length=512, workers=1, heldout=0.05)
  config.training.update(batch_size=4, steps=100)
  config.optimizer.update(warmup_steps=10)
  config.checkpoint.update(every=50)
  config.evaluation.update(every=25, rows=32)
  return config
