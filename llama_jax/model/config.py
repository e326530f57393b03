"""What makes one Llama differ from another.

Every number here is owned by the architecture and has no default, so that a
value can only come from a preset, a checkpoint or a config file.
"""

import dataclasses
import json
import math
from typing import Any

from llama_jax import errors

ROPE_KINDS = ("llama3", "linear")
HEADS = ("words", "scalar")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """A stretching of the rotary frequencies.

  "linear" slows them all by factor (arXiv:2306.15595). "llama3" is Llama 3.1's
  (arXiv:2407.21783): wavelengths above original_context / low_freq_factor are
  slowed by factor, those below original_context / high_freq_factor stay, and
  those between are interpolated.

  Attributes:
    kind: one of ROPE_KINDS.
    factor: what the slowed frequencies are divided by.
    low_freq_factor, high_freq_factor, original_context: None for "linear".
  """

  kind: str
  factor: float
  low_freq_factor: float | None
  high_freq_factor: float | None
  original_context: int | None

  def __post_init__(self):
    if self.kind not in ROPE_KINDS:
      raise errors.ConfigError(
        f"model.rope_scaling.kind={self.kind!r} is not known; use one of"
        f" {', '.join(ROPE_KINDS)}."
      )
    if not 1 <= self.factor < math.inf:
      raise errors.ConfigError(
        f"model.rope_scaling.factor={self.factor} must be finite, 1 or more."
      )
    if self.kind == "linear":
      for name in ("low_freq_factor", "high_freq_factor", "original_context"):
        if getattr(self, name) is not None:
          raise errors.ConfigError(
            f"model.rope_scaling.{name}={getattr(self, name)} must be None:"
            " model.rope_scaling.kind=linear has a factor alone."
          )
      return
    low, high = self.low_freq_factor, self.high_freq_factor
    if low is None or high is None or not 0 < low < high < math.inf:
      raise errors.ConfigError(
        f"model.rope_scaling.low_freq_factor={low} must be positive and below"
        f" model.rope_scaling.high_freq_factor={high}."
      )
    original = self.original_context
    whole = isinstance(original, int) and not isinstance(original, bool)
    if not whole or original < 1:
      raise errors.ConfigError(
        f"model.rope_scaling.original_context={original!r} must be a whole"
        " number, 1 or more."
      )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """The shape of a decoder.

  Attributes:
    vocab_size: rows of the embedding.
    embed_dim: width of the residual stream.
    num_layers: decoder blocks.
    num_heads: query heads.
    num_kv_heads: key and value heads; 1 is MQA, num_heads is MHA.
    head_dim: width of one head, free of embed_dim // num_heads.
    mlp_dim: width of the gated MLP.
    norm_eps: added to the mean square in RMSNorm.
    rope_theta: base of the rotary wavelengths.
    rope_scaling: how they are stretched, or None.
    context_length: positions that the model was trained for.
    tied_embeddings: the head is the transposed embedding; means nothing with
      head="scalar".
    head: "words", a language model; or "scalar", a reward model (Llama 2,
      arXiv:2307.09288, 3.2.2): one number a token in place of the logits.
  """

  vocab_size: int
  embed_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  norm_eps: float
  rope_theta: float
  rope_scaling: RopeScaling | None
  context_length: int
  tied_embeddings: bool
  head: str = "words"

  def __post_init__(self):
    for name in (
      "vocab_size",
      "embed_dim",
      "num_layers",
      "num_heads",
      "num_kv_heads",
      "head_dim",
      "mlp_dim",
      "context_length",
    ):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise errors.ConfigError(
          f"model.{name}={value!r} must be a whole number, 1 or more."
        )
    if self.num_heads % self.num_kv_heads:
      raise errors.ConfigError(
        f"model.num_kv_heads={self.num_kv_heads} does not divide"
        f" model.num_heads={self.num_heads}; use a divisor of it."
      )
    if self.head_dim % 2:
      raise errors.ConfigError(
        f"model.head_dim={self.head_dim} must be even: RoPE rotates pairs."
      )
    if not self.norm_eps > 0:
      raise errors.ConfigError(
        f"model.norm_eps={self.norm_eps} must be positive."
      )
    if not self.rope_theta > 0:
      raise errors.ConfigError(
        f"model.rope_theta={self.rope_theta} must be positive."
      )
    if self.head not in HEADS:
      raise errors.ConfigError(
        f"model.head={self.head!r} is not known; use one of {', '.join(HEADS)}."
      )

  @property
  def num_groups(self) -> int:
    """Query heads that share one key and value head."""
    return self.num_heads // self.num_kv_heads

  def to_json(self) -> str:
    """This configuration as a JSON object, keys as the attributes."""
    return json.dumps(dataclasses.asdict(self), indent=2)

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> "LlamaConfig":
    """The inverse of dataclasses.asdict; refuses unknown or missing keys."""
    fields = dict(fields)
    if isinstance(scaling := fields.get("rope_scaling"), dict):
      # What version 0.1.0 wrote is Llama 3.1's and names no kind.
      scaling = {"kind": "llama3", **scaling}
      _check_names(RopeScaling, scaling, "model.rope_scaling")
      fields["rope_scaling"] = RopeScaling(**scaling)
    # Before there were reward models, none was said.
    fields = {"head": "words", **fields}
    _check_names(cls, fields, "model")
    return cls(**fields)


def _check_names(cls: type, fields: dict[str, Any], knob: str) -> None:
  names = {field.name for field in dataclasses.fields(cls)}
  missing, unknown = names - set(fields), set(fields) - names
  if missing or unknown:
    raise errors.ConfigError(
      f"{knob} has unknown fields {sorted(unknown)} and lacks"
      f" {sorted(missing)}; it takes {sorted(names)}."
    )
