"""Dialogs -> ids, by the Jinja template that a model brings along.

The template is a program from outside and runs in a sandbox. What people wrote
is text: before rendering, the first letter of every special token that a
message spells is put under a mask, a private-use letter; the rendered text is
cut at the special tokens that remain, all of them the template's own; then the
masks come off and the text between is encoded as a user's text. So the ids
equal those of encoding the rendered text whole, but for the special tokens
that a message spells.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from llama_jax import errors
from llama_jax.text import tokenizer as tokenizer_lib

ROLES = (
  "system",
  "developer",
  "user",
  "assistant",
  "tool",
  "function",
  "ipython",
)
# Characters, of a whole chat or of any one string made on the way.
MAX_RENDERED = 2**24
_PRIVATE_USE = range(0xE000, 0xF900)


def render(
  tokenizer: tokenizer_lib.Tokenizer,
  messages: Sequence[Mapping[str, Any]],
  add_generation_prompt: bool = True,
  **variables: Any,
) -> list[int]:
  """Ids of a dialog, as transformers' apply_chat_template gives them.

  messages: [{"role": one of ROLES, "content": str}, ...]; further keys, and
    `variables` such as `tools`, are the template's to use.
  Begin of text is written by the template, or not at all.

  Raises:
    UserError: the messages are malformed, there is no template, or it is
      faulty or refuses the messages.
  """
  mask, rendered = _render(
    tokenizer, messages, add_generation_prompt, variables
  )
  return tokenizer.encode_parts(
    [
      mask.remove(part) if isinstance(part, str) else part
      for part in tokenizer.split_special(rendered)
    ]
  )


def render_text(
  tokenizer: tokenizer_lib.Tokenizer,
  messages: Sequence[Mapping[str, Any]],
  add_generation_prompt: bool = True,
  **variables: Any,
) -> str:
  """The text of `render`, to be read; `encode` of it is not the same."""
  mask, rendered = _render(
    tokenizer, messages, add_generation_prompt, variables
  )
  return mask.remove(rendered)


def _render(tokenizer, messages, add_generation_prompt, variables):
  if tokenizer.chat_template is None:
    raise errors.UserError(
      "this tokenizer has no chat template; use a chat model's, or put a"
      " chat_template.jinja beside its files."
    )
  _check(messages)
  mask = _Mask(tokenizer, messages, variables)
  variables = {
    "tools": None,
    "documents": None,
    **tokenizer.named_tokens,
    **{key: mask.put(value) for key, value in variables.items()},
    "messages": [
      {k: v if k == "role" else mask.put(v) for k, v in message.items()}
      for message in messages
    ],
    "add_generation_prompt": add_generation_prompt,
  }
  try:
    template = _compiled(tokenizer.chat_template)
    pieces, size = [], 0
    for piece in template.generate(variables):
      pieces.append(piece)
      size += len(piece)
      if size > MAX_RENDERED:
        raise jinja2.TemplateError(f"more than {MAX_RENDERED} characters")
  except jinja2.TemplateSyntaxError as error:
    raise errors.UserError(
      f"the chat template is faulty at line {error.lineno}: {error.message}"
    ) from error
  except jinja2.TemplateError as error:
    raise errors.UserError(
      f"the chat template refuses these messages: {error.message}"
    ) from error
  except Exception as error:  # a template may fail in any way
    raise errors.UserError(
      "the chat template fails on these messages:"
      f" {type(error).__name__}: {error}"
    ) from error
  rendered = "".join(pieces)
  tokenizer_lib.check_text(rendered)
  return mask, rendered


def _check(messages: Any) -> None:
  if not isinstance(messages, list | tuple) or not messages:
    raise errors.UserError(
      'messages must be a list of {"role": ..., "content": ...}, at least one.'
    )
  for i, message in enumerate(messages):
    if not isinstance(message, Mapping):
      raise errors.UserError(
        f'messages[{i}] must be {{"role": ..., "content": ...}}, not'
        f" {type(message).__name__}."
      )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
      raise errors.UserError(
        f"messages[{i}] has role {role!r}; use one of {', '.join(ROLES)}."
      )
    # A call of a tool may come without words; parts are the template's affair.
    if not isinstance(content, str | list | tuple) and not (
      content is None and message.get("tool_calls")
    ):
      raise errors.UserError(
        f"messages[{i}] has content of type {type(content).__name__}; it must"
        " be a string."
      )


class _Mask:
  """Hides the special tokens that strings from outside spell.

  Also those they could spell together with what the template puts next to
  them: a string that starts with the end of one, or ends with the start.
  """

  def __init__(self, tokenizer, *values: Any):
    specials = list(tokenizer.special_tokens)
    text = tokenizer.chat_template + "".join(specials)
    used = set(text).union(*map(set, _strings(values)))
    firsts = sorted({s[0] for s in specials})
    ends = {s[i] for s in specials for i in range(1, len(s))}
    letters = [*firsts, *sorted(ends.difference(firsts))]
    free = [chr(c) for c in _PRIVATE_USE if chr(c) not in used]
    if len(free) < len(letters):
      raise errors.UserError(
        "the messages use too many private-use characters (U+E000 to U+F8FF)."
      )
    self._letters = dict(zip(letters, free, strict=False))
    self._removal = {
      ord(masked): letter for letter, masked in self._letters.items()
    }
    self._patterns = _patterns(tuple(specials)) if specials else None

  def put(self, value: Any) -> Any:
    """A copy with every string masked; keys of dictionaries too."""
    if isinstance(value, str):
      return self._put(value)
    if isinstance(value, Mapping):
      return {self.put(k): self.put(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
      return [self.put(v) for v in value]
    return value

  def remove(self, text: str) -> str:
    return text.translate(self._removal)

  def _put(self, text: str) -> str:
    if self._patterns is None:
      return text
    inside, head, tail = self._patterns
    text = inside.sub(lambda match: self._letters[match.group()], text)
    # A template may trim, so white space at either end does not count.
    start = len(text) - len(text.lstrip())
    for match in (tail.match(text, start), head.search(text)):
      if match:
        at = match.start()
        letter = self._letters.get(text[at], text[at])  # may be hidden already
        text = text[:at] + letter + text[at + 1 :]
    return text


@functools.lru_cache(maxsize=8)
def _patterns(specials: tuple[str, ...]):
  """Patterns of: the first letter of a special token, wherever one starts; the
  start of one at a string's end; the end of one, for a string's start."""

  def either(texts) -> str:
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))

  # Left as it is at an end: white space, which templates trim.
  heads = {s[:i] for s in specials for i in range(1, len(s))}
  tails = {s[i:] for s in specials for i in range(1, len(s))}
  heads, tails = ({t for t in e if not t.isspace()} for e in (heads, tails))
  return (
    re.compile(
      f"{tokenizer_lib.first_letters(specials)}(?={either(specials)}).",
      re.DOTALL,
    ),
    re.compile(rf"(?:{either(heads)})(?=\s*\Z)" if heads else r"(?!)"),
    re.compile(either(tails) or r"(?!)"),
  )


def _strings(value: Any):
  """Every string in a nest of lists and dictionaries."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, Mapping):
    for key, item in value.items():
      yield from _strings(key)
      yield from _strings(item)
  elif isinstance(value, list | tuple):
    for item in value:
      yield from _strings(item)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """Jinja's sandbox, which also refuses to make giant strings and numbers."""

  intercepted_binops = frozenset(["*", "**", "%"])

  def call_binop(self, context, operator, left, right):
    pair = (left, right)
    if operator == "*":
      for repeated, times in (pair, pair[::-1]):
        if isinstance(repeated, str | list | tuple | bytes) and isinstance(
          times, int
        ):
          _refuse_above(MAX_RENDERED, len(repeated) * times)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
      _refuse_above(4096, left.bit_length() * right)
    elif operator == "%" and isinstance(left, str):
      widths = re.findall(r"\d+|\*", left)
      if "*" in widths:
        raise jinja2.TemplateError("'%*' is not allowed")
      _refuse_above(MAX_RENDERED, max(map(int, widths), default=0))
    return super().call_binop(context, operator, left, right)


def _refuse_above(limit: int, size: int) -> None:
  if size > limit:
    raise jinja2.TemplateError(f"a value of size {size}; at most {limit}")


class _Generation(jinja2.ext.Extension):
  """transformers' {% generation %} block, which marks what to train on; here
  its body stands for itself."""

  tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
  """A template with what transformers gives to one."""
  sandbox = _Sandbox(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, "jinja2.ext.loopcontrols"],
  )
  sandbox.filters["tojson"] = _to_json
  sandbox.globals["raise_exception"] = _raise
  sandbox.globals["strftime_now"] = _now
  return sandbox.from_string(source)


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  text = json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )
  if not ensure_ascii:
    return text
  # A mask must stay the letter it is, or it could not be taken off.
  return re.sub(
    r"\\u(e[0-9a-f]{3}|f[0-8][0-9a-f]{2})",
    lambda match: chr(int(match[1], 16)),
    text,
  )


def _raise(message: str):
  raise jinja2.TemplateError(message)


def _now(format: str) -> str:
  return datetime.datetime.now().strftime(format)
