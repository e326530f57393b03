"""Which tokens may come next, so that the text fits a JSON schema or a regular
expression.

The grammar is llguidance's (an Earley parser over a lexer of derivatives, run
along the trie of the vocabulary). Ours is what surrounds it: the bytes of the
tokens, the space that a text does not begin with, the tokens that end it, and
bounds on what a schema from outside may cost.

Departures from JSON Schema: properties come in the order of the schema, white
space between tokens is one space or one line's indent, `pattern` and `format`
are matched as far as the library goes, and a keyword that it does not know how
to keep is refused.
"""

import concurrent.futures
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax import errors
from llama_jax.text import tokenizer as tokenizer_lib

_PROGRAM = pathlib.Path(__file__).with_name("constraint_child.py")
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")
# Characters.
_MAX_SCHEMA = 1 << 17
_MAX_REGEX = 1 << 13
# The library stops at 128; pydantic's deepest take some 20.
_MAX_DEPTH = 64
# Each costs the compiler a frame of its stack, if they form a chain.
_MAX_REFS = 500
_STACK_BYTES = 64 << 20
# llguidance's own limits. A state of the lexer takes 1 to 2 kB, and lives as
# long as the constraint; fuel and items bound one mask to some 20 ms.
_LIMITS = {
  "initial_lexer_fuel": 1_000_000,
  "step_lexer_fuel": 200_000,
  "step_max_items": 50_000,
  "max_lexer_states": 50_000,
  "max_grammar_size": 100_000,
  "verbose_errors": False,
}
# Small models run away in white space; this leaves them none to run in.
_WHITE_SPACE = r" ?|\r?\n[ \t]{0,32}"
# The model, not the library, chooses how a forced text is cut into tokens.
_GRAMMAR = '%llguidance {"no_forcing": true}\nstart: '
_NOTHING = "NoExtensionBias"  # the library's word where no token goes on
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
    if message.startswith(_NOTHING):
      raise errors.UserError(_NO_TOKEN)
    raise errors.UserError(
      f"json_schema or regex cannot be kept any further: {_reason(message)}."
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
  if (json_schema is None) == (regex is None):
    raise errors.UserError("give either json_schema or regex.")
  if regex is not None:
    knob, grammar = "regex", _of_regex(regex)
  else:
    knob, grammar = "json_schema", _of_schema(json_schema)
  _try_elsewhere(knob, grammar)
  table = _table(tokenizer)
  matcher = _compiled(table, grammar)
  words = -(-max(vocab_size or 0, tokenizer.vocab_size) // 32)
  constraint = Constraint(table, matcher, continues, words)
  if not (constraint.mask()[: len(table.stops)] & ~table.stops).any():
    raise errors.UserError(f"{knob} allows no text but the empty one.")
  return constraint


def _of_regex(regex: str) -> str:
  if not isinstance(regex, str):
    raise errors.UserError(
      f"regex is {type(regex).__name__}; it must be a string."
    )
  _check_text("regex", regex, _MAX_REGEX)
  if not regex:  # which would make a comment, //
    raise errors.UserError("regex allows no text but the empty one.")
  import llguidance

  return f"{_GRAMMAR}/{llguidance.regex_to_lark(regex, 'dws')}/"


def _of_schema(schema: Mapping[str, Any] | bool | str) -> str:
  try:
    if isinstance(schema, str):
      _check_text("json_schema", schema, _MAX_SCHEMA)
      schema = json.loads(schema)
    if not isinstance(schema, Mapping | bool):
      raise errors.UserError(
        f"json_schema is {type(schema).__name__}; it must be an object or"
        " true, or JSON of one."
      )
    if isinstance(schema, Mapping) or schema:
      # What a schema from outside says there could turn checks off.
      ours = {"x-guidance": {"whitespace_pattern": _WHITE_SPACE}}
      schema = ours if schema is True else {**schema, **ours}
    text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
  except RecursionError:
    raise errors.UserError(
      f"json_schema is nested too deep; at most {_MAX_DEPTH} levels are"
      " allowed."
    ) from None
  except (TypeError, ValueError) as error:
    if isinstance(error, errors.UserError):
      raise
    raise errors.UserError(f"json_schema is no JSON: {error}.") from error
  _check_text("json_schema", text, _MAX_SCHEMA)
  _check_shape(schema)
  return f"{_GRAMMAR}%json {text}"


def _check_text(knob: str, text: str, limit: int) -> None:
  if len(text) > limit:
    raise errors.UserError(
      f"{knob} has {len(text)} characters; at most {limit} are allowed."
    )
  try:
    tokenizer_lib.check_text(text)
  except errors.UserError as error:
    raise errors.UserError(f"{knob}: {error}") from None


def _check_shape(schema: Any) -> None:
  """Refuses what is too deep, or has too many references."""
  level, depth, refs = [schema], 0, 0
  while level:
    depth += 1
    inside = []
    for value in level:
      if isinstance(value, Mapping):
        refs += sum(key in ("$ref", "$dynamicRef") for key in value)
        inside += value.values()
      elif isinstance(value, list | tuple):
        inside += value
    level = [v for v in inside if isinstance(v, Mapping | list | tuple)]
  if depth > _MAX_DEPTH:
    raise errors.UserError(
      f"json_schema is nested {depth} levels deep; at most {_MAX_DEPTH} are"
      " allowed."
    )
  if refs > _MAX_REFS:
    raise errors.UserError(
      f"json_schema has {refs} $refs; at most {_MAX_REFS} are allowed."
    )


@functools.lru_cache(maxsize=64)
def _try_elsewhere(knob: str, grammar: str) -> None:
  """Compiles a grammar in a process of its own (0.1 s), unless it passed there
  before.

  Raises:
    UserError: that went wrong.
  """
  environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
  environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
  done = subprocess.run(
    # No site packages to set up, and not this folder as a place of modules.
    [sys.executable, "-S", "-P", str(_PROGRAM)],
    input=json.dumps({"grammar": grammar, "limits": _LIMITS}).encode(),
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    env=environment,
    check=False,
  )
  if done.returncode in (-signal.SIGPROF, -signal.SIGALRM):
    raise errors.UserError(
      f"{knob} takes more than a second to compile; make it smaller."
    )
  if done.returncode:
    raise errors.UserError(
      f"{knob} brought its compiler down (exit status {done.returncode}); make"
      " it smaller."
    )
  if done.stdout:
    raise errors.UserError(
      f"{knob} is refused: {_reason(done.stdout.decode())}."
    )


def _reason(message: str) -> str:
  """The library's words, without where in our own grammar it was."""
  lines = [line.strip() for line in message.splitlines() if line.strip()]
  # A faulty regex is shown with a caret below, and the reason after it.
  reasons = [line for line in lines if line.startswith("error: ")]
  reason = _PLACE.sub("", (reasons or lines or ["it gives no reason"])[0])
  for start, ours in _OURS.items():
    if reason.startswith(start):
      return ours
  return reason[:_MAX_REASON].rstrip(". ")


_MAX_REASON = 200  # characters
_PLACE = re.compile(
  r"(at \d+\(\d+\): |failed to compile JSON schema: |error: )*"
)
# Where its words say nothing to who wrote a schema, or name a knob of its own.
_OURS = {
  _NOTHING: "no text fits it",
  "Parser Error: Current row": (
    "it has too many ways to go on at one place; make properties required, or"
    " have fewer"
  ),
  "oneOf constraints": (
    "oneOf is kept only where no two of its schemas can both hold; use anyOf"
  ),
}


def _compiled(table: "_Table", grammar: str):
  """On a large stack, as a chain of references takes a frame each."""
  import llguidance

  with _STACK, concurrent.futures.ThreadPoolExecutor(1) as pool:
    before = threading.stack_size(_STACK_BYTES)
    try:
      future = pool.submit(
        llguidance.LLMatcher,
        table.library,
        grammar,
        log_level=0,
        limits=llguidance.LLParserLimits(**_LIMITS),
      )
    finally:
      threading.stack_size(before)
    return future.result()


# The size of the next thread's stack is the process's.
_STACK = threading.Lock()


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
