"""A SentencePiece BPE model that was written as tokenizer.json -> GGUF.

Transformers 5 saves Llama 1 and 2 so, without their tokenizer.model. The order
of its merges stands for the scores, of which only the order matters.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax import errors
from llama_jax.text import byte_level, gguf_fields
from llama_jax.text import tokenizer as tokenizer_lib

_SPACE = "\u2581"
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def write(
  spec: Mapping[str, Any], tokenizer: tokenizer_lib.Tokenizer
) -> dict[str, Any]:
  """What sentencepiece_gguf.read reads; see Tokenizer.gguf_metadata.

  spec: the document, with every special token among its added tokens. One that
  cuts by "Metaspace" puts no space before a text that starts with one, nor
  ("first") after special tokens. SentencePiece and llama.cpp do, and so does
  what is read back: these texts alone get other ids, those of Meta's own code.

  Raises:
    UserError: the document is no such model.
  """
  model = spec["model"]
  if not byte_level.is_bpe(spec) or model.get("ignore_merges"):
    raise _refusal("is not plain BPE")
  merges = [byte_level.pair(merge) for merge in model["merges"]]
  ranks = _ranks(["".join(merge) for merge in merges])
  tokens = gguf_fields.blank(tokenizer.vocab_size)
  kinds = [gguf_fields.UNUSED] * len(tokens)
  scores = [float(-len(merges) - 1)] * len(tokens)
  for text, id in model["vocab"].items():
    tokens[id], kinds[id] = text, gguf_fields.NORMAL
    if text in ranks:
      scores[id] = float(-ranks[text])
    elif _BYTE.fullmatch(text):
      kinds[id] = gguf_fields.BYTE
  plain = []
  for token in spec["added_tokens"]:
    text, id = token["content"], token["id"]
    tokens[id], scores[id] = text, 0.0
    if token["special"]:
      kinds[id] = gguf_fields.CONTROL
    else:
      kinds[id] = gguf_fields.USER_DEFINED
      plain.append(text)
    if text == model.get("unk_token"):
      kinds[id] = gguf_fields.UNKNOWN
  vocabulary = {
    "model": "llama",
    "pre": "default",
    "tokens": tokens,
    "scores": scores,
    "token_type": kinds,
    "add_space_prefix": _has_prefix(spec),
  }
  if plain:
    vocabulary["added_tokens"] = plain
  return gguf_fields.write(tokenizer, vocabulary)


def _ranks(made: Sequence[str]) -> dict[str, int]:
  """Rank of each token that merges make, in their order.

  The merges of one token stand together. Where those of several are mixed,
  these had one score.
  """
  last = {text: n for n, text in enumerate(made)}
  ranks: dict[str, int] = {}
  rank, end = -1, -1
  for n, text in enumerate(made):
    if n > end:
      rank += 1
    end = max(end, last[text])
    ranks[text] = rank
  return ranks


def _has_prefix(spec: Mapping[str, Any]) -> bool:
  """Whether a text starts with a space that it does not have."""
  cut, normalizer = spec.get("pre_tokenizer"), spec.get("normalizer")
  if isinstance(cut, dict) and not normalizer:
    scheme = cut.get("prepend_scheme", "always")
    if cut == {
      "type": "Metaspace",
      "replacement": _SPACE,
      "prepend_scheme": scheme,
      "split": False,
    }:
      return scheme != "never"
  elif isinstance(normalizer, dict) and not cut:
    steps = normalizer.get("normalizers", [normalizer])
    if steps in ([_PREPEND, _REPLACE], [_REPLACE]):
      return _PREPEND in steps
  raise _refusal("changes or cuts text in a way that SentencePiece has not")


def _refusal(why: str) -> errors.UserError:
  return errors.UserError(
    f"GGUF cannot hold this tokenizer: its tokenizer.json {why}. If the model"
    " has a tokenizer.model, put it beside."
  )
