"""Which tokens may come next, so that the text fits a JSON schema or a regular
expression.

The grammar is llguidance's (an Earley parser over a lexer of derivatives, run
along the trie of the vocabulary). Ours is what surrounds it: the bytes of the
tokens, the space that a text does not begin with, the tokens that end it, and
bounds on what a schema from outside may cost (grammar.py).
"""

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax import errors
from llama_jax.text import grammar as grammar_lib
from llama_jax.text import tokenizer as tokenizer_lib

_NO_TOKEN = (
  "no token of this vocabulary goes on with the text that json_schema or regex"
  " asks for; take a tokenizer with a token for each byte."
)


class Constraint:
  """Where one text stands in its grammar.

  Attributes:
    done: nothing but a stop token may follow.
  """

  done: bool

  def __init__(self, table: "_Table", matcher, started: bool, words: int):
    self._table = table
    self._matcher = matcher
    self._started = started
    self._words = words
    self.done = False

  def mask(self) -> np.ndarray:
    """uint32 [ceil(V/32)]: bit v % 32 of word v // 32 is 1 where token v may
    come next. Stop tokens may where the text is complete; if it is and there
    are none, and it is `done`, no bit is set.

    Raises:
      UserError: the grammar grew beyond its bounds, or no token of this
        vocabulary goes on.
    """
    table = self._table
    if self.done:
      return self._padded(table.stops.copy())
    packed = self._matcher.compute_bitmask()
    self._check()
    allowed = table.own(packed, self._started)
    if self._matcher.is_accepting():
      allowed |= table.stops
    elif not allowed.any():
      raise errors.UserError(_NO_TOKEN)
    return self._padded(allowed)

  def accept(self, tokens: Sequence[int]) -> None:
    """Goes on by tokens that were allowed.

    Raises:
      UserError: one was not, or the grammar grew beyond its bounds. The
        constraint is of no use after it.
    """
    for token in map(int, tokens):
      if token in self._table.stop_ids:
        if not (self.done or self._matcher.is_accepting()):
          raise errors.UserError(
            f"the stop token {token} came before the text was complete."
          )
        self.done = True
      elif self.done:
        raise errors.UserError(f"token {token} came after the text's end.")
      else:
        self._matcher.consume_token(self._table.seen(token, self._started))
        self._check()
        self._started = True
        self.done = self._matcher.is_stopped()

  def copy(self) -> "Constraint":
    """Another text that has come as far, and goes its own way."""
    new = Constraint(
      self._table, self._matcher.deep_copy(), self._started, self._words
    )
    new.done = self.done
    return new

  def _check(self) -> None:
    if not self._matcher.is_error():
      return
    message = self._matcher.get_error()
    if message.startswith(grammar_lib.NOTHING):
      raise errors.UserError(_NO_TOKEN)
    reason = grammar_lib.reason(message)
    raise errors.UserError(
      f"json_schema or regex cannot be kept any further: {reason}."
    )

  def _padded(self, words: np.ndarray) -> np.ndarray:
    spare = self._words - len(words)
    return np.pad(words, (0, spare)) if spare else words


def compile(
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  json_schema: Mapping[str, Any] | bool | str | None = None,
  regex: str | None = None,
  continues: bool = False,
  vocab_size: int | None = None,
) -> Constraint:
  r"""The constraint of one text, at its beginning; `copy` it for more.

  Args:
    tokenizer: its table is built once (0.2 s for 32,000 tokens, 1 s for
      128,000) and kept as long as it lives.
    json_schema: a schema, or its JSON. The text is a value that it allows.
    regex: the whole text matches it, as Rust's `regex` crate reads it, which is
      much as Python's: no look-around, no back-references; \d, \w and \s are
      ASCII's, as under re.ASCII, but (?i) folds the letters of all scripts.
    continues: as in `stream.Detokenizer`: a leading space is text.
    vocab_size: V of the mask, where the model has more rows than the tokenizer
      has tokens.

  Raises:
    UserError: neither or both are given, or the one given is faulty, asks for
      what the library cannot keep, or is too large.
  """
  knob, grammar = grammar_lib.read(json_schema, regex)
  table = _table(tokenizer)
  matcher = grammar_lib.compiled(table.library, grammar)
  words = -(-max(vocab_size or 0, tokenizer.vocab_size) // 32)
  constraint = Constraint(table, matcher, continues, words)
  if not (constraint.mask()[: len(table.stops)] & ~table.stops).any():
    raise errors.UserError(f"{knob} allows no text but the empty one.")
  return constraint


class _Table:
  """A vocabulary as the library sees it.

  Behind the tokenizer's own ids come those of aliases: tokens that lose a
  leading space at the beginning of a text, as they are there. The last id is
  the library's end of text, which nobody else sees.

  Attributes:
    library: its LLTokenizer.
    stop_ids: the tokenizer's.
    stops: uint32 [ceil(V/32)], their bits.
  """

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
    import llguidance

    size = tokenizer.vocab_size
    hidden = {*tokenizer.special_tokens.values(), *tokenizer.stop_ids}
    pieces = [tokenizer.join_bytes([id], True)[0] for id in range(size)]
    firsts = [tokenizer.join_bytes([id], False)[0] for id in range(size)]
    for id in hidden:
      pieces[id] = firsts[id] = b""
    spaced = [id for id in range(size) if firsts[id] != pieces[id]]
    tokens = [*pieces, *(firsts[id] for id in spaced), b""]
    self.library = llguidance.LLTokenizer(
      llguidance.TokenizerWrapper(_Vocabulary(tokens))
    )
    self.stop_ids = frozenset(tokenizer.stop_ids)
    self.stops = _pack(np.isin(np.arange(size), list(self.stop_ids)))
    self._size = size
    self._own = _pack(np.ones(size, bool))
    self._spaced = np.array(spaced, np.int64)
    self._aliases = {id: size + i for i, id in enumerate(spaced)}

  def seen(self, token: int, started: bool) -> int:
    """The library's id of a token."""
    if not 0 <= token < self._size:
      raise errors.UserError(f"{token} is no id of this vocabulary.")
    return token if started else self._aliases.get(token, token)

  def own(self, packed: bytes, started: bool) -> np.ndarray:
    """The tokenizer's part of the library's mask."""
    words = np.frombuffer(packed, "<u4")
    if not started and len(self._spaced):
      bits = np.unpackbits(words.view(np.uint8), bitorder="little")
      size = self._size
      bits[self._spaced] = bits[size : size + len(self._spaced)]
      words = _pack(bits)
    return words[: len(self._own)] & self._own


class _Vocabulary:
  """What llguidance asks of a tokenizer of Python's."""

  bos_token_id = None

  def __init__(self, tokens: list[bytes]):
    self.tokens = tokens
    self.eos_token_id = len(tokens) - 1
    self.special_token_ids = [id for id, t in enumerate(tokens) if not t]

  def __call__(self, text) -> list[int]:
    """Asked of a grammar that forces tokens only; none of ours does."""
    del text
    return []


def _pack(allowed: np.ndarray) -> np.ndarray:
  """bool [V] -> uint32 [ceil(V/32)]."""
  padded = np.pad(allowed, (0, -len(allowed) % 32))
  return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)


def _table(tokenizer: tokenizer_lib.Tokenizer) -> _Table:
  with _BUILDING:
    if tokenizer not in _TABLES:
      _TABLES[tokenizer] = _Table(tokenizer)
    return _TABLES[tokenizer]


_BUILDING = threading.Lock()
_TABLES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
