"""Published sizes by name. Each row cites its source.

The whole family's table is transcribed in a later release; these are the sizes
that today's commands need.
"""

from llama_jax import errors
from llama_jax.model import config as config_lib

SIZES: dict[str, config_lib.LlamaConfig] = {
  # Not published: a size for tests and dry runs, with GQA and an odd head_dim.
  "nano": config_lib.LlamaConfig(
    vocab_size=512,
    embed_dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    mlp_dim=192,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    context_length=256,
    tied_embeddings=True,
  ),
  # huggingface.co/HuggingFaceTB/SmolLM2-135M, config.json.
  "smollm2-135m": config_lib.LlamaConfig(
    vocab_size=49152,
    embed_dim=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    norm_eps=1e-5,
    rope_theta=1e5,
    rope_scaling=None,
    context_length=8192,
    tied_embeddings=True,
  ),
}


def get(name: str) -> config_lib.LlamaConfig:
  """The size of this name; raises ConfigError with the names there are."""
  if name not in SIZES:
    raise errors.ConfigError(
      f"model.size={name!r} is not known; use one of {', '.join(SIZES)}."
    )
  return SIZES[name]
