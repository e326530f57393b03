"""Byte-level BPE, and any other tokenizer.json, through `tokenizers`.

A tokenizer is one tokenizer.json document ("spec"), read from a folder or
rebuilt from the metadata of a GGUF file. The library gets a copy of it from
which every special token is taken away, vocabulary and merges included: what
it does not know, no text can spell. Special tokens are ours to place.
"""

import copy
import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from llama_jax import errors
from llama_jax.text import files, gguf_fields
from llama_jax.text import folder as folder_lib
from llama_jax.text import tokenizer as tokenizer_lib

# How each family cuts text before merging, by the name that llama.cpp gives it
# (src/llama-vocab.cpp). Digits(individual) then GPT-2's pattern is what
# "smollm" says there and what SmolLM's own tokenizer.json holds.
_GPT2_CUT = {
  "type": "ByteLevel",
  "add_prefix_space": False,
  "trim_offsets": True,
  "use_regex": True,
}
_LLAMA3_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {
  "smollm": {
    "type": "Sequence",
    "pretokenizers": [
      {"type": "Digits", "individual_digits": True},
      _GPT2_CUT,
    ],
  },
  "llama-bpe": {
    "type": "Sequence",
    "pretokenizers": [
      {
        "type": "Split",
        "pattern": {"Regex": _LLAMA3_PATTERN},
        "behavior": "Isolated",
        "invert": False,
      },
      {**_GPT2_CUT, "use_regex": False},
    ],
  },
  "gpt-2": _GPT2_CUT,
  "default": _GPT2_CUT,
}
# Llama 3 takes a word that is in the vocabulary whole, and starts with bos.
_WHOLE_WORDS = ("llama-bpe",)
_CONTROL, _USER_DEFINED = 3, 4

# Names to fall back on for a tokenizer.json that comes alone.
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<|im_start|>")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<|im_end|>", "<|endoftext|>")


class ByteBpe(tokenizer_lib.Tokenizer):
  """A tokenizer.json document at work."""

  def __init__(self, spec: dict[str, Any], settings: folder_lib.Settings):
    self._spec, specials, conventions = _resolve(spec, settings)
    self._config = dict(settings.config)
    self._library = _library(self._spec)
    self._decoder = _Decoder(self._spec.get("decoder"))
    ids = [
      *_vocabulary(self._spec).values(),
      *(t["id"] for t in self._spec["added_tokens"]),
    ]
    super().__init__(
      vocab_size=max(ids, default=-1) + 1,
      specials=specials,
      conventions=conventions,
      byte_errors=self._decoder.byte_errors,
    )

  def save(self, folder) -> None:
    """Writes tokenizer.json, tokenizer_config.json, generation_config.json."""
    # The class of transformers that takes tokenizer.json at its word; others
    # (GPT2Tokenizer, LlamaTokenizer) put their own way of cutting in its place.
    config = {**self._config, "tokenizer_class": "PreTrainedTokenizerFast"}
    content = json.dumps(self._spec, ensure_ascii=False, indent=1).encode()
    folder_lib.write(folder, self, {folder_lib.TOKENIZER_JSON: content}, config)

  def _encode_plain(self, texts: Sequence[str], first: bool) -> list[list[int]]:
    library = self._library if first else self._continuing
    if len(texts) == 1:  # spares the threads
      return [library.encode(texts[0], add_special_tokens=False).ids]
    return [
      encoding.ids
      for encoding in library.encode_batch_fast(
        list(texts), add_special_tokens=False
      )
    ]

  def _pieces(self) -> tuple[list[bytes], frozenset[int]]:
    pieces = [b""] * self.vocab_size
    spaced = set()
    for text, id in _vocabulary(self._spec).items():
      pieces[id], has_space = self._decoder.piece(text)
      if has_space:
        spaced.add(id)
    for token in self._spec["added_tokens"]:
      pieces[token["id"]] = (
        b"" if token["special"] else token["content"].encode()
      )
      spaced.discard(token["id"])
    return pieces, frozenset(spaced)

  @functools.cached_property
  def _continuing(self) -> tokenizers.Tokenizer:
    """The library for text after a special token: without the space that some
    vocabularies put before a document's first word only."""
    spec = copy.deepcopy(self._spec)
    cut = spec.get("pre_tokenizer") or {}
    changed = False
    for part in [cut, *cut.get("pretokenizers", ())]:
      if part.get("prepend_scheme") == "first":
        part["prepend_scheme"] = "never"
        changed = True
    return _library(spec) if changed else self._library


def from_spec(content: bytes, name: str, folder: pathlib.Path) -> ByteBpe:
  """The tokenizer of a tokenizer.json and the files of its folder.

  Raises:
    BadFileError: not such a document, or one that `tokenizers` refuses.
  """
  spec = files.parse_json(content, name)
  return _build(name, spec, folder_lib.read_settings(folder))


def from_gguf_metadata(fields: Mapping[str, Any], name: str) -> ByteBpe:
  """The byte-level BPE in the metadata of a GGUF file.

  fields: key -> plain value; `name` of the file is for messages.

  Raises:
    BadFileError: a field is missing or contradicts another.
    UserError: the way it cuts text into words is not known here.
  """
  cut = fields.get("tokenizer.ggml.pre", "default")
  if cut not in _CUTS:
    raise errors.UserError(
      f"{name}: tokenizer.ggml.pre={cut!r} is not known here; known are"
      f" {', '.join(sorted(_CUTS))}. Load the model's tokenizer.json instead."
    )
  tokens = fields.get("tokenizer.ggml.tokens")
  merges = fields.get("tokenizer.ggml.merges")
  if not tokens or merges is None:
    raise errors.BadFileError(
      f"{name}: tokenizer.ggml.tokens and tokenizer.ggml.merges are needed."
    )
  kinds = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
  if len(kinds) != len(tokens):
    raise errors.BadFileError(
      f"{name}: {len(tokens)} tokens, but {len(kinds)} token types."
    )
  pairs = [tuple(m.split(" ", 1)) for m in merges]
  if any(len(pair) != 2 for pair in pairs):
    raise errors.BadFileError(
      f"{name}: tokenizer.ggml.merges must be pairs with a space between."
    )
  settings = gguf_fields.read_settings(
    fields, name, add_bos=cut in _WHOLE_WORDS
  )
  named = settings.conventions.named.values()
  spec = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
      _added(text, id, special=kind == _CONTROL or text in named)
      for id, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
      if kind in (_CONTROL, _USER_DEFINED) or text in named
    ],
    "normalizer": None,
    "pre_tokenizer": _CUTS[cut],
    "post_processor": None,
    "decoder": {**_GPT2_CUT, "add_prefix_space": True},
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": cut in _WHOLE_WORDS,
      "vocab": {text: id for id, text in reversed(list(enumerate(tokens)))},
      "merges": pairs,
    },
  }
  return _build(name, spec, settings)


def _build(name: str, spec: Any, settings: folder_lib.Settings) -> ByteBpe:
  """ByteBpe, with what the library says of a bad document in our words."""
  model = spec.get("model") if isinstance(spec, dict) else None
  if not isinstance(model, dict) or not model.get("vocab"):
    raise errors.BadFileError(
      f"{name} is not a tokenizer.json document: it has no model.vocab."
    )
  try:
    return ByteBpe(spec, settings)
  except errors.UserError as error:
    raise type(error)(f"{name}: {error}") from None
  except Exception as error:  # the library raises bare Exception
    raise errors.BadFileError(
      f"{name} holds no usable tokenizer: {type(error).__name__}: {error}."
    ) from error


def _vocabulary(spec: dict[str, Any]) -> dict[str, int]:
  vocab = spec["model"]["vocab"]
  if isinstance(vocab, dict):
    return vocab
  return {piece: id for id, (piece, _) in enumerate(vocab)}  # Unigram


def _added(text: str, id: int, special: bool, **flags: bool) -> dict[str, Any]:
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


def _resolve(spec: dict[str, Any], settings: folder_lib.Settings):
  """Settles what is special and what it is for.

  Returns the document with every added token in it and marked, the special
  tokens, and the conventions with nothing left open.
  """
  vocabulary = _vocabulary(spec)
  added = {t["content"]: dict(t) for t in spec.get("added_tokens") or ()}
  for text, special in settings.added.items():
    id = special.id if special.id >= 0 else vocabulary.get(text)
    if text in added:
      added[text]["special"] = True
    elif id is not None:
      added[text] = _added(
        text, id, True, lstrip=special.lstrip, rstrip=special.rstrip
      )
  for text, id in settings.plain.items():
    added.setdefault(text, _added(text, id, False))
  for token in added.values():
    if token["id"] in settings.conventions.stop_ids:
      token["special"] = True
  specials = [
    tokenizer_lib.Special(t["content"], t["id"], t["lstrip"], t["rstrip"])
    for t in added.values()
    if t["special"]
  ]

  named = dict(settings.conventions.named)
  known = {s.text for s in specials}
  leading = _leading_token(spec.get("post_processor"))
  if "bos_token" not in named and "eos_token" not in named:
    for role, names in (
      ("bos_token", (leading, *_BOS_NAMES)),
      ("eos_token", _EOS_NAMES),
    ):
      found = [n for n in names if n in known]
      if found:
        named[role] = found[0]
  add_bos = settings.conventions.add_bos
  if add_bos is None:
    add_bos = leading is not None and leading == named.get("bos_token")
  conventions = tokenizer_lib.Conventions(
    named=named,
    add_bos=add_bos,
    stop_ids=settings.conventions.stop_ids,
    chat_template=settings.conventions.chat_template,
  )
  spec = {
    **spec,
    "truncation": None,
    "padding": None,
    "added_tokens": sorted(added.values(), key=lambda t: t["id"]),
  }
  bos = named.get("bos_token")
  if add_bos and leading is None and bos in known:
    own = [spec["post_processor"]] if spec.get("post_processor") else []
    spec["post_processor"] = {
      "type": "Sequence",
      "processors": [*own, folder_lib.bos_processor(bos, added[bos]["id"])],
    }
  return spec, specials, conventions


def _leading_token(post_processor: dict[str, Any] | None) -> str | None:
  """The special token that a document puts before every text."""
  post_processor = post_processor or {}
  for part in [post_processor, *post_processor.get("processors", ())]:
    single = part.get("single") or [{}]
    if part.get("type") == "TemplateProcessing" and "SpecialToken" in single[0]:
      name = single[0]["SpecialToken"]["id"]
      return part["special_tokens"][name]["tokens"][0]
  return None


def _library(spec: dict[str, Any]) -> tokenizers.Tokenizer:
  """The library's tokenizer for a user's text: one that knows no special
  token, so that no merge, whole word or added token can yield one."""
  model = dict(spec["model"])
  specials = {t["content"] for t in spec["added_tokens"] if t["special"]}
  plain = [t for t in spec["added_tokens"] if not t["special"]]
  if isinstance(model["vocab"], dict):
    hidden = specials - {model.get("unk_token")}
    model["vocab"] = {
      text: id for text, id in model["vocab"].items() if text not in hidden
    }
    # The library numbers added tokens from the end unless the vocabulary does.
    model["vocab"].update({t["content"]: t["id"] for t in plain})
    if "merges" in model:
      model["merges"] = [
        merge
        for merge in map(_pair, model["merges"])
        if specials.isdisjoint((*merge, "".join(merge)))
      ]
  else:
    # A piece keeps its place; NUL keeps any text from spelling it.
    model["vocab"] = [
      (f"\0{id}", score)
      if text in specials and id != model["unk_id"]
      else (text, score)
      for id, (text, score) in enumerate(model["vocab"])
    ]
  return tokenizers.Tokenizer.from_str(
    json.dumps(
      {**spec, "model": model, "added_tokens": plain, "post_processor": None}
    )
  )


def _pair(merge: str | Sequence[str]) -> tuple[str, ...]:
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


_LETTERS = _byte_letters()
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _Decoder:
  """What the "decoder" of a document makes of one token, in bytes."""

  def __init__(self, decoder: dict[str, Any] | None):
    self._byte_level = self._byte_fallback = self._strips = False
    self._replacements = []
    decoder = decoder or {"type": None}
    for part in decoder.get("decoders", [decoder]):
      kind = part["type"]
      if kind == "ByteLevel":
        self._byte_level = True
      elif kind == "ByteFallback":
        self._byte_fallback = True
      elif kind == "Replace" and "String" in part["pattern"]:
        self._replacements.append((part["pattern"]["String"], part["content"]))
      elif kind == "Metaspace":
        self._replacements.append((part["replacement"], " "))
        self._strips = part.get("prepend_scheme", "always") != "never"
      elif kind == "Strip" and part["content"] == " " and not part["stop"]:
        self._strips = part["start"] > 0
      elif kind != "Fuse":
        raise errors.UserError(
          f"its decoder is {kind}; known are ByteLevel, and Metaspace or"
          " Replace with ByteFallback, Fuse and Strip."
        )
    self.byte_errors = (
      "replace" if self._byte_level else tokenizer_lib.EACH_BYTE
    )

  def piece(self, text: str) -> tuple[bytes, bool]:
    """The bytes, and whether a leading space of them may be no text."""
    if self._byte_level:
      if all(letter in _LETTERS for letter in text):
        return bytes(_LETTERS[letter] for letter in text), False
      return text.encode(), False
    if self._byte_fallback and (match := _BYTE_PIECE.fullmatch(text)):
      data = bytes([int(match[1], 16)])
    else:
      for old, new in self._replacements:
        text = text.replace(old, new)
      data = text.encode()
    return data, self._strips and data.startswith(b" ")
