"""Renders a template in a process of its own, which `jinja_child` bounds.

The process starts with the first template (0.2 s), serves all later ones, and
ends with its parent. One that a template brought down is replaced.
"""

import atexit
import dataclasses
import functools
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from llama_jax import errors

_PROGRAM = pathlib.Path(__file__).with_name("jinja_child.py")
_LENGTH = struct.Struct(">Q")
_OUT_OF_MEMORY = 3  # as jinja_child says
# A template needs nothing of our environment but where Python's parts lie and
# what the time is; whatever else it holds is none of its business.
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ", "PYTHONHOME")


@dataclasses.dataclass(frozen=True)
class Output:
  """has_generation: the template marks what to train on by itself."""

  text: str
  has_generation: bool


def render(
  source: str,
  variables: Mapping[str, Any],
  generation_marks: tuple[str, str] = ("", ""),
) -> Output:
  """What a template makes of variables, which are values that JSON knows.

  generation_marks: letters to put around each {% generation %} block.

  Raises:
    UserError: the template is faulty, refuses the variables, or takes more
      than half a second or 256 MB.
  """
  start, end = generation_marks
  given = {**variables, "generation_start__": start, "generation_end__": end}
  try:
    text = json.dumps(
      {"source": source, "variables": given}, ensure_ascii=False
    )
  except (TypeError, ValueError, RecursionError) as error:
    raise errors.UserError(
      f"messages, tools and other variables of a chat must be JSON: {error}."
    ) from error
  # The child, not we, is to find half a surrogate pair.
  request = text.encode("utf-8", "surrogatepass")
  content = _worker(os.getpid()).ask(request)
  answer = json.loads(content.decode("utf-8", "surrogatepass"))
  if "error" in answer:
    raise errors.UserError(f"the chat template {answer['error']}")
  return Output(**answer)


@functools.lru_cache(maxsize=1)
def _worker(pid: int) -> "_Worker":
  """One for each process of ours: a fork must not share its parent's."""
  del pid
  worker = _Worker()
  atexit.register(worker.close)
  return worker


class _Worker:
  """A child process, and who may speak to it."""

  def __init__(self):
    self._lock = threading.Lock()
    self._process = None
    self._owner = os.getpid()

  def ask(self, request: bytes) -> bytes:
    with self._lock:
      if self._process is None or self._process.poll() is not None:
        self._process = _start()
      child = self._process
      try:
        child.stdin.write(_LENGTH.pack(len(request)) + request)
        child.stdin.flush()
        head = child.stdout.read(_LENGTH.size)
        size = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else -1
        answer = child.stdout.read(size) if size >= 0 else b""
        if len(answer) == size:
          return answer
      except BrokenPipeError:
        pass
      except BaseException:  # an answer half read would be taken for the next
        child.kill()
        child.wait()
        raise
      raise errors.UserError(_why(child.wait()))

  def close(self) -> None:
    # A fork inherits this, not the child.
    if self._process is not None and os.getpid() == self._owner:
      self._process.kill()
      self._process.wait()


def _start() -> subprocess.Popen:
  environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
  environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
  return subprocess.Popen(
    # No site packages to set up, and not this folder as a place of modules.
    [sys.executable, "-S", "-P", str(_PROGRAM)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    env=environment,
  )


def _why(status: int) -> str:
  if status in (-signal.SIGPROF, -signal.SIGALRM):
    return "the chat template does not end: stopped after half a second's work."
  if status == _OUT_OF_MEMORY:
    return "the chat template needs more than the 256 MB that it may have."
  return f"the chat template brought its process down (exit status {status})."
