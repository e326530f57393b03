"""A conversation on a real terminal, with a model that answers at once."""

import codecs
import json
import os
import pathlib
import pty
import re
import select
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Says how many messages it saw, the system message and what was said; takes
# long over what begins with "slow"; knows no system message "bad".
_PROGRAM = """
import fcntl, signal, sys, termios, time, types
from llama_jax import errors, terminal

if sys.stdin.isatty():  # Ctrl-C is to reach us, as from a shell
  fcntl.ioctl(0, termios.TIOCSCTTY, 0)
  # Ignored by all that a shell without job control runs in the background.
  signal.signal(signal.SIGINT, signal.default_int_handler)

class Model:
  config = types.SimpleNamespace(context_length=50)

  def encode_chat(self, messages):
    if messages[0]["content"] == "bad":
      raise errors.UserError("the template refuses bad")
    return messages

  def stream(self, prompt, max_new_tokens):
    if "refuse" in prompt[-1]["content"]:
      raise errors.UserError("shorten the prompt")
    yield f"<{len(prompt)}|{prompt[0]['content']}|"
    if prompt[-1]["content"].startswith("slow"):
      for _ in range(300):
        time.sleep(0.1)
        yield "."
    yield prompt[-1]["content"].upper().replace("\\n", "+") + ">"

terminal.chat(Model(), {"max_new_tokens": 9}, SYSTEM)
print("the end")
"""
_ENDED = "the end"


class _Terminal:
  """A program behind a pseudo-terminal."""

  def __init__(self, folder, system=None, term="xterm"):
    main, side = pty.openpty()
    self._process = subprocess.Popen(
      [sys.executable, "-c", _PROGRAM.replace("SYSTEM", repr(system))],
      stdin=side,
      stdout=side,
      stderr=side,
      start_new_session=True,
      cwd=folder,
      env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": term},
    )
    os.close(side)
    self._main = main
    self._seen = ""
    self._decoder = codecs.getincrementaldecoder("utf-8")()
    self.wait_for("you> ")

  def send(self, text):
    os.write(self._main, text.encode())

  def wait_for(self, words, seconds=30):
    """What is shown up to the words, which it takes away."""
    end = time.monotonic() + seconds
    while words not in self._seen:
      assert time.monotonic() < end, (words, self._seen)
      if select.select([self._main], [], [], 0.1)[0]:
        try:
          data = os.read(self._main, 4096)
        except OSError:  # the other side is closed
          data = b""
        assert data, (words, self._seen)
        text = self._decoder.decode(data)
        self._seen += re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", text)
    before, _, self._seen = self._seen.partition(words)
    return before

  def interrupt(self, words):
    """Ctrl-C until the words are shown.

    A signal just before Python waits for a key is seen with the next one.
    """
    for _ in range(5):
      self.send("\x03")
      try:
        self.wait_for(words, seconds=3)
      except AssertionError:
        continue
      return
    raise AssertionError((words, self._seen))

  def say(self, text, answer):
    self.send(text + "\r")
    self.wait_for(answer)
    self.wait_for("you> ")

  def close(self):
    self._process.kill()
    self._process.wait()
    os.close(self._main)


@pytest.fixture
def talk(tmp_path):
  opened = []

  def start(**settings):
    opened.append(_Terminal(tmp_path, **settings))
    return opened[-1]

  yield start
  for terminal in opened:
    terminal.close()


def test_it_remembers_until_it_is_told_to_forget(talk):
  here = talk(system="sys")
  here.say("one", "<2|sys|ONE>")
  here.say("two", "<4|sys|TWO>")
  here.say("", "\n")
  here.say("/reset", "/reset")
  here.say("three", "<2|sys|THREE>")
  here.say("/system other words", "other words")
  here.say("four", "<4|other words|FOUR>")
  here.say("/system", "/system")
  here.say("five", "<5|three|FIVE>")
  here.send("\x04")
  here.wait_for(_ENDED)


def test_what_is_refused_changes_nothing(talk):
  here = talk()
  here.say("one", "<1|one|ONE>")
  here.say("/nonsense", "error: /nonsense is no command; there are /help,")
  here.say("/resetting", "error: /resetting is no command")
  here.say("refuse this", "shorten the prompt (/reset begins anew)")
  here.say("/system bad", "error: the template refuses bad")
  here.say("/help", "/save FILE")
  here.say(" /usr is a folder", "<3|one|/USR IS A FOLDER>")
  here.send("/exit\r")
  here.wait_for(_ENDED)


def test_ctrl_c_stops_the_answer_and_not_the_program(talk):
  here = talk()
  here.send("slow one\r")
  here.wait_for("<1|slow one|..")
  here.send("\x03")
  here.wait_for("[stopped]")
  here.wait_for("you> ")
  here.say("two", "<3|slow one|TWO>")
  here.send("half a line")
  here.wait_for("half a line")
  here.interrupt("you> ")
  here.say("three", "<5|slow one|THREE>")
  here.send("/exit\r")
  here.wait_for(_ENDED)


def test_earlier_lines_come_back(talk):
  pytest.importorskip("readline")
  here = talk()
  here.say("once more", "<1|once more|ONCE MORE>")
  here.say("\x1b[A", "<3|once more|ONCE MORE>")


@pytest.mark.parametrize("marked", [True, False])
def test_pasted_lines_are_one_message(talk, marked):
  """Commands among them too; a dumb terminal does not mark what is pasted."""
  if marked:
    pytest.importorskip("readline")
  here = talk(term="xterm" if marked else "dumb")
  lines = "first\n/exit\nlast"
  here.send(f"\x1b[200~{lines}\x1b[201~\r" if marked else f"{lines}\n")
  here.wait_for("|FIRST+/EXIT+LAST>")
  here.wait_for("you> ")
  here.say("next", "<3|")


def test_a_saved_conversation_is_a_line_of_json(talk, tmp_path):
  here = talk(system="sys")
  here.say("/save", "error: /save takes the name of a file")
  here.say("/save a.jsonl", "error: nothing was said yet")
  here.say("é你", "<2|sys|É你>")
  here.say("/save new/a.jsonl", "saved 3 messages to")
  file = tmp_path / "new/a.jsonl"
  (row,) = map(json.loads, file.read_text(encoding="utf-8").splitlines())
  assert row == {
    "messages": [
      {"role": "system", "content": "sys"},
      {"role": "user", "content": "é你"},
      {"role": "assistant", "content": "<2|sys|É你>"},
    ]
  }
  here.say("more", "<4|sys|MORE>")
  here.say("/save new/a.jsonl", "saved 5 messages to")
  mine = tmp_path / "mine"
  mine.write_text("mine")
  here.say("/save mine", "mine exists; name another file")
  here.say("/save mine/b", "error: ")
  assert mine.read_text() == "mine"
  assert [p.name for p in file.parent.iterdir()] == ["a.jsonl"]


def test_a_pipe_is_read_line_by_line():
  done = subprocess.run(
    [sys.executable, "-c", _PROGRAM.replace("SYSTEM", "None")],
    input="one\n\n/reset\ntwo\n/what\nthree",
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    check=True,
  )
  assert done.stdout.splitlines() == [
    "<1|one|ONE>",
    "<1|two|TWO>",
    "<3|two|THREE>",
    _ENDED,
  ]
  assert done.stderr.count("\n") == 1 and "/what is no command" in done.stderr
