"""What a JSON object says: a conversation, or answers to compare.

A conversation is one of
  {"messages": [{"role", "content"}, ...]}                OpenAI's form
  {"conversations": [{"from", "value"}, ...], "system"?}  ShareGPT's
  {"instruction", "input"?, "output", "system"?}          Alpaca's
  {"prompt", "completion"}, {"question", "answer"}        a turn each
and a preference one of
  {"prompt", "chosen", "rejected"}      texts, or lists of messages
  {"chosen", "rejected"}                whole dialogs, as messages or as text of
                                        "\n\nHuman: ...\n\nAssistant: ..."
  {"conversations", "chosen", "rejected"}  the answers in ShareGPT's form
with further keys, all optional: "edited", an answer better than the chosen one
(arXiv:2407.21783, 4.1.2); "rating", how much better chosen is than rejected,
one of RATINGS (arXiv:2307.09288, 3.2.1); "chosen_safe", "rejected_safe" and
"edited_safe", booleans.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

# How much better; the last is for annotators who were unsure as well.
RATINGS = ("significantly_better", "better", "slightly_better", "unsure")
_OTHER_RATINGS = {
  "negligibly_better": "unsure",
  "negligibly_better_unsure": "unsure",
  "marginally_better": "unsure",
}
_ROLES = {
  "human": "user",
  "gpt": "assistant",
  "bot": "assistant",
  "model": "assistant",
  "observation": "tool",
}
_PAIRS = (("prompt", "completion"), ("question", "answer"))
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")


class Unusable(Exception):
  """A row that cannot be learned from; its text is the reason."""


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Messages as text.chat takes them, and its variables, such as tools."""

  messages: list[Message]
  variables: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Preference:
  """Answers to one prompt, the best first.

  Attributes:
    prompt: the messages before, the last not the assistant's.
    answers: two or three texts.
    rating: index into RATINGS of the last two of them; -1 where not rated.
    safe: of each answer, 1, 0, or -1 where not told.
  """

  prompt: list[Message]
  answers: tuple[str, ...]
  rating: int
  safe: tuple[int, ...]


def conversation(row: Mapping[str, Any]) -> Conversation:
  """The conversation in a row; raises Unusable."""
  row = _given(row)
  form = _form(row)
  if form is None:
    raise Unusable(_unknown(row, "a conversation"))
  if form in ("messages", "conversations"):
    messages = _messages(row[form], form)
  elif form == "instruction":
    asked = _text(row, "instruction")
    if row.get("input"):
      asked += "\n\n" + _text(row, "input")
    messages = _turn(asked, _text(row, "output"))
  else:
    messages = _turn(*(_text(row, key) for key in form))
  if row.get("system"):
    messages = [{"role": "system", "content": _text(row, "system")}, *messages]
  answers = [m for m in messages if m["role"] == "assistant"]
  if not answers:
    raise Unusable("no message is the assistant's")
  if any(_is_empty(message) for message in answers):
    raise Unusable("an answer is empty")
  variables = {}
  if row.get("tools"):
    variables["tools"] = _tools(row["tools"])
  return Conversation(messages, variables)


def preference(row: Mapping[str, Any]) -> Preference:
  """The answers to compare in a row; raises Unusable."""
  row = _given(row)
  names = [name for name in ("edited", "chosen", "rejected") if name in row]
  if not {"chosen", "rejected"} <= set(names):
    raise Unusable(_unknown(row, "a preference"))
  dialogs = [_dialog(row[name], name) for name in names]
  if "prompt" in row:
    before = _prompt(row["prompt"])
  elif "conversations" in row:
    before = _messages(row["conversations"], "conversations")
  else:
    before = None
  prompts, answers = [], []
  for name, messages in zip(names, dialogs, strict=True):
    *rest, last = messages
    if last["role"] != "assistant":
      raise Unusable(f'"{name}" does not end with the assistant')
    if not isinstance(last["content"], str):
      raise Unusable(f'the answer of "{name}" is no text')
    prompts.append(rest)
    answers.append(last["content"])
  if names[0] == "edited" and answers[0].strip() == answers[1].strip():
    # Nothing was edited: the pair of the others stands.
    names, prompts, answers = names[1:], prompts[1:], answers[1:]
  prompt = before if before is not None else prompts[0]
  for name, rest in zip(names, prompts, strict=True):
    # Both forms are about: the answer alone, or the prompt once more.
    if rest not in ([], prompt):
      raise Unusable(f'"{name}" answers another prompt')
  if not prompt or prompt[-1]["role"] == "assistant":
    raise Unusable("no message before the answer is the user's")
  if row.get("system") and prompt[0]["role"] != "system":
    prompt = [{"role": "system", "content": _text(row, "system")}, *prompt]
  if not all(answer.strip() for answer in answers):
    raise Unusable("an answer is empty")
  if len({answer.strip() for answer in answers}) < len(answers):
    raise Unusable("two answers are alike")
  return Preference(
    prompt, tuple(answers), _rating(row), tuple(_safe(row, n) for n in names)
  )


def is_conversation(row: Mapping[str, Any]) -> bool:
  """Whether a row has the keys of one of a conversation's forms."""
  return _form(_given(row)) is not None


def _form(row: Mapping[str, Any]) -> str | tuple[str, str] | None:
  """The key, or the two, that tell a conversation's form."""
  for key in ("messages", "conversations", "instruction"):
    if key in row:
      return key
  return next((pair for pair in _PAIRS if set(pair) <= set(row)), None)


def _given(row: Mapping[str, Any]) -> dict[str, Any]:
  """The keys with a value: a table has every column in every row."""
  return {key: value for key, value in row.items() if value is not None}


def _rating(row) -> int:
  given = row.get("rating")
  if given is None:
    return -1
  name = re.sub(r"[\W_]+", "_", str(given).strip().lower())
  name = _OTHER_RATINGS.get(name, name)
  if name not in RATINGS:
    raise Unusable(
      f"rating {given!r} is not in the table: {', '.join(RATINGS)}"
    )
  return RATINGS.index(name)


def _safe(row, name: str) -> int:
  given = row.get(f"{name}_safe")
  if given is not None and not isinstance(given, bool):
    raise Unusable(f'"{name}_safe" must be true or false')
  return -1 if given is None else int(given)


def _dialog(given: Any, name: str) -> list[Message]:
  """An answer, or a dialog that ends with one."""
  if isinstance(given, Mapping):
    return _messages([given], name)
  if not isinstance(given, str):
    return _messages(given, name)
  if not _TRANSCRIPT.match(given):
    return [{"role": "assistant", "content": given}]
  # As HH-RLHF has it (arXiv:2204.05862): what stands before the first mark is
  # empty, then marks and texts in turn.
  parts = _TRANSCRIPT.split(given)[1:]
  roles = {"Human": "user", "Assistant": "assistant"}
  return [
    {"role": roles[who], "content": said.strip()}
    for who, said in zip(parts[::2], parts[1::2], strict=True)
  ]


def _prompt(given: Any) -> list[Message]:
  if not isinstance(given, str):
    return _messages(given, "prompt")
  if _TRANSCRIPT.match(given):
    messages = _dialog(given, "prompt")
    # A text may end with the mark of the answer to come.
    return messages if messages[-1]["content"] else messages[:-1]
  return [{"role": "user", "content": given}]


def _messages(given: Any, name: str) -> list[Message]:
  """Messages in either form as {"role", "content", ...}."""
  if not isinstance(given, Sequence) or isinstance(given, str) or not given:
    raise Unusable(f'"{name}" is no list of messages')
  found = []
  for message in given:
    if not isinstance(message, Mapping):
      raise Unusable(f'"{name}" is no list of messages')
    if "from" in message and "role" not in message:
      role, content = message["from"], message.get("value")
    else:
      role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or (content is None and role != "assistant"):
      raise Unusable(f'a message of "{name}" lacks its role or its content')
    rest = {
      key: value
      for key, value in message.items()
      if key not in ("role", "content", "from", "value")
    }
    if isinstance(content, list):
      content = _joined(content, name)
    if role == "function_call":
      role, content, rest = "assistant", "", {"tool_calls": _call(content)}
    found.append({"role": _ROLES.get(role, role), "content": content, **rest})
  return found


def _joined(parts: Sequence[Any], name: str) -> str:
  """The text of OpenAI's content parts, which few templates know."""
  for part in parts:
    is_text = isinstance(part, Mapping) and part.get("type", "text") == "text"
    if not is_text or not isinstance(part.get("text"), str):
      raise Unusable(f'a message of "{name}" has a part that is no text')
  return "".join(part["text"] for part in parts)


def _call(content: Any) -> list[dict[str, Any]]:
  """The calls of tools that a message of ShareGPT's form makes."""
  try:
    calls = json.loads(content)
    calls = calls if isinstance(calls, list) else [calls]
    return [
      {
        "type": "function",
        "function": {"name": one["name"], "arguments": one["arguments"]},
      }
      for one in calls
    ]
  except (ValueError, TypeError, KeyError) as error:
    raise Unusable(f"a function_call is not one ({error!r})") from error


def _tools(given: Any) -> list[Any]:
  try:
    tools = json.loads(given) if isinstance(given, str) else given
  except ValueError as error:
    raise Unusable(f'"tools" is not JSON ({error})') from error
  if not isinstance(tools, list):
    raise Unusable('"tools" is no list')
  return tools


def _is_empty(message: Message) -> bool:
  content = message["content"]
  said = content.strip() if isinstance(content, str) else content
  return not said and not message.get("tool_calls")


def _turn(asked: str, answered: str) -> list[Message]:
  return [
    {"role": "user", "content": asked},
    {"role": "assistant", "content": answered},
  ]


def _text(row, name: str) -> str:
  value = row.get(name)
  if not isinstance(value, str):
    raise Unusable(f'"{name}" is no text')
  return value


def _unknown(row, what: str) -> str:
  keys = ", ".join(sorted(map(str, row))[:8])
  return f"not {what} in any known form; it has the keys {keys or 'none'}"
