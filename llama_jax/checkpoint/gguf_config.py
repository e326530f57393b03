"""The configuration in the metadata of a GGUF file of a Llama, both ways."""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import proof, weights
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
}

# What each pair's frequency is divided by; Llama 3.1's scaling is kept so.
ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.1 to 3.3 differ in the factor alone (RECIPES.md 1).
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _ORIGINAL_CONTEXT = 1.0, 4.0, 8192
# llama.cpp's converter computes the factors in float32.
_FACTORS_TOLERANCE = 1e-4


def parse(
  metadata: Mapping[str, Any], source: weights.Source
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
      norm_eps=_real(metadata, "attention.layer_norm_rms_epsilon", file),
      rope_theta=_real(metadata, "rope.freq_base", file, 10000.0),
      rope_scaling=None,
      context_length=whole("context_length"),
      tied_embeddings="output.weight" not in source.tensors,
    )
    weights.check(config, source)
    return _with_rope_scaling(config, metadata, source)
  except errors.ConfigError as error:
    raise errors.BadFileError(f"{file}: {error}") from error


def write_fields(config: config_lib.LlamaConfig) -> dict[str, Any]:
  """The keys of a configuration: whole numbers are u32 and the others f32.

  Raises:
    UserError: a number is beyond what these hold.
  """
  fields: dict[str, Any] = {
    "vocab_size": config.vocab_size,
    "context_length": config.context_length,
    "embedding_length": config.embed_dim,
    "block_count": config.num_layers,
    "feed_forward_length": config.mlp_dim,
    "attention.head_count": config.num_heads,
    "attention.head_count_kv": config.num_kv_heads,
    "attention.key_length": config.head_dim,
    "attention.value_length": config.head_dim,
    "attention.layer_norm_rms_epsilon": float(config.norm_eps),
    "rope.dimension_count": config.head_dim,
    "rope.freq_base": float(config.rope_theta),
  }
  scaling = config.rope_scaling
  if scaling is not None and scaling.kind == "linear":
    fields["rope.scaling.type"] = "linear"
    fields["rope.scaling.factor"] = float(scaling.factor)
  elif scaling is not None:
    # llama.cpp's own converter leaves it out and means 8192.
    original = scaling.original_context
    fields["rope.scaling.original_context_length"] = original
  for key, value in fields.items():
    fits = True
    if isinstance(value, int):
      fits = value < 2**32
    elif isinstance(value, float):
      fits = math.isclose(_shortest(value), value, rel_tol=1e-6)
    if not fits:
      raise errors.UserError(
        f"GGUF cannot hold llama.{key}={value!r}: whole numbers are below 2^32"
        " and others are float32; write orbax: or hf:."
      )
  return {f"llama.{key}": value for key, value in fields.items()}


def rope_factors(config: config_lib.LlamaConfig) -> np.ndarray | None:
  """llama.cpp's table of Llama 3.1's scaling, float32 [H / 2], or None.

  Raises:
    UserError: the scaling could not be known again from the table.
  """
  scaling = config.rope_scaling
  if scaling is None or scaling.kind == "linear":
    return None
  plain = dataclasses.replace(config, rope_scaling=None)
  divisors = _divisors(plain, scaling).astype(np.float32)
  if _recognised(plain, divisors, scaling.original_context) != scaling:
    raise errors.UserError(
      f"GGUF cannot hold model.rope_scaling={scaling}: it keeps the divisor of"
      " each frequency and no parameters, and these are known again only with"
      f" low_freq_factor={_LOW_FREQ_FACTOR:g},"
      f" high_freq_factor={_HIGH_FREQ_FACTOR:g} and a frequency that is slowed"
      " by the whole factor; write orbax: or hf:."
    )
  return divisors


def _real(
  metadata: Mapping[str, Any], key: str, file: str, default: float | None = None
) -> float:
  value = metadata.get(f"llama.{key}", default)
  if not isinstance(value, float) or not math.isfinite(value):
    raise errors.BadFileError(
      f"{file} has llama.{key}={reprlib.repr(value)}; it must be a finite"
      " number."
    )
  return _shortest(value)


def _shortest(value: float) -> float:
  """The shortest decimal of a float32: 1e-05 and not 9.99999974e-06."""
  with np.errstate(over="ignore"):
    return float(str(np.float32(value)))


def _with_rope_scaling(
  config: config_lib.LlamaConfig,
  metadata: Mapping[str, Any],
  source: weights.Source,
) -> config_lib.LlamaConfig:
  """Adds the scaling that the metadata or the table of factors says."""
  file = source.file
  kind = metadata.get("llama.rope.scaling.type", "linear")
  if kind not in ("none", "linear"):
    raise errors.BadFileError(
      f"{file} has llama.rope.scaling.type={reprlib.repr(kind)}; 'none',"
      f" 'linear' and Llama 3.1's {ROPE_FACTORS} are supported."
    )
  older = _real(metadata, "rope.scale_linear", file, 0.0)
  factor = _real(metadata, "rope.scaling.factor", file, older)
  linear = None
  # To llama.cpp a missing type is "linear", and 0 is no factor.
  if kind == "linear" and factor not in (0.0, 1.0):
    linear = config_lib.RopeScaling("linear", factor, None, None, None)
  table = source.tensors.get(ROPE_FACTORS)
  if table is None:
    return dataclasses.replace(config, rope_scaling=linear)
  half = config.head_dim // 2
  if table.shape != (half,):
    raise errors.BadFileError(
      f"{file}: tensor {ROPE_FACTORS} is {list(table.shape)} but"
      f" model.head_dim={config.head_dim} makes it [{half}]."
    )
  found = source.get(ROPE_FACTORS).astype(np.float64)
  if np.all(found == 1.0):
    return dataclasses.replace(config, rope_scaling=linear)
  original = metadata.get(
    "llama.rope.scaling.original_context_length", _ORIGINAL_CONTEXT
  )
  scaling = _recognised(config, found, original)
  if scaling is None or linear is not None:
    raise errors.BadFileError(
      f"{file}: {ROPE_FACTORS} (largest value {found.max():g}) is not Llama"
      f" 3.1's scaling with low_freq_factor={_LOW_FREQ_FACTOR:g},"
      f" high_freq_factor={_HIGH_FREQ_FACTOR:g}, original_context="
      f"{reprlib.repr(original)} and no linear factor beside it"
      f" at model.rope_theta={config.rope_theta:g}; no other is supported."
    )
  return dataclasses.replace(config, rope_scaling=scaling)


def _recognised(
  config: config_lib.LlamaConfig, divisors: np.ndarray, original: Any
) -> config_lib.RopeScaling | None:
  """The scaling of Llama 3.1 that has these divisors, if one has.

  llama.cpp keeps no parameters of it. The largest divisor is the factor; the
  rest is known, and the whole table must follow from it.
  """
  factor = _shortest(divisors.max())
  whole = isinstance(original, int) and original >= 1
  if not (whole and 1 < factor < math.inf):
    return None
  scaling = config_lib.RopeScaling(
    "llama3", factor, _LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, original
  )
  expected = _divisors(config, scaling)
  same = np.allclose(divisors, expected, rtol=_FACTORS_TOLERANCE, atol=0)
  return scaling if same else None


def _divisors(
  config: config_lib.LlamaConfig, scaling: config_lib.RopeScaling
) -> np.ndarray:
  """What each frequency of a plain config is divided by, float64 [H / 2]."""
  scaled = dataclasses.replace(config, rope_scaling=scaling)
  plain = proof.inverse_frequencies(config)
  return plain / proof.inverse_frequencies(scaled)
