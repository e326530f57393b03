"""A JSON schema or a regular expression as a grammar of llguidance's.

It comes from outside, and compiling it may cost any time, memory or depth of
stack. So what is too large is refused, the rest is tried in a process of its
own (grammar_child.py), and whatever the library says of it becomes one line.

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
from collections.abc import Mapping
from typing import Any

from llama_jax import errors
from llama_jax.text import tokenizer as tokenizer_lib

_PROGRAM = pathlib.Path(__file__).with_name("grammar_child.py")
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
NOTHING = "NoExtensionBias"  # the library's word where no token goes on


def read(
  json_schema: Mapping[str, Any] | bool | str | None, regex: str | None
) -> tuple[str, str]:
  """(the knob that is given, its grammar, which compiles); see constraint.

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
  return knob, grammar


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
      f"{knob} is refused: {reason(done.stdout.decode())}."
    )


def compiled(library, grammar: str):
  """A matcher of a grammar that `read` gave; library: an LLTokenizer.

  On a large stack, as a chain of references takes a frame each.
  """
  import llguidance

  with _STACK, concurrent.futures.ThreadPoolExecutor(1) as pool:
    before = threading.stack_size(_STACK_BYTES)
    try:
      future = pool.submit(
        llguidance.LLMatcher,
        library,
        grammar,
        log_level=0,
        limits=llguidance.LLParserLimits(**_LIMITS),
      )
    finally:
      threading.stack_size(before)
    return future.result()


# The size of the next thread's stack is the process's.
_STACK = threading.Lock()


def reason(message: str) -> str:
  """The library's words, without where in our own grammar it was."""
  lines = [line.strip() for line in message.splitlines() if line.strip()]
  # A faulty regex is shown with a caret below, and the reason after it.
  reasons = [line for line in lines if line.startswith("error: ")]
  said = _PLACE.sub("", (reasons or lines or ["it gives no reason"])[0])
  for start, ours in _OURS.items():
    if said.startswith(start):
      return ours
  return said[:_MAX_REASON].rstrip(". ")


_MAX_REASON = 200  # characters
_PLACE = re.compile(
  r"(at \d+\(\d+\): |failed to compile JSON schema: |error: )*"
)
# Where its words say nothing to who wrote a schema, or name a knob of its own.
_OURS = {
  NOTHING: "no text fits it",
  "Parser Error: Current row": (
    "it has too many ways to go on at one place; make properties required, or"
    " have fewer"
  ),
  "oneOf constraints": (
    "oneOf is kept only where no two of its schemas can both hold; use anyOf"
  ),
}
