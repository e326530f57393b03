"""A LoRA run's adapters as a folder that PEFT and vLLM load beside the base.

  adapter_config.json, adapter_model.safetensors, and the tokenizer's files

PEFT keeps A as [rank, in] and B as [out, rank] in "base_model.model." and the
transformers name of the layer; alpha / rank is applied there. Our RoPE layout
is transformers' own, so that no row moves. A reward model's score is a module
saved whole.
"""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from llama_jax import checkpoint, errors
from llama_jax.checkpoint import (
  adapters,
  building,
  hugging_face,
  names,
  store,
  weights,
)
from llama_jax.text import files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def write(path: str | os.PathLike, run: str, dtype: np.dtype) -> str:
  """Writes the adapters of orbax:RUN and reads them back.

  Args:
    path: the folder; it must be absent or empty.
    run: the run's folder, or one of its steps.
    dtype: of what is written; the run's own is float32.

  Returns:
    The base, as adapter_config.json names it.

  Raises:
    UserError: this is no LoRA run, its model differs from its base by more
      than adapters, or the destination is taken.
  """
  folder, _ = store.locate(path=run)
  kept, held = store.read_adapters(run)
  config, tokenizer = store.read_config(run), store.read_tokenizer(run)
  base_config, _ = adapters.open_base(folder, kept)
  if dataclasses.replace(base_config, head=config.head) != config:
    changed = [
      f"model.{field.name}"
      for field in dataclasses.fields(config)
      if getattr(config, field.name) != getattr(base_config, field.name)
    ]
    raise errors.UserError(
      f"orbax:{run} has another {' and '.join(changed)} than its base, which"
      " adapters cannot say; write the whole model instead, as with"
      " --dst=hf:DIR."
    )
  source = _source(config, kept, held, run)
  source = weights.as_dtype(source, dtype)
  scheme, place = checkpoint.parse(kept.base, adapters.FILE)
  base = place if scheme == "hf" else kept.base
  with building.building(path) as site:
    site.content.mkdir(exist_ok=True)
    hugging_face.write_file(
      site,
      site.content / WEIGHTS,
      source,
      list(source.tensors),
      weights.BLOCK_BYTES,
    )
    files.write_json(site.content / CONFIG, _fields(config, kept, base))
    if tokenizer is not None:
      tokenizer.save(site.content)
    _check(site.content, source)
  return base


def _source(config, kept: adapters.Kept, held, run) -> weights.Source:
  """The adapters under PEFT's names."""
  arrays = {}
  for name, pair in adapters.pairs(config, kept.lora, held, str(run)).items():
    layer = _PREFIX + name.removesuffix(".weight")
    for letter, matrix in zip("AB", pair, strict=True):
      arrays[f"{layer}.lora_{letter}.weight"] = matrix
  for name, matrix in adapters.score(config, held).items():
    arrays[_PREFIX + name] = matrix
  tensors = {
    name: weights.Tensor(array.shape, array.dtype, "F32")
    for name, array in arrays.items()
  }
  return weights.Source(
    str(run), "hf", tensors, lambda name, start, stop: arrays[name][start:stop]
  )


def _fields(config, kept: adapters.Kept, base: str) -> dict[str, Any]:
  """adapter_config.json; what is left out is PEFT's default."""
  lora = kept.lora
  modules = {
    row.path.split("/")[-2]: row.hugging_face.split(".")[-2]
    for row in names.TABLE
  }
  scalar = config.head == "scalar"
  return {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "target_modules": [modules[name] for name in lora.targets],
    "modules_to_save": ["score"] if scalar else None,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "inference_mode": True,
  }


def _check(folder: pathlib.Path, source: weights.Source) -> None:
  """Raises BadFileError unless the file holds what was to be written."""
  tensors, rows = hugging_face.open_file(folder, WEIGHTS)
  for name, tensor in source.tensors.items():
    found = tensors.get(name)
    written = found is not None and rows(name, 0, found.shape[0])
    if found != tensor or written.tobytes() != source.get(name).tobytes():
      raise errors.BadFileError(
        f"{folder / WEIGHTS}: {name} is not what was written."
      )
