"""Byte-level BPE in writing: letters for bytes, cuts, the document.

What tokenizer.json, GGUF and a file of ranks say of one and the same scheme.
"""

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# How Llama 3 cuts a text into words (llama-models 0.3.0, llama3/tokenizer.py).
LLAMA3_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_CUT = {
  "type": "ByteLevel",
  "add_prefix_space": False,
  "trim_offsets": True,
  "use_regex": True,
}
_LLAMA3_CUT = {
  "type": "Sequence",
  "pretokenizers": [
    {
      "type": "Split",
      "pattern": {"Regex": LLAMA3_PATTERN},
      "behavior": "Isolated",
      "invert": False,
    },
    {**_GPT2_CUT, "use_regex": False},
  ],
}
LLAMA3 = "llama-bpe"
# How each family cuts text before merging, by the name that llama.cpp gives it
# (src/llama-vocab.cpp). Digits(individual) then GPT-2's pattern is what
# "smollm" says there and what SmolLM's own tokenizer.json holds. Of two names
# for one cut the first is the one to write.
CUTS = {
  "smollm": {
    "type": "Sequence",
    "pretokenizers": [
      {"type": "Digits", "individual_digits": True},
      _GPT2_CUT,
    ],
  },
  LLAMA3: _LLAMA3_CUT,
  "llama3": _LLAMA3_CUT,
  "llama-v3": _LLAMA3_CUT,
  "smaug-bpe": _LLAMA3_CUT,
  "gpt-2": _GPT2_CUT,
  "default": _GPT2_CUT,
}
# Llama 3 takes a word that is in the vocabulary whole, and starts with bos.
WHOLE_WORDS = (LLAMA3, "llama3", "llama-v3")


def is_bpe(spec: Mapping[str, Any]) -> bool:
  """Whether a document's model is BPE; older ones do not say their type."""
  model = spec["model"]
  return (
    model.get("type", "BPE") == "BPE"
    and isinstance(model.get("vocab"), dict)
    and "merges" in model
  )


def cut_name(spec: Mapping[str, Any]) -> str | None:
  """llama.cpp's name for the way a BPE document cuts; None if it has none."""
  if not is_bpe(spec):
    return None
  cut = _essence(spec.get("pre_tokenizer"))
  whole = bool(spec["model"].get("ignore_merges"))
  for name, known in CUTS.items():
    if _essence(known) == cut and (name in WHOLE_WORDS) == whole:
      return name
  return None


def _essence(cut: Any) -> Any:
  """A pre-tokenizer without what changes offsets only."""
  if isinstance(cut, dict):
    return {k: _essence(v) for k, v in cut.items() if k != "trim_offsets"}
  return [_essence(v) for v in cut] if isinstance(cut, list) else cut


def added_token(
  text: str, id: int, special: bool, **flags: bool
) -> dict[str, Any]:
  """One entry of a document's added_tokens."""
  return {
    "id": id,
    "content": text,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    **flags,
    "special": special,
  }


def document(
  cut: str,
  vocab: Mapping[str, int],
  merges: Iterable[Sequence[str]],
  added: Sequence[Mapping[str, Any]],
  post_processor: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """A tokenizer.json.

  vocab: token in letters -> id; merges: pairs of such, the first to be merged
  first; added: entries of `added_token`.
  """
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": list(added),
    "normalizer": None,
    "pre_tokenizer": CUTS[cut],
    "post_processor": post_processor,
    "decoder": {**_GPT2_CUT, "add_prefix_space": True},
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": cut in WHOLE_WORDS,
      "vocab": dict(vocab),
      "merges": [list(pair) for pair in merges],
    },
  }


def pair(merge: str | Sequence[str]) -> tuple[str, ...]:
  """The two sides of a merge, which older documents write with a space."""
  return tuple(merge.split(" ", 1) if isinstance(merge, str) else merge)


def _byte_letters() -> dict[str, int]:
  """GPT-2's letter for each byte: itself if printable, else from U+0100 on."""
  printable = [
    *range(ord("!"), ord("~") + 1),
    *range(ord("¡"), ord("¬") + 1),
    *range(ord("®"), ord("ÿ") + 1),
  ]
  letters = {chr(b): b for b in printable}
  others = [b for b in range(256) if b not in printable]
  letters.update({chr(256 + n): b for n, b in enumerate(others)})
  return letters


LETTERS = _byte_letters()
# str.translate wants code points; a latin-1 string is its bytes.
_TO_LETTERS = {byte: letter for letter, byte in LETTERS.items()}


def in_letters(token: bytes) -> str:
  """A token as documents write it."""
  return token.decode("latin-1").translate(_TO_LETTERS)


def in_bytes(token: str) -> bytes | None:
  """The bytes that a written token stands for; None if it is no letters."""
  if all(letter in LETTERS for letter in token):
    return bytes(LETTERS[letter] for letter in token)
  return None


def ranks_file(spec: Mapping[str, Any]) -> bytes | None:
  """Llama 3's tokenizer.model of a document, or None if that is of another
  kind.

  Ranks merge as the document does if ids rise along its merges.
  """
  if cut_name(spec) != LLAMA3 or spec.get("normalizer"):
    return None
  vocab = spec["model"]["vocab"]
  special = {token["id"] for token in spec["added_tokens"]}
  ranked = sorted((id, text) for text, id in vocab.items() if id not in special)
  tokens = [in_bytes(text) for _, text in ranked]
  results = [
    vocab.get("".join(pair(merge)), -1) for merge in spec["model"]["merges"]
  ]
  if (
    [id for id, _ in ranked] != list(range(len(ranked)))
    or None in tokens
    or results != sorted(results)
    or min(special, default=0) != len(ranked)
  ):
    return None
  return ranks_lines(tokens)


def ranks_lines(tokens: Iterable[bytes]) -> bytes:
  """Llama 3's tokenizer.model: a token in base64 and its rank a line."""
  return b"".join(
    b"%s %d\n" % (base64.b64encode(token), rank)
    for rank, token in enumerate(tokens)
  )


def is_ranks(content: bytes) -> bool:
  """Whether a file starts with a token in base64 and its rank."""
  token, _, rank = content.split(b"\n", 1)[0].strip().partition(b" ")
  try:
    return bool(base64.b64decode(token, validate=True)) and rank.isdigit()
  except binascii.Error:
    return False
