"""Published sizes by name: a table to read, each row with its source.

Widths of the feed-forward layer are the result of Meta's rule (2/3 of 4 times
the width, a multiplier, rounded up), as the released weights have them.
"""

import dataclasses
import difflib
import re

from llama_jax import errors
from llama_jax.model import config as config_lib

# Llama 3.1, 3.2 and 3.3 differ in the factor alone (arXiv:2407.21783, and the
# config.json of each release).
_SCALING_8, _SCALING_32 = (
  config_lib.RopeScaling(
    kind="llama3",
    factor=factor,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_context=8192,
  )
  for factor in (8.0, 32.0)
)


def _size(
  embed_dim: int,
  num_layers: int,
  num_heads: int,
  num_kv_heads: int,
  mlp_dim: int,
  vocab_size: int,
  norm_eps: float,
  rope_theta: float,
  context_length: int,
  *,
  rope_scaling: config_lib.RopeScaling | None = None,
  tied_embeddings: bool = False,
  head_dim: int | None = None,
) -> config_lib.LlamaConfig:
  return config_lib.LlamaConfig(
    vocab_size=vocab_size,
    embed_dim=embed_dim,
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim or embed_dim // num_heads,
    mlp_dim=mlp_dim,
    norm_eps=norm_eps,
    rope_theta=rope_theta,
    rope_scaling=rope_scaling,
    context_length=context_length,
    tied_embeddings=tied_embeddings,
  )


# width, layers, heads, kv heads, ffn, vocabulary, eps, theta, context
# fmt: off
SIZES: dict[str, config_lib.LlamaConfig] = {
  # Not published: a size for tests and dry runs, with GQA and an odd head_dim.
  "nano": _size(64, 2, 4, 2, 192, 512, 1e-5, 1e4, 256,
                tied_embeddings=True, head_dim=24),
  # Not published: ten million, for an hour on two cores.
  "llama-10m": _size(256, 10, 8, 4, 768, 8192, 1e-5, 5e5, 1024,
                     tied_embeddings=True),
  # LLaMA, arXiv:2302.13971, table 2; params.json of the release.
  "llama-7b": _size(4096, 32, 32, 32, 11008, 32000, 1e-6, 1e4, 2048),
  "llama-13b": _size(5120, 40, 40, 40, 13824, 32000, 1e-6, 1e4, 2048),
  "llama-33b": _size(6656, 60, 52, 52, 17920, 32000, 1e-6, 1e4, 2048),
  "llama-65b": _size(8192, 80, 64, 64, 22016, 32000, 1e-5, 1e4, 2048),
  # Llama 2, arXiv:2307.09288, table 1; 34B was never released.
  "llama2-7b": _size(4096, 32, 32, 32, 11008, 32000, 1e-5, 1e4, 4096),
  "llama2-13b": _size(5120, 40, 40, 40, 13824, 32000, 1e-5, 1e4, 4096),
  "llama2-34b": _size(8192, 48, 64, 8, 22016, 32000, 1e-5, 1e4, 4096),
  "llama2-70b": _size(8192, 80, 64, 8, 28672, 32000, 1e-5, 1e4, 4096),
  # Code Llama, arXiv:2308.12950. The 16 words more are for infilling. 34B is
  # one for all variants; 70B Python and Instruct were not long-context tuned.
  "codellama-7b": _size(4096, 32, 32, 32, 11008, 32016, 1e-5, 1e6, 16384),
  "codellama-7b-python": _size(4096, 32, 32, 32, 11008, 32000, 1e-5, 1e6,
                               16384),
  "codellama-13b": _size(5120, 40, 40, 40, 13824, 32016, 1e-5, 1e6, 16384),
  "codellama-13b-python": _size(5120, 40, 40, 40, 13824, 32000, 1e-5, 1e6,
                                16384),
  "codellama-34b": _size(8192, 48, 64, 8, 22016, 32000, 1e-5, 1e6, 16384),
  "codellama-70b": _size(8192, 80, 64, 8, 28672, 32016, 1e-5, 1e6, 16384),
  "codellama-70b-python": _size(8192, 80, 64, 8, 28672, 32016, 1e-5, 1e4,
                                4096),
  # Llama 3, arXiv:2407.21783, table 3; 3.1 to 3.3 by their config.json.
  "llama3-8b": _size(4096, 32, 32, 8, 14336, 128256, 1e-5, 5e5, 8192),
  "llama3-70b": _size(8192, 80, 64, 8, 28672, 128256, 1e-5, 5e5, 8192),
  "llama3.1-8b": _size(4096, 32, 32, 8, 14336, 128256, 1e-5, 5e5, 131072,
                       rope_scaling=_SCALING_8),
  "llama3.1-70b": _size(8192, 80, 64, 8, 28672, 128256, 1e-5, 5e5, 131072,
                        rope_scaling=_SCALING_8),
  "llama3.1-405b": _size(16384, 126, 128, 8, 53248, 128256, 1e-5, 5e5, 131072,
                         rope_scaling=_SCALING_8),
  "llama3.2-1b": _size(2048, 16, 32, 8, 8192, 128256, 1e-5, 5e5, 131072,
                       rope_scaling=_SCALING_32, tied_embeddings=True),
  "llama3.2-3b": _size(3072, 28, 24, 8, 8192, 128256, 1e-5, 5e5, 131072,
                       rope_scaling=_SCALING_32, tied_embeddings=True),
  # huggingface.co/HuggingFaceTB/SmolLM2-135M, config.json.
  "smollm2-135m": _size(576, 30, 9, 3, 1536, 49152, 1e-5, 1e5, 8192,
                        tied_embeddings=True),
}
# fmt: on
SIZES["codellama-70b-instruct"] = SIZES["codellama-70b-python"]
SIZES["llama3.3-70b"] = SIZES["llama3.1-70b"]

# What users, hubs and Meta's own folders put around a name.
_NOISE = (
  (r"^.*/", ""),
  (r"[_ ]", "-"),
  (r"^meta-", ""),
  (r"^code-llama", "codellama"),
  (r"^llama-?1-", "llama-"),
  (r"^llama-(2|3|3\.[123])-", r"llama\1-"),
  (r"^llama-30b", "llama-33b"),
  (r"-(hf|fp16|bf16)$", ""),
)
_VARIANTS = r"-(chat|instruct|base|text|python|v\d(\.\d)?)$"


def resolve(name: str) -> str:
  """The key of SIZES that a user's spelling means.

  Takes the hubs' names ("meta-llama/Llama-3.2-1B-Instruct") and variants that
  share their base's shape ("llama2-70b-chat").

  Raises:
    ConfigError: with the nearest names there are.
  """
  found = name.strip().lower()
  for pattern, plain in _NOISE:
    found = re.sub(pattern, plain, found)
  while found not in SIZES and re.search(_VARIANTS, found):
    found = re.sub(_VARIANTS, "", found)
  if found not in SIZES:
    near = difflib.get_close_matches(found, SIZES, n=3, cutoff=0.6)
    hint = f"the nearest are {', '.join(near)}; " if near else ""
    raise errors.ConfigError(
      f"model.size={name!r} is not known; {hint}use one of {', '.join(SIZES)}."
    )
  return found


def get(name: str) -> config_lib.LlamaConfig:
  """The size of this name; raises ConfigError with the names there are."""
  return SIZES[resolve(name)]


def nearest(
  config: config_lib.LlamaConfig,
) -> tuple[str, dict[str, tuple[object, object]]]:
  """(the preset most like it, field -> (its value, the preset's) that differ).

  Where several are alike, the first of the table.
  """
  best: tuple[str, dict[str, tuple[object, object]]] | None = None
  for name, size in SIZES.items():
    differs = {
      field.name: (getattr(config, field.name), getattr(size, field.name))
      for field in dataclasses.fields(config)
      if getattr(config, field.name) != getattr(size, field.name)
    }
    if best is None or len(differs) < len(best[1]):
      best = (name, differs)
  assert best is not None
  return best
