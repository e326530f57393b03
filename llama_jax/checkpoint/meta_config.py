"""What a checkpoint of Meta's means, from Llama 1 to 3.3.

params.json (meta_params.py) says little, and the code that reads it says the
rest. It is decided as follows:

vocab_size     -1 or absent: the rows of the embedding.
n_kv_heads     absent: n_heads.
mlp_dim        the rows of w1; Meta's rule of multiple_of and
               ffn_dim_multiplier must give the same.
rope_theta     absent: 1e4, as Llama 1 and 2.
rope_scaling   use_scaled_rope: rope_scaling_factor, which only newer files
               have, else the factor of the preset of this shape (8 in Llama
               3.1 and 3.3, 32 in 3.2).
context_length llama_jax.json, else that of the preset of this shape, else by
               rope_theta, as in the generation that has it.
tied           llama_jax.json, else that of the preset of this shape, if the
               bytes of the head are those of the embedding (meta.py); else
               untied.

The preset of this shape is the one of model.sizes that agrees in all that
params.json and the tensors say.
"""

from collections.abc import Mapping
from typing import Any

from llama_jax import errors
from llama_jax.checkpoint import meta_params
from llama_jax.model import config as config_lib
from llama_jax.model import sizes

_SCALED_CONTEXT = 131072
# rope_theta -> the context of the generation that has it.
_CONTEXTS = {1e6: 16384, 5e5: 8192}
_LLAMA1_EPS, _LLAMA1_CONTEXT, _LLAMA2_CONTEXT = 1e-6, 2048, 4096


def resolve(
  said: meta_params.Said, vocab_size: int, width: int, model: str | None
) -> config_lib.LlamaConfig:
  """The configuration that is meant.

  Its tied_embeddings says only that they may be: see meta.py.

  Args:
    said: what the files say.
    vocab_size: rows of the embedding.
    width: rows of w1.
    model: the preset that it is, or None.

  Raises:
    BadFileError: files and tensors contradict each other, or nobody says what
      is meant.
    ConfigError: the preset is another model.
  """
  _check_sizes(said, vocab_size, width)
  fields = {
    "vocab_size": vocab_size,
    "mlp_dim": width,
    "head_dim": said.head_dim,
  }
  for name in (
    "embed_dim",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "norm_eps",
    "rope_theta",
  ):
    fields[name] = getattr(said, name)
  if model is not None:
    return _named(said, fields, model)
  try:
    return config_lib.LlamaConfig(**fields, **_unsaid(said, fields))
  except errors.ConfigError as error:
    raise errors.BadFileError(f"{said.file}: {error}") from error


def _check_sizes(said: meta_params.Said, vocab_size: int, width: int) -> None:
  if said.vocab_size not in (None, vocab_size):
    raise errors.BadFileError(
      f"{said.file} has vocab_size={said.vocab_size}, but the embedding has"
      f" {vocab_size} rows."
    )
  if said.multiple_of is None:
    return
  ruled = meta_params.mlp_dim(said.embed_dim, said.multiple_of, said.multiplier)
  if ruled != width:
    raise errors.BadFileError(
      f"{said.file} has dim={said.embed_dim}, multiple_of={said.multiple_of}"
      f" and ffn_dim_multiplier={said.multiplier}, which make w1 {ruled} wide;"
      f" its tensors are {width} wide."
    )


def _differences(
  said: meta_params.Said,
  fields: Mapping[str, Any],
  preset: config_lib.LlamaConfig,
) -> list[str]:
  """Where a preset is at odds with what is known, as a user would type it."""
  found = [
    f"model.{name}={value} and not {getattr(preset, name)}"
    for name, value in fields.items()
    if getattr(preset, name) != value
  ]
  scaling = preset.rope_scaling
  if said.scaled != (scaling is not None):
    found.append(f"use_scaled_rope={said.scaled}")
  elif said.factor is not None and said.factor != scaling.factor:
    found.append(f"rope_scaling_factor={said.factor}")
  return found


def _named(
  said: meta_params.Said, fields: Mapping[str, Any], model: str
) -> config_lib.LlamaConfig:
  preset = sizes.get(model)
  if differences := _differences(said, fields, preset):
    raise errors.ConfigError(
      f"--model={model} is not the model of {said.file}, which has"
      f" {'; '.join(differences)}. Name another, or none."
    )
  return preset


def _unsaid(
  said: meta_params.Said, fields: Mapping[str, Any]
) -> dict[str, Any]:
  """rope_scaling, context_length and tied_embeddings."""
  scaling = None
  if said.factor is not None:
    scaling = meta_params.scaling(said.factor)
  if said.context_length is not None and (scaling or not said.scaled):
    return {
      "rope_scaling": scaling,
      "context_length": said.context_length,
      "tied_embeddings": said.tied_embeddings,
    }
  alike = {
    name: preset
    for name, preset in sizes.SIZES.items()
    if not _differences(said, fields, preset)
  }
  meant = {
    (preset.rope_scaling, preset.context_length, preset.tied_embeddings)
    for preset in alike.values()
  }
  if len(meant) == 1:
    scaling, context, tied = meant.pop()
  elif meant:
    raise errors.BadFileError(
      f"{said.file} may be that of {' or '.join(alike)}, which differ; say"
      " which with --model=NAME."
    )
  elif said.scaled and scaling is None:
    raise errors.BadFileError(
      f"{said.file} has use_scaled_rope=true and does not say by what factor,"
      " and no preset has this shape; add rope_scaling_factor (8 in Llama 3.1"
      " and 3.3, 32 in 3.2), or name the preset with --model=NAME."
    )
  else:
    context, tied = _context(said), False
  if said.context_length is not None:
    context, tied = said.context_length, said.tied_embeddings
  return {
    "rope_scaling": scaling,
    "context_length": context,
    "tied_embeddings": tied,
  }


def _context(said: meta_params.Said) -> int:
  """The context of the generation of models that a file is like."""
  if said.scaled:
    return _SCALED_CONTEXT
  if said.rope_theta in _CONTEXTS:
    return _CONTEXTS[said.rope_theta]
  if said.rope_theta == meta_params.ROPE_THETA:
    llama1 = said.norm_eps == _LLAMA1_EPS
    return _LLAMA1_CONTEXT if llama1 else _LLAMA2_CONTEXT
  raise errors.BadFileError(
    f"{said.file} has rope_theta={said.rope_theta:g}, which no Llama of this"
    " shape has, so that its context length is unknown; name the preset with"
    f" --model=NAME, or put a file {meta_params.OURS} beside it:"
    ' {"context_length": N, "tied_embeddings": false}.'
  )
