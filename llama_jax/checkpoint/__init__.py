"""Weights on disk, by reference: scheme:path wherever a checkpoint is named."""

import importlib
import os
import pathlib
from typing import Any, NamedTuple

from llama_jax import errors

# scheme -> the module that speaks it: read, read_config, read_tokenizer and
# open_tensors, and write_into where it is in WRITES.
FORMATS = {
  "orbax": "llama_jax.checkpoint.store",
  "hf": "llama_jax.checkpoint.hugging_face",
  "meta": "llama_jax.checkpoint.meta",
  "gguf": "llama_jax.checkpoint.gguf",
  "llama2c": "llama_jax.checkpoint.llama2c",
}
WRITES = ("orbax", "hf", "meta", "gguf")


class Model(NamedTuple):
  """A checkpoint in memory; tokenizer is None where it has none."""

  config: Any
  params: dict[str, Any]
  tokenizer: Any


def parse(reference: str, knob: str = "--ckpt") -> tuple[str, str]:
  """(scheme, path) of a reference; raises UserError that names the knob."""
  scheme, colon, path = str(reference or "").partition(":")
  if not colon or scheme not in FORMATS or not path:
    allowed = ", ".join(f"{name}:PATH" for name in FORMATS)
    raise errors.UserError(
      f"{knob}={reference} is not a checkpoint reference; use one of {allowed}."
    )
  return scheme, os.path.expanduser(path)


def find(reference: str, knob: str = "--ckpt"):
  """(the format's module, the path) of a reference to what is there."""
  scheme, path = parse(reference, knob)
  if not pathlib.Path(path).exists():
    raise errors.BadFileError(f"{knob}={reference}: {path} does not exist.")
  return importlib.import_module(FORMATS[scheme]), path


def writer(reference: str, knob: str = "--dst"):
  """(scheme, the format's module, the path) of a destination; checks that it
  can be written and is not taken."""
  from llama_jax.checkpoint import atomic

  scheme, path = parse(reference, knob)
  if scheme not in WRITES:
    allowed = ", ".join(f"{name}:PATH" for name in WRITES)
    raise errors.UserError(
      f"{knob}={reference}: {scheme} cannot be written; use one of {allowed}."
    )
  atomic.check_new(path)
  return scheme, importlib.import_module(FORMATS[scheme]), path


def pin(reference: str, knob: str = "--ckpt") -> str:
  """A reference to what this one names now: of a run, its newest step."""
  module, path = find(reference, knob)
  scheme, _ = parse(reference, knob)
  if scheme == "orbax":
    _, path = module.locate(path)
  return f"{scheme}:{pathlib.Path(path).absolute()}"


def open_tensors(reference: str, knob: str = "--ckpt", **settings: Any):
  """(LlamaConfig, weights.Source): the weights, of which any rows can be had.

  settings: what the format's own open_tensors takes (meta: model).
  """
  module, path = find(reference, knob)
  return module.open_tensors(path, **settings)


def read_config(reference: str, knob: str = "--ckpt"):
  """The LlamaConfig alone, without reading weights."""
  module, path = find(reference, knob)
  return module.read_config(path)


def read_tokenizer(reference: str, knob: str = "--ckpt", **settings: Any):
  """The tokenizer alone, or None; settings as in open_tensors."""
  module, path = find(reference, knob)
  return module.read_tokenizer(path, **settings)


def load(reference: str, knob: str = "--ckpt", shardings=None) -> Model:
  """Reads a whole checkpoint. Params keep the dtype they are stored in.

  Args:
    reference: scheme:path.
    knob: what an error message calls it.
    shardings: where params go, a tree like them: each part is read straight
      onto its devices. Without, orbax: gives arrays on the first device and the
      others give NumPy arrays.

  Raises:
    errors.UserError: the reference or what it names is bad.
  """
  module, path = find(reference, knob)
  if shardings is None:
    return Model(*module.read(path))
  if parse(reference, knob)[0] == "orbax":
    return Model(
      module.read_config(path),
      module.read_params(path, shardings),
      module.read_tokenizer(path),
    )
  from llama_jax.checkpoint import proof, shards

  config, source = module.open_tensors(path)
  tokenizer = module.read_tokenizer(path)
  if tokenizer is not None:
    proof.check_vocabulary(config, tokenizer, source.file)
  return Model(config, shards.read_params(config, source, shardings), tokenizer)
