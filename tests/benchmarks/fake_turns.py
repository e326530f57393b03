"""Turns of a GPU benchmark without processes: a rule or an object answers."""

import contextlib
import json
import types


class Turns:
  """In the place of gpu_run.Run.turn; `calls` are (side, call, arguments).

  Attributes:
    flags: XLA_FLAGS of each turn, beside its side.
  """

  def __init__(self, rule):
    """rule: (side, call, arguments) -> an answer, or what is raised."""
    self.rule, self.calls, self.flags = rule, [], []

  @contextlib.contextmanager
  def turn(self, side, flags="", seconds=0):
    self.flags.append((side, flags))

    def ask(call, **arguments):
      self.calls.append((side, call, arguments))
      answer = self.rule(side, call, arguments)
      if isinstance(answer, Exception):
        raise answer
      return answer

    yield types.SimpleNamespace(ask=ask, began=0.0, end=lambda: None)


def here(worker):
  """A rule by which a worker's methods answer, in this process."""

  def rule(side, call, arguments):
    assert side == "ours"
    given = json.loads(json.dumps(arguments))
    return json.loads(json.dumps(getattr(worker, call)(**given)))

  return rule
