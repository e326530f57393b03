"""What every tokenizer offers, and all that the families share.

A family (`byte_bpe`, `sentencepiece_bpe`, `tiktoken_bpe`) supplies three
things: how plain text becomes ids, which bytes each id stands for, and how to
write its own files. Everything else lives here: special tokens, begin and end
of text, the joining of bytes into text, and refusals.
"""

import abc
import codecs
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llama_jax import errors

# Special tokens that end a turn or a document in the LLaMA family and its
# kin, whichever of them the files call "eos".
END_NAMES = (
  "</s>",
  "<|end_of_text|>",
  "<|eot_id|>",
  "<|eom_id|>",
  "<|eot|>",
  "<|eom|>",
  "<|im_end|>",
  "<|endoftext|>",
  "<|end|>",
  "<end_of_turn>",
)

_SPACE = re.compile(r"\s*")

# No vocabulary known to us has a tenth of it. A file that claims an id beyond
# is damaged, and would make us allocate that many rows.
_MAX_VOCAB = 1 << 21


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
  if not isinstance(error, UnicodeDecodeError):
    raise error
  return "\ufffd" * (error.end - error.start), error.end


# SentencePiece writes one U+FFFD for each invalid byte; Python's "replace" (and
# Rust's lossy reading, so the `tokenizers` library) one for each cut-off
# character.
EACH_BYTE = "llama_jax.text.each_byte"
codecs.register_error(EACH_BYTE, _replace_each_byte)


@dataclasses.dataclass(frozen=True)
class Special:
  """A token that only a template or a caller can write, never a user's text.

  `lstrip` and `rstrip`: it swallows the white space before or after it.
  """

  text: str
  id: int
  lstrip: bool = False
  rstrip: bool = False


@dataclasses.dataclass(frozen=True)
class Conventions:
  """How a model uses its vocabulary; the same from whichever file it came.

  named: role -> token text, in the words of Hugging Face ("bos_token",
    "eos_token", "unk_token", "pad_token"...); templates see these.
  add_bos: whether a text starts with bos; None leaves it to the family.
  stop_ids: ids that end a turn, beyond eos and those known by their name.
  """

  named: Mapping[str, str] = dataclasses.field(default_factory=dict)
  add_bos: bool | None = None
  stop_ids: tuple[int, ...] = ()
  chat_template: str | None = None


class Tokenizer(abc.ABC):
  """Text <-> ids.

  Attributes:
    vocab_size: one more than the highest id; a model may have more rows.
    bos_id, eos_id: None if the model has none.
    add_bos: the model's own convention; `encode` adds bos only if asked.
    stop_ids: every id that ends a turn, eos first.
    special_tokens: text -> id of the tokens a user's text never becomes.
    named_tokens: role ("bos_token"...) -> text, for templates.
    chat_template: Jinja source, or None.
  """

  def __init__(
    self,
    *,
    vocab_size: int,
    specials: Iterable[Special],
    conventions: Conventions,
    byte_errors: str,
  ):
    if vocab_size > _MAX_VOCAB:
      raise errors.BadFileError(
        f"its highest token id is {vocab_size - 1}; at most {_MAX_VOCAB - 1} is"
        " allowed."
      )
    self._specials = {
      s.text: s for s in sorted(specials, key=lambda s: s.id) if s.text
    }
    for text in (*self._specials, conventions.chat_template or ""):
      check_text(text)
    self.vocab_size = vocab_size
    self.special_tokens = {s.text: s.id for s in self._specials.values()}
    self.named_tokens = dict(conventions.named)
    self.chat_template = conventions.chat_template
    self.add_bos = bool(conventions.add_bos)
    self.byte_errors = byte_errors
    self.bos_id = self.special_tokens.get(conventions.named.get("bos_token"))
    self.eos_id = self.special_tokens.get(conventions.named.get("eos_token"))
    ends = {i for i in conventions.stop_ids if 0 <= i < vocab_size}
    ends |= {
      self.special_tokens[name]
      for name in END_NAMES
      if name in self.special_tokens
    }
    first = () if self.eos_id is None else (self.eos_id,)
    self.stop_ids = first + tuple(sorted(ends - set(first)))

  # What a family supplies.

  @abc.abstractmethod
  def _encode_plain(self, texts: Sequence[str], first: bool) -> list[list[int]]:
    """Ids of texts that hold no special token.

    `first` is False for text that follows a special token: some vocabularies
    put a space before the first word of a document only.
    """

  @abc.abstractmethod
  def _pieces(self) -> tuple[list[bytes], frozenset[int]]:
    """The bytes of each id (b"" for what `decode` hides) and the ids of which
    one leading space is not text when they come first."""

  @abc.abstractmethod
  def save(self, folder) -> None:
    """Writes files that `load_tokenizer` and transformers read alike."""

  @abc.abstractmethod
  def gguf_metadata(self) -> dict[str, Any]:
    """tokenizer.ggml.* and tokenizer.chat_template, as plain values.

    `from_gguf_metadata` makes the same tokenizer of them (but for `lstrip` and
    `rstrip` of special tokens, which GGUF cannot say), and llama.cpp runs it.

    Raises:
      UserError: llama.cpp has no such tokenizer.
    """

  def model_file(self) -> bytes | None:
    """The tokenizer.model that Meta's own code reads: a SentencePiece model or
    Llama 3's ranks. None if the vocabulary is neither."""
    return None

  # What callers use.

  def encode(
    self, text: str, bos: bool = False, eos: bool = False
  ) -> list[int]:
    """Ids of a user's text; no special id, whatever the text spells.

    Raises:
      UserError: not a string, or a string with half a surrogate pair.
    """
    return self.encode_batch([text], bos, eos)[0]

  def encode_batch(
    self, texts: Sequence[str], bos: bool = False, eos: bool = False
  ) -> list[list[int]]:
    """`encode` of each text, on the library's threads."""
    if isinstance(texts, str):
      raise errors.UserError(
        "encode_batch takes a list of texts, not one; use encode."
      )
    for text in texts:
      check_text(text)
    before = [self._required("bos")] if bos else []
    after = [self._required("eos")] if eos else []
    encoded = self._encode_plain(texts, first=True)
    if not before and not after:
      return encoded
    return [[*before, *ids, *after] for ids in encoded]

  def encode_with_special(self, text: str) -> list[int]:
    """Ids of trusted text, in which special tokens stand for themselves."""
    check_text(text)
    return self.encode_parts(self.split_special(text))

  def split_special(self, text: str) -> list[str | int]:
    """Cuts text at the special tokens it spells: [text, id, text...]."""
    if self._special_pattern is None:
      return [text]
    parts = []
    start = 0
    while match := self._special_pattern.search(text, start):
      special = self._specials[match.group()]
      before = text[start : match.start()]
      parts += [before.rstrip() if special.lstrip else before, special.id]
      start = match.end()
      if special.rstrip:
        start += len(_SPACE.match(text, start).group())
    return [p for p in [*parts, text[start:]] if p != ""]

  def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
    """Joins plain text and special ids; see `split_special`."""
    texts = [(i, p) for i, p in enumerate(parts) if isinstance(p, str)]
    encoded = {}
    for first in (True, False):
      chosen = [(i, p) for i, p in texts if (i == 0) == first]
      ids = self._encode_plain([p for _, p in chosen], first) if chosen else []
      encoded.update(zip([i for i, _ in chosen], ids, strict=True))
    joined = []
    for i, part in enumerate(parts):
      joined += encoded[i] if isinstance(part, str) else [part]
    return joined

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Text of ids. Bytes that are no UTF-8 show as U+FFFD, and ids past the
    vocabulary (spare rows of a model) as nothing."""
    data, _ = self.join_bytes(ids, False, skip_special)
    return data.decode("utf-8", self.byte_errors)

  def join_bytes(
    self, ids: Iterable[int], started: bool, skip_special: bool = True
  ) -> tuple[bytes, bool]:
    """Bytes of ids that go on from what came before.

    `started`: whether any text came before, so that a leading space counts.
    Returns the bytes and `started` after them.
    """
    pieces, spaced = self._piece_table
    shown = {} if skip_special else self._special_bytes
    out = []
    for i in map(int, ids):  # a device's integers cannot be looked up
      if i < 0:
        raise errors.UserError(f"{i} is no token id; ids start at 0.")
      piece = shown.get(i)
      if piece is None:
        piece = pieces[i] if i < len(pieces) else b""
        if not started and i in spaced:
          piece = piece[1:]
          started = True
      started = started or bool(piece)
      out.append(piece)
    return b"".join(out), started

  def byte_lengths(self, ids: Iterable[int]) -> list[int]:
    """How many bytes each id adds to a text that has begun; specials none."""
    pieces, _ = self._piece_table
    return [len(pieces[i]) if i < len(pieces) else 0 for i in ids]

  def _required(self, name: str) -> int:
    found = self.bos_id if name == "bos" else self.eos_id
    if found is None:
      raise errors.UserError(
        f"{name}=True, but this tokenizer has no {name} token; use"
        f" {name}=False."
      )
    return found

  @functools.cached_property
  def _piece_table(self):
    return self._pieces()

  @functools.cached_property
  def _special_bytes(self) -> dict[int, bytes]:
    return {i: text.encode() for text, i in self.special_tokens.items()}

  @functools.cached_property
  def _special_pattern(self) -> re.Pattern | None:
    return re.compile(any_of(self._specials)) if self._specials else None


class PlainTokens:
  """Tokens that a folder adds and any text may spell.

  As in transformers they are cut out before a text reaches the vocabulary, so
  what stands on either side is encoded by itself.
  """

  def __init__(self, ids: Mapping[str, int]):
    self.ids = dict(ids)
    self._pattern = re.compile(f"({any_of(self.ids)})") if self.ids else None

  def encode_around(
    self,
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], list[list[int]]],
  ) -> list[list[int]]:
    """Ids of texts; `encode` gets all that stands between in one call."""
    if self._pattern is None:
      return encode(texts)
    cut = [self._pattern.split(text) for text in texts]
    between = iter(encode([part for parts in cut for part in parts[::2]]))
    joined = []
    for parts in cut:
      ids = list(next(between))
      for token in parts[1::2]:
        ids.append(self.ids[token])
        ids += next(between)
      joined.append(ids)
    return joined


def any_of(texts: Iterable[str]) -> str:
  """A pattern of any of the texts; of two that start together the longer
  wins, as in `tokenizers`."""
  ordered = sorted(texts, key=len, reverse=True)
  return f"{first_letters(ordered)}(?:{'|'.join(map(re.escape, ordered))})"


def first_letters(texts: Iterable[str]) -> str:
  """A pattern that looks ahead for the first letter of one of the texts. It
  spares a search the trial of hundreds of names at every letter."""
  letters = sorted({text[0] for text in texts})
  return f"(?=[{''.join(map(re.escape, letters))}])"


def check_text(text: Any) -> None:
  """Refuses what cannot be encoded as UTF-8."""
  if not isinstance(text, str):
    raise errors.UserError(f"a text must be a string, not {type(text)}.")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise errors.UserError(
      f"the text holds half a surrogate pair, {text[error.start]!a}, at"
      f" character {error.start}; it is not valid Unicode. Mend or replace it."
    ) from None
