"""The configuration in the metadata of a GGUF file of a Llama."""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import names, proof
from llama_jax.model import config as config_lib

ARCHITECTURE = "llama"

# Keys of the llama architecture that change the arithmetic, with the values
# that leave it a Llama.
_NEUTRAL = {
  "expert_count": (0,),
  "use_parallel_residual": (False,),
  "attention.causal": (True,),
  "attention.sliding_window": (0,),
  "attention.clamp_kqv": (0.0,),
  "attention.max_alibi_bias": (0.0,),
  "logit_scale": (0.0, 1.0),
  "embedding_scale": (0.0, 1.0),
  "residual_scale": (0.0, 1.0),
  "attention.scale": (0.0,),
  "attn_logit_softcapping": (0.0,),
  "final_logit_softcapping": (0.0,),
  "rope.scale_linear": (1.0,),
}

# Llama 3.1 to 3.3 differ in the factor alone (RECIPES.md 1).
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _ORIGINAL_CONTEXT = 1.0, 4.0, 8192
# llama.cpp's converter computes the factors in float32.
_FACTORS_TOLERANCE = 1e-4


def parse(
  metadata: Mapping[str, Any], source: names.Source
) -> config_lib.LlamaConfig:
  """The configuration, checked against the tensors.

  Args:
    metadata: key -> plain value, as text/gguf_header.py reads it.
    source: the tensors; only the table of RoPE factors is read.

  Raises:
    BadFileError: this is no Llama, or its tensors are not those it declares.
  """
  file = source.file
  architecture = metadata.get("general.architecture")
  if architecture != ARCHITECTURE:
    raise errors.BadFileError(
      f"{file} has general.architecture={reprlib.repr(architecture)}; only"
      f" {ARCHITECTURE!r} is supported."
    )
  if metadata.get("split.count", 1) not in (0, 1):
    raise errors.BadFileError(
      f"{file} is one of {reprlib.repr(metadata['split.count'])} parts; join"
      " them first: llama-gguf-split --merge."
    )

  def whole(key: str, default: int | None = None) -> int:
    value = metadata.get(f"llama.{key}", default)
    if isinstance(value, list) and value and len(set(value)) == 1:
      value = value[0]
    if isinstance(value, bool) or not isinstance(value, int):
      raise errors.BadFileError(
        f"{file} has llama.{key}={reprlib.repr(value)}; it must be one"
        " whole number for all layers."
      )
    return value

  def real(key: str, default: float | None = None) -> float:
    value = metadata.get(f"llama.{key}", default)
    if not isinstance(value, float) or not math.isfinite(value):
      raise errors.BadFileError(
        f"{file} has llama.{key}={reprlib.repr(value)}; it must be a"
        " finite number."
      )
    # The shortest decimal of a float32: 1e-05 and not 9.99999974e-06.
    return float(str(np.float32(value)))

  for key, neutral in _NEUTRAL.items():
    value = metadata.get(f"llama.{key}", neutral[0])
    if value not in neutral:
      raise errors.BadFileError(
        f"{file} is not a plain Llama: llama.{key}={reprlib.repr(value)}, where"
        f" {neutral[0]!r} is supported."
      )

  embed_dim = whole("embedding_length")
  num_heads = whole("attention.head_count")
  # Missing keys mean what llama.cpp takes them to mean.
  head_dim = whole("attention.key_length", embed_dim // max(num_heads, 1))
  for key in ("attention.value_length", "rope.dimension_count"):
    if (value := whole(key, head_dim)) != head_dim:
      raise errors.BadFileError(
        f"{file} has llama.{key}={value}, which must equal the head dim"
        f" {head_dim}."
      )
  embedding = source.tensors.get("token_embd.weight")
  rows = embedding.shape[0] if embedding else None
  try:
    config = config_lib.LlamaConfig(
      vocab_size=whole("vocab_size", rows),
      embed_dim=embed_dim,
      num_layers=whole("block_count"),
      num_heads=num_heads,
      num_kv_heads=whole("attention.head_count_kv", num_heads),
      head_dim=head_dim,
      mlp_dim=whole("feed_forward_length"),
      norm_eps=real("attention.layer_norm_rms_epsilon"),
      rope_theta=real("rope.freq_base", 10000.0),
      rope_scaling=None,
      context_length=whole("context_length"),
      tied_embeddings="output.weight" not in source.tensors,
    )
    names.check(config, source)
    return _with_rope_scaling(config, metadata, source)
  except errors.ConfigError as error:
    raise errors.BadFileError(f"{file}: {error}") from error


def _with_rope_scaling(
  config: config_lib.LlamaConfig,
  metadata: Mapping[str, Any],
  source: names.Source,
) -> config_lib.LlamaConfig:
  """Adds Llama 3.1's scaling if the file holds its table of factors.

  llama.cpp keeps no parameters of it, only what each frequency is divided
  by. The largest divisor is the factor; the rest is known, and the whole
  table must follow from it.
  """
  file = source.file
  kind = metadata.get("llama.rope.scaling.type", "none")
  factor = metadata.get("llama.rope.scaling.factor", 1.0)
  if kind != "none" and not (kind == "linear" and factor == 1.0):
    raise errors.BadFileError(
      f"{file} has llama.rope.scaling.type={reprlib.repr(kind)} (factor"
      f" {reprlib.repr(factor)}); 'none' and Llama 3.1's rope_freqs.weight are"
      " supported."
    )
  table = source.tensors.get("rope_freqs.weight")
  if table is None:
    return config
  half = config.head_dim // 2
  if table.shape != (half,):
    raise errors.BadFileError(
      f"{file}: tensor rope_freqs.weight is {list(table.shape)} but"
      f" model.head_dim={config.head_dim} makes it [{half}]."
    )
  found = source.get("rope_freqs.weight").astype(np.float64)
  original = metadata.get(
    "llama.rope.scaling.original_context_length", _ORIGINAL_CONTEXT
  )
  factor = float(found.max())
  if np.all(found == 1.0):
    return config
  plain = proof.inverse_frequencies(config)
  if math.isfinite(factor) and factor > 1 and isinstance(original, int):
    scaled = dataclasses.replace(
      config,
      rope_scaling=config_lib.RopeScaling(
        factor=factor,
        low_freq_factor=_LOW_FREQ_FACTOR,
        high_freq_factor=_HIGH_FREQ_FACTOR,
        original_context=original,
      ),
    )
    divisors = plain / proof.inverse_frequencies(scaled)
    if np.allclose(found, divisors, rtol=_FACTORS_TOLERANCE, atol=0):
      return scaled
  raise errors.BadFileError(
    f"{file}: rope_freqs.weight (largest value {factor:g}) is not Llama 3.1's"
    f" scaling with low_freq_factor={_LOW_FREQ_FACTOR:g},"
    f" high_freq_factor={_HIGH_FREQ_FACTOR:g} and original_context="
    f"{reprlib.repr(original)}"
    f" at model.rope_theta={config.rope_theta:g}; no other is supported."
  )
