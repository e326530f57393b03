"""llama_jax: the LLaMA family in JAX.

import llama_jax
llama = llama_jax.load("gguf:FILE")   # .config, .params, .tokenizer
logits = llama.logits(ids)            # int [B, T] -> float32 [B, T, vocab]
text = llama.generate("The capital of France is", max_new_tokens=8)
tokenizer = llama_jax.load_tokenizer("PATH")
"""

__version__ = "0.1.0"


def load(reference: str, *, dtype: str = "float32"):
  """A llama.Llama from orbax:DIR, hf:DIR or gguf:FILE (see llama.load)."""
  from llama_jax import llama

  return llama.load(reference, dtype=dtype)


def load_tokenizer(path):
  """A text.Tokenizer from a file or a model folder, told by its content."""
  from llama_jax import text

  return text.load_tokenizer(path)
