"""A model's folder: references to it, and reading it.

DIR/model.json            the LlamaConfig
DIR/tokenizer/            as Hugging Face keeps it, where there is one
DIR/checkpoints/STEP/     params; of a run (steps.py) all that it needs
DIR/lora.json            of a LoRA run, whose params are adapters (adapters.py)
"""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import (
  adapters,
  atomic,
  building,
  manifest,
  names,
  orbax,
  shards,
  steps,
  weights,
  zarr,
)
from llama_jax.model import config as config_lib


def locate(path: str | os.PathLike) -> tuple[pathlib.Path, pathlib.Path]:
  """(model folder, newest or named step's folder) of an orbax: reference."""
  given = pathlib.Path(path).absolute()
  if given.parent.name == "checkpoints" and given.is_dir():
    folder, step = given.parent.parent, given
  else:
    folder, step = given, None
  if not (folder / "model.json").is_file():
    hint = "it does not exist" if not given.exists() else "it has no model.json"
    raise errors.BadFileError(
      f"orbax:{path} is no checkpoint: {hint}; give the folder that convert or"
      " train wrote."
    )
  if step is None:
    there = steps.list_steps(folder / "checkpoints")
    if not there:
      raise errors.BadFileError(
        f"orbax:{path} holds no complete checkpoint yet."
      )
    step = folder / "checkpoints" / str(there[-1])
  return folder, step


def _verified(path: str | os.PathLike) -> pathlib.Path:
  """The step's folder, once its params are known to be undamaged.

  A converted model has no manifest, but checksums in its arrays.
  """
  _, step = locate(path)
  if not (step / manifest.NAME).exists():
    return step
  try:
    manifest.check(step, part="params")
  except errors.BadFileError as error:
    others = [n for n in steps.list_steps(step.parent) if str(n) != step.name]
    advice = "restore it from a copy"
    if others:
      advice = (
        f"name another step, such as orbax:{step.parent / str(others[-1])}"
      )
    raise errors.BadFileError(f"{error} The step is damaged; {advice}.") from (
      error
    )
  return step


def read_config(path: str | os.PathLike) -> config_lib.LlamaConfig:
  """The LlamaConfig beside the weights."""
  return read_model_config(locate(path)[0])


def read_model_config(folder: pathlib.Path) -> config_lib.LlamaConfig:
  """The same of a model's folder that may hold no checkpoint yet."""
  file = folder / "model.json"
  try:
    return config_lib.LlamaConfig.from_dict(json.loads(file.read_text()))
  except (ValueError, TypeError, AttributeError) as error:
    raise errors.BadFileError(f"{file}: not a model's config ({error}).") from (
      error
    )


def read_tokenizer(path: str | os.PathLike):
  """The tokenizer beside the weights, or None."""
  return read_model_tokenizer(locate(path)[0])


def read_model_tokenizer(folder: pathlib.Path):
  """The same of a model's folder that may hold no checkpoint yet."""
  from llama_jax import text

  tokenizer = folder / "tokenizer"
  return text.load_tokenizer(tokenizer) if tokenizer.is_dir() else None


def read_params(path: str | os.PathLike, shardings=None) -> Any:
  """Params of an orbax: reference, onto shardings or the first device.

  Those of a LoRA run are the whole model's.
  """
  if adapters.read(locate(path)[0]) is None:
    return _restore(_verified(path), shardings)
  config, source = open_tensors(path)
  if shardings is None:
    paths = [row.path for row in names.rows(config)]
    shardings = names.nest(dict.fromkeys(paths, _alone()))
  return shards.read_params(config, source, shardings)


def read_adapters(path: str | os.PathLike) -> tuple[adapters.Kept, Any]:
  """lora.json and the adapters of a LoRA run.

  Raises:
    BadFileError: it is none.
  """
  folder, _ = locate(path)
  kept = adapters.read(folder)
  if kept is None:
    raise errors.BadFileError(
      f"orbax:{path} has no {adapters.FILE}: it is no LoRA run but a whole"
      " model."
    )
  return kept, _restore(_verified(path))


def _alone() -> jax.sharding.Sharding:
  return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _restore(step: pathlib.Path, shardings=None) -> Any:
  """The params of a step as they were saved."""
  with orbax.context() as ocp, orbax.readable(step):
    found = ocp.checkpointables_metadata(step).metadata["params"]
    alone = _alone()
    target = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=alone),
      found,
    )
    if shardings is not None:
      target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=sharding
        ),
        target,
        shardings,
      )
    return ocp.load_checkpointables(step, {"params": target})["params"]


def read(path: str | os.PathLike):
  """(LlamaConfig, params, tokenizer or None) of an orbax: reference."""
  return read_config(path), read_params(path), read_tokenizer(path)


def open_tensors(
  path: str | os.PathLike,
) -> tuple[config_lib.LlamaConfig, weights.Source]:
  """The configuration and the weights, which lie in our own layout, under
  Hugging Face's names; any rows of them can be read alone."""
  config = read_config(path)
  folder, _ = locate(path)
  if adapters.read(folder) is not None:
    kept, held = read_adapters(path)
    file = os.fspath(path)
    return config, adapters.merged(config, folder, kept, held, file)
  step = _verified(path)
  leaves = {}
  with orbax.readable(step):
    for row in names.rows(config):
      leaves[row.path] = _Leaf(step / "params", zarr.array_name(row))
  for row in names.rows(config):
    shape = names.our_shape(config, row)
    if leaves[row.path].shape != shape:
      raise errors.BadFileError(
        f"{step}: {row.path} is {list(leaves[row.path].shape)} but model.json"
        f" makes it {list(shape)}."
      )
  return config, weights.from_leaves(config, leaves, "hf", os.fspath(path))


class _Leaf:
  """One array of a checkpoint, read slice by slice."""

  def __init__(self, folder: pathlib.Path, name: str):
    import tensorstore

    self._folder = folder
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{folder}/{name}/"}
    if (folder / "manifest.ocdbt").exists():  # a run's checkpoint
      base = {"driver": "file", "path": f"{folder}/"}
      kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    self._array = tensorstore.open(
      {"driver": "zarr3", "kvstore": kvstore}, open=True, read=True
    ).result()
    self.shape = tuple(self._array.shape)
    self.dtype = self._array.dtype.numpy_dtype

  def __getitem__(self, index) -> np.ndarray:
    with orbax.readable(self._folder):
      return self._array[index].read().result()


def write_model(folder: pathlib.Path, config, tokenizer) -> None:
  """What lies beside the checkpoints: model.json and tokenizer/."""
  atomic.write_text(folder / "model.json", config.to_json() + "\n")
  if tokenizer is not None:
    tokenizer.save(folder / "tokenizer")


def write_into(
  site: building.Building,
  config: config_lib.LlamaConfig,
  source: weights.Source,
  tokenizer,
  *,
  block_bytes: int = weights.BLOCK_BYTES,
) -> None:
  """Fills a site with a model's folder, its weights as step 0.

  Args:
    site: where to; what an earlier process finished there is not done again.
    config: the model's configuration.
    source: the weights in any scheme; they keep its dtypes.
    tokenizer: saved beside them; or None.
    block_bytes: of weights in memory at once, about.
  """
  write_model(site.content, config, tokenizer)
  step = site.content / "checkpoints" / "0"
  zarr.fill(site, step, config, source, block_bytes=block_bytes)


def write(path: str | os.PathLike, config, params, tokenizer) -> None:
  """Writes params in memory as a model's folder, whole or not at all."""
  source = weights.from_params(config, params, "hf")
  with building.building(path) as site:
    write_into(site, config, source, tokenizer)
