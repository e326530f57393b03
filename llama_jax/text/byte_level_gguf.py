"""A byte-level BPE document <-> tokenizer.ggml.* of a GGUF file."""

from collections.abc import Mapping
from typing import Any

from llama_jax import errors
from llama_jax.text import byte_level, gguf_fields
from llama_jax.text import folder as folder_lib
from llama_jax.text import tokenizer as tokenizer_lib


def read(
  fields: Mapping[str, Any], name: str
) -> tuple[dict[str, Any], folder_lib.Settings]:
  """The document, and what the fields say beside it.

  fields: key -> plain value; `name` of the file is for messages.

  Raises:
    BadFileError: a field is missing or contradicts another.
    UserError: the way it cuts text into words is not known here.
  """
  cut = fields.get("tokenizer.ggml.pre", "default")
  if cut not in byte_level.CUTS:
    raise errors.UserError(
      f"{name}: tokenizer.ggml.pre={cut!r} is not known here; known are"
      f" {', '.join(sorted(byte_level.CUTS))}. Load the model's tokenizer.json"
      " instead."
    )
  tokens, kinds = gguf_fields.read_tokens(fields, name)
  merges = fields.get("tokenizer.ggml.merges")
  if merges is None:
    raise errors.BadFileError(f"{name}: tokenizer.ggml.merges is needed.")
  pairs = [byte_level.pair(m) for m in merges]
  if any(len(pair) != 2 for pair in pairs):
    raise errors.BadFileError(
      f"{name}: tokenizer.ggml.merges must be pairs with a space between."
    )
  settings = gguf_fields.read_settings(
    fields, tokens, name, add_bos=cut in byte_level.WHOLE_WORDS
  )
  named = settings.conventions.named.values()
  hidden = (gguf_fields.CONTROL, gguf_fields.UNKNOWN)
  added = [
    byte_level.added_token(text, id, special=kind in hidden or text in named)
    for id, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
    if kind in (*hidden, gguf_fields.USER_DEFINED) or text in named
  ]
  # Of a text that occurs twice the first id counts. UNUSED ids are holes.
  vocab = {
    text: id
    for id, text in reversed(list(enumerate(tokens)))
    if kinds[id] != gguf_fields.UNUSED
  }
  return byte_level.document(cut, vocab, pairs, added), settings


def write(
  spec: Mapping[str, Any], tokenizer: tokenizer_lib.Tokenizer
) -> dict[str, Any]:
  """What `read` reads; see Tokenizer.gguf_metadata.

  spec: the document, with every special token among its added tokens.

  Raises:
    UserError: llama.cpp knows no such scheme.
  """
  model = spec["model"]
  cut = byte_level.cut_name(spec)
  if cut is None:
    raise errors.UserError(
      "GGUF cannot hold this tokenizer: llama.cpp has no name that we know for"
      f" the way it cuts text, {_shortened(spec.get('pre_tokenizer'))}; known"
      f" are the cuts of {', '.join(byte_level.CUTS)}. Keep it as"
      " tokenizer.json beside the weights (hf:)."
    )
  for part in ("normalizer", "continuing_subword_prefix", "end_of_word_suffix"):
    if spec.get(part) or model.get(part):
      raise errors.UserError(
        f"GGUF cannot hold this tokenizer: llama.cpp has no {part} for"
        " byte-level BPE. Keep it as tokenizer.json beside the weights (hf:)."
      )
  tokens = gguf_fields.blank(tokenizer.vocab_size)
  kinds = [gguf_fields.UNUSED] * len(tokens)
  for text, id in model["vocab"].items():
    tokens[id], kinds[id] = text, gguf_fields.NORMAL
  for token in spec["added_tokens"]:
    tokens[token["id"]] = token["content"]
    kinds[token["id"]] = (
      gguf_fields.CONTROL if token["special"] else gguf_fields.USER_DEFINED
    )
  return gguf_fields.write(
    tokenizer,
    {
      "model": "gpt2",
      "pre": cut,
      "tokens": tokens,
      "token_type": kinds,
      "merges": [
        " ".join(map(str, byte_level.pair(m))) for m in model["merges"]
      ],
      "add_space_prefix": False,
    },
  )


def _shortened(value: Any) -> str:
  text = str(value)
  return text if len(text) <= 200 else text[:200] + "..."
