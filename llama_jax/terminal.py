"""A conversation on the terminal, and text as it comes.

readline edits a line and brings back earlier ones. Several lines pasted at once
are one message, whatever they hold.
"""

import contextlib
import json
import pathlib
import select
import signal
import sys

from llama_jax import errors
from llama_jax.checkpoint import atomic

# Seconds in which what was pasted with a line has come too. A person who types
# needs longer for the next one.
_PASTED = 0.05
_COMMANDS = {
  "/help": "shows this list",
  "/reset": "forgets what was said; the system message stays",
  "/system TEXT": "sets the system message; without TEXT, takes it away",
  "/save FILE": 'writes the conversation as a line of JSON, {"messages": ...}',
  "/exit": "ends, as does Ctrl-D",
}


class _Interrupts:
  """Notes the first Ctrl-C within; the second is Python's KeyboardInterrupt.

  An exception that Python raises wherever it happens to be may be swallowed
  there; what is noted is not.
  """

  def __init__(self):
    self.noted = False

  def __enter__(self) -> "_Interrupts":
    self._before = signal.signal(signal.SIGINT, self._note)
    return self

  def __exit__(self, *error) -> None:
    signal.signal(signal.SIGINT, self._before)

  def _note(self, number, frame) -> None:
    del number, frame
    self.noted = True
    signal.signal(signal.SIGINT, self._before)


def speak(llama, prompt, settings, stoppable: bool = False) -> str:
  """Prints an answer as it comes; returns it whole.

  stoppable: Ctrl-C cuts it short, behind the piece that is being made.
  """
  parts = []
  with _Interrupts() if stoppable else contextlib.nullcontext() as interrupts:
    try:
      for piece in llama.stream(prompt, **settings):
        parts.append(piece)
        print(piece, end="", flush=True)
        if interrupts and interrupts.noted:
          raise KeyboardInterrupt
    except KeyboardInterrupt:
      if not stoppable:
        raise
      print(" [stopped]", end="")
  print(flush=True)
  return "".join(parts)


def chat(llama, settings, system: str | None = None) -> None:
  """Talks until /exit or the end of the input.

  Args:
    llama: a `llama.Llama`.
    settings: of `llama.stream`.
    system: the system message.

  Raises:
    UserError: the model has no chat template, or one without system messages.
  """
  conversation = _Conversation(llama, settings)
  conversation.set_system(system)
  typed = sys.stdin.isatty()
  if typed:
    with contextlib.suppress(ImportError):  # some Pythons come without it
      import readline  # noqa: F401 (input() edits lines from here on)
    print("/help shows the commands; Ctrl-C stops an answer, Ctrl-D ends.")
  while True:
    try:
      said = _read(typed)
      if said is None or not conversation.take(said):
        return
    except KeyboardInterrupt:
      if not typed:
        raise
      print()
    except (errors.UserError, OSError) as error:
      print(f"error: {error}", file=sys.stderr, flush=True)


class _Conversation:
  """What was said so far.

  Every command and every message is kept whole or not at all.
  """

  def __init__(self, llama, settings):
    self._llama = llama
    self._settings = settings
    self._system = []
    self._turns = []
    self._saved = None

  def take(self, said: str) -> bool:
    """Obeys a command or answers a message; False for /exit."""
    if said.startswith("/") and "\n" not in said:
      name, _, rest = said.partition(" ")
      return self._obey(name, rest.strip())
    if said.strip():
      self._answer(said.strip())
    return True

  def set_system(self, text: str | None) -> None:
    system = [{"role": "system", "content": text}] if text else []
    self._llama.encode_chat([*system, {"role": "user", "content": "?"}])
    self._system = system

  def _obey(self, name: str, rest: str) -> bool:
    if name == "/exit":
      return False
    if name == "/help":
      for command, meaning in _COMMANDS.items():
        print(f"  {command:<14}{meaning}")
    elif name == "/reset":
      self._turns = []
    elif name == "/system":
      self.set_system(rest)
    elif name == "/save":
      self._save(rest)
    else:
      raise errors.UserError(
        f"{name} is no command; there are {', '.join(_COMMANDS)}. A message"
        " that begins with / takes a space before it."
      )
    return True

  def _save(self, name: str) -> None:
    if not name:
      raise errors.UserError("/save takes the name of a file.")
    if not self._turns:
      raise errors.UserError("nothing was said yet, so nothing is saved.")
    path = pathlib.Path(name).expanduser().absolute()
    if path.exists() and path != self._saved:
      raise errors.UserError(f"{path} exists; name another file.")
    row = {"messages": [*self._system, *self._turns]}
    atomic.write_text(path, json.dumps(row, ensure_ascii=False) + "\n")
    self._saved = path
    print(f"saved {len(row['messages'])} messages to {path}")

  def _answer(self, said: str) -> None:
    turns = [*self._turns, {"role": "user", "content": said}]
    try:
      prompt = self._llama.encode_chat([*self._system, *turns])
      room = self._llama.config.context_length - len(prompt)
      allowed = max(1, min(self._settings["max_new_tokens"], room))
      settings = {**self._settings, "max_new_tokens": allowed}
      answer = speak(self._llama, prompt, settings, stoppable=True)
    except errors.UserError as error:
      raise errors.UserError(f"{error} (/reset begins anew)") from error
    self._turns = [*turns, {"role": "assistant", "content": answer}]


def _read(typed: bool) -> str | None:
  """A line, with the lines pasted behind it; None at the end of the input."""
  try:
    said = input("you> " if typed else "")
  except EOFError:
    return None
  # A terminal that marks what is pasted gave it whole; others, line by line.
  with contextlib.suppress(EOFError):
    while typed and select.select([sys.stdin], [], [], _PASTED)[0]:
      said += "\n" + input("")
  return said
