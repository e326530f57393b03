"""The process in which chat templates run; started by `jinja`, never imported.

A template is a program from outside. Jinja's sandbox keeps it from everything
but its own values; the limits of this process keep it from taking long or much
memory, in whichever way it tries: at the limit of time the kernel ends the
process, and past the limit of memory it ends itself.

Each request and each answer is a length of eight bytes and then JSON.
"""

import contextlib
import datetime
import functools
import json
import os
import re
import resource
import signal
import struct
import sys

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

CPU_SECONDS = 0.5
# A process that waits instead of computing; also a machine under heavy load.
WALL_SECONDS = 30.0
# Of address space, of which Python itself takes some 40.
MEGABYTES = 256
# Characters of a rendered chat.
MAX_RENDERED = 2**22
OUT_OF_MEMORY = 3  # exit status
LENGTH = struct.Struct(">Q")


def main() -> None:
  limit = MEGABYTES << 20
  # Where the system has no such limit, that of time must do.
  with contextlib.suppress(OSError, ValueError):
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to decide
  requests, answers = sys.stdin.buffer, sys.stdout.buffer
  while len(head := requests.read(LENGTH.size)) == LENGTH.size:
    _set_timers(CPU_SECONDS, WALL_SECONDS)
    try:
      request = requests.read(LENGTH.unpack(head)[0])
      answer = json.dumps(_answer(json.loads(request)), ensure_ascii=False)
      content = answer.encode("utf-8", "surrogatepass")
    except MemoryError:
      os._exit(OUT_OF_MEMORY)
    _set_timers(0, 0)
    answers.write(LENGTH.pack(len(content)) + content)
    answers.flush()


def _set_timers(cpu: float, wall: float) -> None:
  """Nobody handles these signals, so they end even a call into C."""
  signal.setitimer(signal.ITIMER_PROF, cpu)
  signal.setitimer(signal.ITIMER_REAL, wall)


def _answer(request: dict) -> dict:
  try:
    template = _compiled(request["source"])
    pieces, size = [], 0
    for piece in template.generate(request["variables"]):
      pieces.append(piece)
      size += len(piece)
      if size > MAX_RENDERED:
        raise jinja2.TemplateError(f"more than {MAX_RENDERED} characters")
  except jinja2.TemplateSyntaxError as error:
    return {"error": f"is faulty at line {error.lineno}: {error.message}"}
  except jinja2.TemplateError as error:
    return {"error": f"refuses these messages: {error.message}"}
  except MemoryError:
    raise
  except Exception as error:  # a template may fail in any way
    return {
      "error": f"fails on these messages: {type(error).__name__}: {error}"
    }
  return {
    "text": "".join(pieces),
    "has_generation": template.environment.has_generation,
  }


class _Generation(jinja2.ext.Extension):
  """transformers' {% generation %} block, which marks what to train on: its
  body, between the two letters that the caller chose ("" for none)."""

  tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

  def parse(self, parser):
    line = next(parser.stream).lineno
    self.environment.has_generation = True
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    start, end = (
      jinja2.nodes.Output([jinja2.nodes.Name(name, "load")], lineno=line)
      for name in ("generation_start__", "generation_end__")
    )
    return jinja2.nodes.Scope([start, *body, end], lineno=line)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
  """A template with what transformers gives to one."""
  sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, "jinja2.ext.loopcontrols"],
  )
  sandbox.has_generation = False
  sandbox.filters["tojson"] = _to_json
  sandbox.globals["raise_exception"] = _raise
  sandbox.globals["strftime_now"] = _now
  return sandbox.from_string(source)


def _to_json(
  value,
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
  # A letter of `mask` must stay one, or it could not be taken off.
  return re.sub(
    r"\\u(e[0-9a-f]{3}|f[0-8][0-9a-f]{2})",
    lambda match: chr(int(match[1], 16)),
    text,
  )


def _raise(message: str):
  raise jinja2.TemplateError(message)


def _now(format: str) -> str:
  return datetime.datetime.now().strftime(format)


if __name__ == "__main__":
  main()
