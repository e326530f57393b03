"""config.json of a Hugging Face folder, of every version of transformers."""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax import errors
from llama_jax.model import config as config_lib

# model.head -> what transformers calls such a model.
ARCHITECTURES = {
  "words": "LlamaForCausalLM",
  "scalar": "LlamaForSequenceClassification",
}

# our field: names that config.json gives it, newest first
_FIELDS = {
  "vocab_size": ("vocab_size",),
  "embed_dim": ("hidden_size",),
  "num_layers": ("num_hidden_layers",),
  "num_heads": ("num_attention_heads",),
  "mlp_dim": ("intermediate_size",),
  "norm_eps": ("rms_norm_eps",),
  # max_sequence_length: the first conversions of Llama 1.
  "context_length": ("max_position_embeddings", "max_sequence_length"),
}

# Values under which a config.json describes a Llama; a missing key means the
# first, as in transformers' LlamaConfig.
_REQUIRED = {
  "model_type": ("llama",),
  "hidden_act": ("silu", "swish"),
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "partial_rotary_factor": (1.0, None),
  "sliding_window": (None, False),
  "num_local_experts": (None, 0),
  "quantization_config": (None,),
}
# What transformers takes a missing rope_theta to mean (Llama 1 lacks it).
_ROPE_THETA = 10000.0
# kind of scaling: our field -> the name that config.json gives it
_SCALING_FIELDS = {
  "linear": {"factor": "factor"},
  "llama3": {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
  },
}


def parse(fields: Mapping[str, Any], file: str) -> config_lib.LlamaConfig:
  """The configuration in the fields of the config.json that is called file.

  Raises:
    BadFileError: they are not those of a Llama, or contradict each other.
  """
  head = _head(fields, file)
  _refuse_other_models(fields, file)

  def field(*keys: str) -> Any:
    for key in keys:
      if fields.get(key) is not None:
        return fields[key]
    raise errors.BadFileError(f"{file} lacks {keys[0]}.")

  ours = {name: field(*keys) for name, keys in _FIELDS.items()}
  num_heads, embed_dim = ours["num_heads"], ours["embed_dim"]
  for name, value in (
    ("num_attention_heads", num_heads),
    ("hidden_size", embed_dim),
  ):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise errors.BadFileError(
        f"{file} has {name}={value!r}; it must be a whole number, 1 or more."
      )
  head_dim = fields.get("head_dim")
  num_kv_heads = fields.get("num_key_value_heads")
  ours["norm_eps"] = _real(ours["norm_eps"], "rms_norm_eps", file)
  ours["head_dim"] = embed_dim // num_heads if head_dim is None else head_dim
  ours["num_kv_heads"] = num_heads if num_kv_heads is None else num_kv_heads
  ours["tied_embeddings"] = bool(fields.get("tie_word_embeddings", False))
  ours["rope_theta"], ours["rope_scaling"] = _rope(fields, file)
  ours["head"] = head
  try:
    return config_lib.LlamaConfig(**ours)
  except errors.ConfigError as error:
    raise errors.BadFileError(f"{file}: {error}") from error


def write_fields(
  config: config_lib.LlamaConfig, dtype: np.dtype
) -> dict[str, Any]:
  """config.json of weights of dtype, as transformers 4 and 5 want it."""
  fields: dict[str, Any] = {
    "architectures": [ARCHITECTURES[config.head]],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "head_dim": config.head_dim,
    "num_key_value_heads": config.num_kv_heads,
    "tie_word_embeddings": config.tied_embeddings,
    "rope_theta": config.rope_theta,
  }
  for ours, theirs in _FIELDS.items():
    fields[theirs[0]] = getattr(config, ours)
  scaling = None
  if config.rope_scaling is not None:
    kind = config.rope_scaling.kind
    scaling = {"rope_type": kind}
    for ours, theirs in _SCALING_FIELDS[kind].items():
      scaling[theirs] = getattr(config.rope_scaling, ours)
  fields["rope_scaling"] = scaling
  fields["rope_parameters"] = {
    "rope_theta": config.rope_theta,
    **(scaling or {"rope_type": "default"}),
  }
  if config.head == "scalar":
    fields |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
  fields["torch_dtype"] = fields["dtype"] = dtype.name
  return fields


def _head(fields: Mapping[str, Any], file: str) -> str:
  """The model.head of the named architecture; a language model's if none is.

  A reward model is a classifier of one label; transformers takes one that
  does not say how many for a classifier of two.
  """
  named = fields.get("architectures")
  if named is None:
    return "words"
  heads = [head for head, name in ARCHITECTURES.items() if named == [name]]
  if not heads:
    raise errors.BadFileError(
      f"{file} has architectures={reprlib.repr(named)}; only"
      f" {' and '.join(str([name]) for name in ARCHITECTURES.values())} are"
      " supported."
    )
  if heads == ["scalar"]:
    labels = fields.get("id2label")
    stated = isinstance(labels, dict)
    count = len(labels) if stated else fields.get("num_labels", 2)
    if count != 1:
      raise errors.BadFileError(
        f"{file} is no reward model: it is a classifier of"
        f" {reprlib.repr(count)} labels (id2label), where 1 is supported."
      )
  return heads[0]


def _refuse_other_models(fields: Mapping[str, Any], file: str) -> None:
  if fields.get("architectures") is None and "model_type" not in fields:
    raise errors.BadFileError(
      f"{file} names neither architectures nor model_type, so it is no model"
      " of transformers."
    )
  for key, allowed in _REQUIRED.items():
    value = fields.get(key, allowed[0])
    if value not in allowed:
      raise errors.BadFileError(
        f"{file} is not a plain Llama: {key}={reprlib.repr(value)}, where"
        f" {allowed[0]!r} is supported."
      )


def _rope(
  fields: Mapping[str, Any], file: str
) -> tuple[float, config_lib.RopeScaling | None]:
  """(rope_theta, scaling) of either era; both at once must agree."""
  for key in ("rope_scaling", "rope_parameters"):
    if not isinstance(fields.get(key), dict | None):
      raise errors.BadFileError(f"{file} has {key}={fields[key]!r}.")
  old = fields.get("rope_scaling") or {}
  new = fields.get("rope_parameters") or {}
  thetas = [
    _real(value, "rope_theta", file)
    for value in (
      fields.get("rope_theta"),
      old.get("rope_theta"),
      new.get("rope_theta"),
    )
    if value is not None
  ]
  scalings = [_scaling(one, file) for one in (old, new) if one]
  if len(set(thetas)) > 1 or len(set(scalings)) > 1:
    raise errors.BadFileError(
      f"{file} contradicts itself: rope_theta={fields.get('rope_theta')!r},"
      f" rope_scaling={old or None!r} and rope_parameters={new!r}."
    )
  theta = thetas[0] if thetas else _ROPE_THETA
  return theta, scalings[0] if scalings else None


def _scaling(
  rope: Mapping[str, Any], file: str
) -> config_lib.RopeScaling | None:
  kind = rope.get("rope_type", rope.get("type", "default"))
  if rope.get("partial_rotary_factor") not in (None, 1.0):
    raise errors.BadFileError(
      f"{file} is not a plain Llama: partial_rotary_factor="
      f"{rope['partial_rotary_factor']!r}, where 1.0 is supported."
    )
  if kind in ("default", None):
    return None
  if not isinstance(kind, str) or kind not in _SCALING_FIELDS:
    allowed = ", ".join(repr(one) for one in ("default", *_SCALING_FIELDS))
    raise errors.BadFileError(
      f"{file} has the rope type {reprlib.repr(kind)}; {allowed} are supported."
    )
  fields = dataclasses.fields(config_lib.RopeScaling)
  values: dict[str, Any] = {field.name: None for field in fields}
  for ours, theirs in _SCALING_FIELDS[kind].items():
    values[ours] = _real(rope.get(theirs), f"rope {theirs}", file)
  values["kind"] = kind
  original = values["original_context"]
  if original is not None and not original.is_integer():
    raise errors.BadFileError(
      f"{file} has original_max_position_embeddings={original!r}; it must be"
      " a whole number."
    )
  values["original_context"] = None if original is None else int(original)
  try:
    return config_lib.RopeScaling(**values)
  except errors.ConfigError as error:
    raise errors.BadFileError(f"{file}: {error}") from error


def _real(value: Any, name: str, file: str) -> float:
  number = isinstance(value, int | float) and not isinstance(value, bool)
  # Past 1e300 a whole number of JSON overflows float().
  if not number or not abs(value) < 1e300:
    raise errors.BadFileError(
      f"{file} has {name}={reprlib.repr(value)}; it must be a finite number."
    )
  return float(value)
