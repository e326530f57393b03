"""Dialogs -> ids, by the Jinja template that a model brings along.

The template is a program from outside and runs in a sandbox (`jinja`). What
people wrote is text: before rendering, the special tokens that a message
spells are hidden (`mask`); the rendered text is cut at the special tokens that
remain, all of them the template's own; then what was hidden is shown again and
the text between is encoded as a user's text. So the ids equal those of
encoding the rendered text whole, but for the special tokens that a message
spells.

What the assistant is trained to say is told in one of three ways:
  - a template with {% generation %} blocks says it: what they hold;
  - else the answers are marked and found again in the rendered text; theirs
    is also the token that ends the turn, and the white space before it;
  - an answer with tool calls is all that the template writes after the header
    that it gives when asked for an answer, up to the token that ends the turn.
A token of which one byte is the assistant's is the assistant's: the space that
a header ends with is often the first letter of the answer's first token.
"""

import bisect
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax import errors
from llama_jax.text import jinja
from llama_jax.text import mask as mask_lib
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
_ASSISTANT = "assistant"


@dataclasses.dataclass(frozen=True)
class Rendered:
  """A dialog as a model reads it.

  ids: of the whole dialog.
  assistant: for each id, whether the assistant is trained to say it; None
    where that was not asked for.
  """

  ids: list[int]
  assistant: list[bool] | None


def render(
  tokenizer: tokenizer_lib.Tokenizer,
  messages: Sequence[Mapping[str, Any]],
  add_generation_prompt: bool = True,
  find_assistant: bool = False,
  **variables: Any,
) -> Rendered:
  """Ids of a dialog, as transformers' apply_chat_template gives them.

  messages: [{"role": one of ROLES, "content": str}, ...]; further keys, and
    `variables` such as `tools`, are the template's to use.
  find_assistant: tell what to train on, which takes a second rendering.
  Begin of text is written by the template, or not at all.

  Raises:
    UserError: the messages are malformed, there is no template, it is faulty,
      refuses the messages or takes too long, or it hides which part of the
      text is the assistant's.
  """
  draft = _Draft(tokenizer, messages, variables)
  text, has_generation = draft.render(draft.messages, add_generation_prompt)
  parts = tokenizer.split_special(text)
  if not find_assistant:
    shown = [draft.mask.show(p) if isinstance(p, str) else p for p in parts]
    return Rendered(tokenizer.encode_parts(shown), None)
  find = _generation_blocks if has_generation else _answers
  places = find(draft, text, add_generation_prompt)
  return _encode(draft, text, parts, places)


def render_text(
  tokenizer: tokenizer_lib.Tokenizer,
  messages: Sequence[Mapping[str, Any]],
  add_generation_prompt: bool = True,
  **variables: Any,
) -> str:
  """The text of `render`, to be read; `encode` of it is not the same."""
  draft = _Draft(tokenizer, messages, variables)
  text, _ = draft.render(draft.messages, add_generation_prompt)
  return draft.mask.show(text)


def check_template(tokenizer: tokenizer_lib.Tokenizer) -> None:
  """Raises UserError where the tokenizer cannot write a chat."""
  if tokenizer.chat_template is None:
    raise errors.UserError(
      "this tokenizer has no chat template; use a chat model's, or put a"
      " chat_template.jinja beside its files."
    )


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


class _Draft:
  """One chat with its special tokens hidden, to be rendered in variations."""

  def __init__(self, tokenizer, messages, variables):
    check_template(tokenizer)
    _check(messages)
    self.tokenizer = tokenizer
    self.mask = mask_lib.Mask(tokenizer, messages, variables)
    self.messages = [
      {k: v if k == "role" else self.mask.hide(v) for k, v in message.items()}
      for message in messages
    ]
    self._variables = {
      "tools": None,
      "documents": None,
      **tokenizer.named_tokens,
      **{key: self.mask.hide(value) for key, value in variables.items()},
    }

  def render(self, messages, add_generation_prompt, generation_marks=("", "")):
    """The text, special tokens hidden, and whether it has blocks that say
    what to train on."""
    output = jinja.render(
      self.tokenizer.chat_template,
      {
        **self._variables,
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
      },
      generation_marks,
    )
    tokenizer_lib.check_text(output.text)
    return output.text, output.has_generation


def _generation_blocks(draft, text, prompt) -> list[tuple[int, int]]:
  """Where in text the {% generation %} blocks lie."""
  marked, _ = draft.render(draft.messages, prompt, draft.mask.marks)
  bare, places = draft.mask.find(marked)
  if bare != text or marked.count(draft.mask.marks[0]) != len(places):
    raise errors.UserError(
      "the chat template changes or nests its {% generation %} blocks, so what"
      " to train on cannot be told; let each hold an answer and nothing else."
    )
  return places


def _answers(draft, text, prompt) -> list[tuple[int, int]]:
  """Where in text each assistant's message lies, its end of turn included."""
  turns = [i for i, m in enumerate(draft.messages) if m["role"] == _ASSISTANT]
  calls = [i for i in turns if draft.messages[i].get("tool_calls")]
  answers = sorted(set(turns) - set(calls))
  ends = [t for t, i in _specials(draft) if i in draft.tokenizer.stop_ids]
  end = re.compile(tokenizer_lib.any_of(ends) if ends else r"(?!)")
  after = re.compile(rf"\s*{end.pattern}")
  places = []
  for start, stop in _marked(draft, answers, text, prompt):
    match = after.match(text, stop)
    places.append((start, match.end() if match else stop))
  for i in calls:
    # The header, as when the model is asked for this very message.
    header, _ = draft.render(draft.messages[:i], True)
    turn, _ = draft.render(draft.messages[: i + 1], False)
    if not (text.startswith(turn) and turn.startswith(header)):
      raise errors.UserError(
        f"the chat template writes messages[{i}], a call of tools, in another"
        " way than it asks for one, so what to train on cannot be told; add"
        " {% generation %} blocks to the template."
      )
    found = [match.end() for match in end.finditer(turn, len(header))]
    places.append((len(header), found[-1] if found else len(turn)))
  return sorted(places)


def _marked(draft, answers, text, prompt) -> list[tuple[int, int]]:
  """Where in text the contents of these messages lie."""
  if not answers:
    return []
  # A template that trims certain white space only is confused by other.
  for spaces in (True, False):
    messages, count = list(draft.messages), 0
    for i in answers:
      content = messages[i]["content"]
      if isinstance(content, str):
        content, count = draft.mask.mark(content, spaces), count + 1
      else:
        texts = [j for j, part in enumerate(content) if _has_text(part)]
        content, count = list(content), count + len(texts)
        for j in texts:
          said = draft.mask.mark(content[j]["text"], spaces)
          content[j] = {**content[j], "text": said}
      messages[i] = {**messages[i], "content": content}
    bare, places = draft.mask.find(draft.render(messages, prompt)[0])
    if bare == text and len(places) == count:
      return places
  raise errors.UserError(
    "the chat template drops, repeats or rewrites what an assistant said, so"
    " what to train on cannot be told; add {% generation %} blocks to the"
    " template, or leave such messages out."
  )


def _has_text(part: Any) -> bool:
  return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _encode(draft, text, parts, places) -> Rendered:
  """Ids of the parts of text, and which of them touch one of the places."""
  names = {id: name for name, id in _specials(draft)}
  ids, assistant = [], []
  cursor = 0
  for n, part in enumerate(parts):
    literal = part if isinstance(part, str) else names[part]
    # White space may lie between: some special tokens swallow it.
    at = text.index(literal, cursor)
    cursor = at + len(literal)
    inside = [
      (max(start, at) - at, min(stop, cursor) - at)
      for start, stop in places
      if start < cursor and stop > at
    ]
    if isinstance(part, int):
      ids.append(part)
      assistant.append(bool(inside))
      continue
    shown = draft.mask.show(part)
    # An id in front, where there was one: some vocabularies put a space before
    # the first word of a document only.
    front = parts[:n][-1:]
    new = draft.tokenizer.encode_parts([*front, shown])[len(front) :]
    ids += new
    assistant += (
      _touched(draft.tokenizer, new, shown, inside)
      if inside
      else [False] * len(new)
    )
  return Rendered(ids, assistant)


def _touched(tokenizer, ids, text, inside) -> list[bool]:
  """Which ids of a text have a byte in one of these spans of its letters."""
  whole, _ = tokenizer.join_bytes(ids, True)
  if text.encode() not in (whole, whole[1:]):
    text = text.replace("\u2581", " ")  # as SentencePiece reads it
  # The space that SentencePiece puts before a text.
  lead = len(whole) - len(text.encode())
  if whole not in (text.encode(), b" " + text.encode()):
    raise errors.UserError(
      "this tokenizer changes the text that it encodes, so which tokens are"
      " the assistant's cannot be told."
    )
  # Id i has the bytes from ends[i] to ends[i + 1].
  ends = list(itertools.accumulate(tokenizer.byte_lengths(ids), initial=-lead))
  touched = [False] * len(ids)
  for start, stop in inside:
    first = len(text[:start].encode()) if start else -lead
    last = len(text[:stop].encode())
    low = bisect.bisect_right(ends, first, lo=1) - 1
    high = max(low, bisect.bisect_left(ends, last, hi=len(ids)))
    touched[low:high] = [True] * (high - low)
  return touched


def _specials(draft) -> list[tuple[str, int]]:
  return list(draft.tokenizer.special_tokens.items())
