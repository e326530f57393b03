"""Byte-level BPE, and any other tokenizer.json, through `tokenizers`.

A tokenizer is one tokenizer.json document ("spec"), read from a folder or
rebuilt from the metadata of a GGUF file. The library gets a copy of it from
which every special token is taken away, vocabulary and merges included: what
it does not know, no text can spell. Special tokens are ours to place.
"""

import contextlib
import copy
import functools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from llama_jax import errors
from llama_jax.text import (
  byte_level,
  byte_level_gguf,
  files,
  spaced_gguf,
  tiktoken_bpe,
)
from llama_jax.text import folder as folder_lib
from llama_jax.text import tokenizer as tokenizer_lib

# Names to fall back on for a tokenizer.json that comes alone.
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<|im_start|>")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<|im_end|>", "<|endoftext|>")


class ByteBpe(tokenizer_lib.Tokenizer):
  """A tokenizer.json document at work.

  spec, settings: as `_resolve` leaves them.
  """

  def __init__(self, spec: dict[str, Any], settings: folder_lib.Settings):
    self._spec = spec
    self._config = dict(settings.config)
    self._library = _library(self._spec)
    self._decoder = _Decoder(self._spec.get("decoder"))
    ids = [
      *_vocabulary(self._spec).values(),
      *(t["id"] for t in self._spec["added_tokens"]),
    ]
    if not all(type(id) is int and id >= 0 for id in ids):
      raise ValueError("a token's id is no number from 0 on")
    super().__init__(
      vocab_size=max(ids, default=-1) + 1,
      specials=settings.added.values(),
      conventions=settings.conventions,
      byte_errors=self._decoder.byte_errors,
    )

  def save(self, folder) -> None:
    """Writes tokenizer.json, tokenizer_config.json, generation_config.json."""
    # The class of transformers that takes tokenizer.json at its word; others
    # (GPT2Tokenizer, LlamaTokenizer) put their own way of cutting in its place.
    config = {**self._config, "tokenizer_class": "PreTrainedTokenizerFast"}
    content = json.dumps(self._spec, ensure_ascii=False, indent=1).encode()
    folder_lib.write(folder, self, {folder_lib.TOKENIZER_JSON: content}, config)

  def gguf_metadata(self) -> dict[str, Any]:
    if self._spec["model"].get("byte_fallback"):
      return spaced_gguf.write(self._spec, self)
    return byte_level_gguf.write(self._spec, self)

  def model_file(self) -> bytes | None:
    return byte_level.ranks_file(self._spec)

  def _encode_plain(self, texts: Sequence[str], first: bool) -> list[list[int]]:
    library = self._library if first else self._continuing
    with _in_our_words(errors.UserError, "the tokenizer fails at a text"):
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


def from_spec(
  content: bytes,
  name: str,
  folder: pathlib.Path,
  ranks: dict[bytes, int] | None = None,
) -> tokenizer_lib.Tokenizer:
  """The tokenizer of a tokenizer.json and the files of its folder.

  ranks: of a tiktoken file beside it. Where both say the same, `tiktoken` does
    the work, which is faster.

  Raises:
    BadFileError: not such a document, or one that `tokenizers` refuses.
  """
  spec = files.parse_json(content, name)
  return _build(name, spec, folder_lib.read_settings(folder), ranks)


def from_gguf_metadata(fields: Mapping[str, Any], name: str) -> ByteBpe:
  """The byte-level BPE in the metadata of a GGUF file.

  fields: key -> plain value; `name` of the file is for messages.

  Raises:
    BadFileError: a field is missing or contradicts another.
    UserError: the way it cuts text into words is not known here.
  """
  return _build(name, *byte_level_gguf.read(fields, name))


def _build(
  name: str,
  spec: Any,
  settings: folder_lib.Settings,
  ranks: dict[bytes, int] | None = None,
) -> tokenizer_lib.Tokenizer:
  """A tokenizer, with what the library says of a bad document in our words."""
  model = spec.get("model") if isinstance(spec, dict) else None
  if not isinstance(model, dict) or not model.get("vocab"):
    raise errors.BadFileError(
      f"{name} is not a tokenizer.json document: it has no model.vocab."
    )
  try:
    with _in_our_words(errors.BadFileError, "it holds no usable tokenizer"):
      spec, settings = _resolve(spec, settings)
      found = ranks and tiktoken_bpe.from_document(ranks, spec, settings)
      return found or ByteBpe(spec, settings)
  except errors.UserError as error:
    raise type(error)(f"{name}: {error}") from None


@contextlib.contextmanager
def _in_our_words(kind: type[errors.UserError], what: str) -> Iterator[None]:
  """The library raises bare Exception, and its panics are not even that."""
  try:
    yield
  except errors.UserError:
    raise
  except BaseException as error:
    panic = type(error).__name__ == "PanicException"
    if not panic and not isinstance(error, Exception):
      raise
    raise kind(f"{what}: {type(error).__name__}: {error}.") from error


def _vocabulary(spec: dict[str, Any]) -> dict[str, int]:
  vocab = spec["model"]["vocab"]
  if isinstance(vocab, dict):
    return vocab
  return {piece: id for id, (piece, _) in enumerate(vocab)}  # Unigram


def _resolve(
  spec: dict[str, Any], settings: folder_lib.Settings
) -> tuple[dict[str, Any], folder_lib.Settings]:
  """Settles what is special and what it is for.

  Returns the document with every added token in it and marked, and settings
  that say the same, with nothing left open.
  """
  vocabulary = _vocabulary(spec)
  added = {t["content"]: dict(t) for t in spec.get("added_tokens") or ()}
  for text, special in settings.added.items():
    id = special.id if special.id >= 0 else vocabulary.get(text)
    if text in added:
      added[text]["special"] = True
    elif id is not None:
      added[text] = byte_level.added_token(
        text, id, True, lstrip=special.lstrip, rstrip=special.rstrip
      )
  for text, id in settings.plain.items():
    added.setdefault(text, byte_level.added_token(text, id, False))
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
  return spec, folder_lib.Settings(
    conventions=conventions,
    added={s.text: s for s in specials},
    plain={t["content"]: t["id"] for t in added.values() if not t["special"]},
    config=settings.config,
  )


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
  _check_merges(model)
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
        for merge in map(byte_level.pair, model["merges"])
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


def _check_merges(model: dict[str, Any]) -> None:
  """Refuses what ends the process: the library cuts the prefix off the second
  half of each merge without looking whether it is there."""
  prefix = model.get("continuing_subword_prefix")
  if prefix and not all(
    byte_level.pair(merge)[1].startswith(prefix)
    for merge in model.get("merges", ())
  ):
    raise ValueError(
      "model.continuing_subword_prefix does not start the second half of each"
      " of model.merges"
    )


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
        self._replace(part["pattern"]["String"], part["content"])
      elif kind == "Metaspace":
        self._replace(part["replacement"], " ")
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

  def _replace(self, old: str, new: str) -> None:
    """One that lengthens could turn a small file into any amount of text."""
    if len(new) > len(old):
      raise errors.UserError(
        f"its decoder replaces {old!r} by something longer, {new[:20]!r}; known"
        " are decoders that do not lengthen a token."
      )
    self._replacements.append((old, new))

  def piece(self, text: str) -> tuple[bytes, bool]:
    """The bytes, and whether a leading space of them may be no text."""
    if self._byte_level:
      data = byte_level.in_bytes(text)
      return text.encode() if data is None else data, False
    if self._byte_fallback and (match := _BYTE_PIECE.fullmatch(text)):
      data = bytes([int(match[1], 16)])
    else:
      for old, new in self._replacements:
        text = text.replace(old, new)
      data = text.encode()
    return data, self._strips and data.startswith(b" ")
