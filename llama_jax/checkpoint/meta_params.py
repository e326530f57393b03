"""params.json of Meta's checkpoints: what it says, and saying it.

What we write has llama_jax.json beside it, which Meta's code does not look at;
it says what params.json cannot.
"""

import dataclasses
import math
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any

from llama_jax import errors
from llama_jax.model import config as config_lib
from llama_jax.text import files

PARAMS, OURS = "params.json", "llama_jax.json"
# What Llama 1 and 2 mean by saying nothing.
ROPE_THETA = 1e4

# Built into Meta's code: Llama 3.1 to 3.3 differ in the factor alone.
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _ORIGINAL_CONTEXT = 1.0, 4.0, 8192

_KEYS = {
  "dim",
  "n_layers",
  "n_heads",
  "n_kv_heads",
  "vocab_size",
  "multiple_of",
  "ffn_dim_multiplier",
  "norm_eps",
  "rope_theta",
  "use_scaled_rope",
  "rope_scaling_factor",
  "rope_high_freq_factor",
  # Of the run and not of the model.
  "max_batch_size",
  "max_seq_len",
  "model_parallel_size",
}


@dataclasses.dataclass(frozen=True)
class Said:
  """What the files say by themselves; None where they do not.

  Attributes:
    file: params.json, as messages call it.
    embed_dim, num_layers, num_heads, num_kv_heads, norm_eps, rope_theta: as
      in LlamaConfig.
    vocab_size: as in LlamaConfig.
    scaled: whether the rotary frequencies are stretched.
    factor: by how much.
    multiple_of, multiplier: of Meta's rule for mlp_dim.
    context_length, tied_embeddings: from llama_jax.json.
  """

  file: str
  embed_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  norm_eps: float
  rope_theta: float
  vocab_size: int | None
  scaled: bool
  factor: float | None
  multiple_of: int | None
  multiplier: float | None
  context_length: int | None
  tied_embeddings: bool | None

  @property
  def head_dim(self) -> int:
    return self.embed_dim // self.num_heads


def mlp_dim(embed_dim: int, multiple_of: int, multiplier: float | None) -> int:
  """Meta's rule (RECIPES: the sizes)."""
  width = int(2 * (4 * embed_dim) / 3)
  if multiplier is not None:
    width = int(multiplier * width)
  return -(-width // multiple_of) * multiple_of


def read(folder: pathlib.Path) -> Said:
  """What the folder's params.json says, and our own file if there is one.

  Raises:
    BadFileError: they are missing, malformed, or those of no plain Llama.
  """
  file = folder / PARAMS
  fields = files.read_json(file, files.no_doubles)
  if unknown := sorted(set(fields) - _KEYS):
    raise errors.BadFileError(
      f"{file} holds {unknown[0][:60]!r}, which no plain Llama has; take it out"
      " if it changes nothing."
    )
  whole, real = _readers(fields, str(file))
  embed_dim, num_heads = whole("dim"), whole("n_heads")
  if embed_dim % num_heads:
    raise errors.BadFileError(
      f"{file} has dim={embed_dim}, which n_heads={num_heads} does not divide."
    )
  if real("rope_high_freq_factor", _HIGH_FREQ_FACTOR) != _HIGH_FREQ_FACTOR:
    raise errors.BadFileError(
      f"{file} has rope_high_freq_factor="
      f"{fields['rope_high_freq_factor']!r}; {_HIGH_FREQ_FACTOR} is supported."
    )
  scaled = fields.get("use_scaled_rope", False)
  if not isinstance(scaled, bool):
    raise errors.BadFileError(f"{file} has use_scaled_rope={scaled!r:.60}.")
  unsaid = fields.get("vocab_size") in (None, -1)
  ours = {}
  if (folder / OURS).exists():
    ours = files.read_json(folder / OURS, files.no_doubles)
    tied = ours.get("tied_embeddings")
    context, _ = _readers(ours, str(folder / OURS))
    if set(ours) != {"context_length", "tied_embeddings"} or (
      not isinstance(tied, bool)
    ):
      raise errors.BadFileError(
        f"{folder / OURS} must say context_length and tied_embeddings (true or"
        " false), and no more."
      )
    context("context_length")
  return Said(
    file=str(file),
    embed_dim=embed_dim,
    num_layers=whole("n_layers"),
    num_heads=num_heads,
    num_kv_heads=whole("n_kv_heads", num_heads),
    norm_eps=real("norm_eps"),
    rope_theta=real("rope_theta", ROPE_THETA),
    vocab_size=None if unsaid else whole("vocab_size"),
    scaled=scaled,
    factor=real("rope_scaling_factor", None) if scaled else None,
    multiple_of=whole("multiple_of", None),
    multiplier=real("ffn_dim_multiplier", None),
    context_length=ours.get("context_length"),
    tied_embeddings=ours.get("tied_embeddings"),
  )


def _readers(fields: Mapping[str, Any], file: str):
  """Two functions that take a key of the fields and its value if absent."""

  def whole(key: str, *absent: int | None) -> Any:
    value = given(key, *absent)
    if value is None:
      return None
    if type(value) is not int or not 1 <= value < 1 << 40:
      raise errors.BadFileError(
        f"{file} has {key}={reprlib.repr(value)}; it must be a whole number, 1"
        " or more."
      )
    return value

  def real(key: str, *absent: float | None) -> Any:
    value = given(key, *absent)
    if value is None:
      return None
    # What is larger means nothing, and may overflow in Meta's rule.
    if type(value) not in (int, float) or not 0 < value < 1e30:
      raise errors.BadFileError(
        f"{file} has {key}={reprlib.repr(value)}; it must be a number above 0,"
        " below 1e30."
      )
    return float(value)

  def given(key: str, *absent: Any) -> Any:
    value = fields.get(key)
    if value is None and not absent:
      raise errors.BadFileError(f"{file} lacks {key}.")
    return absent[0] if value is None else value

  return whole, real


def scaling(factor: float) -> config_lib.RopeScaling:
  return config_lib.RopeScaling(
    kind="llama3",
    factor=factor,
    low_freq_factor=_LOW_FREQ_FACTOR,
    high_freq_factor=_HIGH_FREQ_FACTOR,
    original_context=_ORIGINAL_CONTEXT,
  )


def write_fields(
  config: config_lib.LlamaConfig,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The fields of params.json and of llama_jax.json.

  rope_theta is always said: Meta's Llama 3 code takes a missing one for 5e5,
  so that of Llama 2, which does not know the key, asks for its removal.
  Meta's code also has the factor 8 built in and does not read
  rope_scaling_factor, which is there for us and other readers.

  Raises:
    ConfigError: the configuration cannot be said in params.json.
  """
  if config.head_dim * config.num_heads != config.embed_dim:
    raise errors.ConfigError(
      f"model.head_dim={config.head_dim} cannot be written to {PARAMS}, where"
      f" it is model.embed_dim={config.embed_dim} / model.num_heads="
      f"{config.num_heads}; write hf: or gguf: instead."
    )
  multiple_of, multiplier = _rule(config.embed_dim, config.mlp_dim)
  fields: dict[str, Any] = {
    "dim": config.embed_dim,
    "n_layers": config.num_layers,
    "n_heads": config.num_heads,
    "n_kv_heads": config.num_kv_heads,
    "vocab_size": config.vocab_size,
    "multiple_of": multiple_of,
    "norm_eps": config.norm_eps,
    "rope_theta": config.rope_theta,
  }
  if multiplier is not None:
    fields["ffn_dim_multiplier"] = multiplier
  stretch = config.rope_scaling
  if stretch is not None:
    if stretch != scaling(stretch.factor):
      raise errors.ConfigError(
        f"model.rope_scaling={stretch} cannot be written to {PARAMS}: Meta's"
        f" code knows low_freq_factor={_LOW_FREQ_FACTOR}, high_freq_factor="
        f"{_HIGH_FREQ_FACTOR} and original_context={_ORIGINAL_CONTEXT} alone;"
        " write hf: instead."
      )
    fields |= {"use_scaled_rope": True, "rope_scaling_factor": stretch.factor}
  return fields, {
    "context_length": config.context_length,
    "tied_embeddings": config.tied_embeddings,
  }


def _rule(embed_dim: int, width: int) -> tuple[int, float | None]:
  """(multiple_of, ffn_dim_multiplier) by which Meta's rule gives a width.

  Those of Meta's own models where they do.
  """
  for multiplier in (None, 1.3, 1.2, 1.5):
    for multiple_of in (256, 1024, 4096):
      if mlp_dim(embed_dim, multiple_of, multiplier) == width:
        return multiple_of, multiplier
  # Rounded up to a multiple of itself, whatever is at most the width becomes
  # the width; half of it stays clear of how the product is rounded.
  plain = int(2 * (4 * embed_dim) / 3)
  multiplier = None if plain <= width else math.ceil(width / 2) / plain
  if mlp_dim(embed_dim, width, multiplier) != width:
    raise errors.ConfigError(
      f"model.mlp_dim={width} cannot be written to {PARAMS} with"
      f" model.embed_dim={embed_dim}; write hf: or gguf: instead."
    )
  return width, multiplier
