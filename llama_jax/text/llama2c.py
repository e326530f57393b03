"""llama2.c's tokenizer.bin: a SentencePiece vocabulary without its settings.

Format (github.com/karpathy/llama2.c, tokenizer.py): int32 length of the longest
token, then for each token float32 score, int32 length, bytes; little-endian.
A space stands for SentencePiece's mark, and bos and eos have line ends around.
"""

import math
import struct
from typing import Any

from llama_jax.text import gguf_fields

_HEAD = struct.Struct("<i")
_ENTRY = struct.Struct("<fi")
_MAX_TOKEN_BYTES = 4096
_SPACE = "\u2581"
_BYTES = range(3, 259)  # as Llama's: unk, bos, eos, then the bytes


def is_vocabulary(content: bytes) -> bool:
  """Whether a file holds such entries from its first byte to its last."""
  return _entries(content) is not None


def metadata(content: bytes) -> dict[str, Any]:
  """The vocabulary in GGUF's words; see sentencepiece_bpe.from_gguf_metadata.

  The file does not say how SentencePiece normalised: a space before the first
  word, as llama2.c puts it, and runs of spaces kept.
  """
  tokens, scores, kinds = [], [], []
  for id, (score, token) in enumerate(_entries(content) or ()):
    text = token.decode("utf-8", "replace").replace(" ", _SPACE)
    kind = gguf_fields.NORMAL
    if id == 0:
      kind = gguf_fields.UNKNOWN
    elif id < _BYTES.start:
      text, kind = text.strip("\n"), gguf_fields.CONTROL
    elif id in _BYTES and text == f"<0x{id - _BYTES.start:02X}>":
      kind = gguf_fields.BYTE
    tokens.append(text)
    scores.append(score)
    kinds.append(kind)
  return {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.scores": scores,
    "tokenizer.ggml.token_type": kinds,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
  }


def _entries(content: bytes) -> list[tuple[float, bytes]] | None:
  """(score, token) of each entry; None if the bytes are no such file."""
  if len(content) < _HEAD.size:
    return None
  (longest,) = _HEAD.unpack_from(content)
  entries = []
  at = _HEAD.size
  while at < len(content):
    if len(content) - at < _ENTRY.size:
      return None
    score, size = _ENTRY.unpack_from(content, at)
    at += _ENTRY.size
    token = content[at : at + size] if 0 <= size <= _MAX_TOKEN_BYTES else b""
    if len(token) != size or not math.isfinite(score):
      return None
    at += size
    entries.append((score, token))
  if not 0 < longest <= _MAX_TOKEN_BYTES or len(entries) < _BYTES.stop:
    return None
  return entries
