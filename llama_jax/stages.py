"""Commands one after another, each once: a tour that can be stopped anywhere.

What is done is written to WORKDIR/done.json; the same plan run again goes on
where it stopped. A stage whose command changed runs again, and so do those
after it.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from llama_jax import errors
from llama_jax.checkpoint import atomic


@dataclasses.dataclass(frozen=True)
class Stage:
  """One of several.

  Attributes:
    name: key in done.json.
    title: what it does, for the reader.
    outputs: what must exist for it to count as done.
    command: arguments of `python`, or None for a stage of this process.
    function: called instead of a command; returns nothing.
    capture: file that takes the command's standard output.
    resumes: whether the command goes on from a part of its outputs, also when
      its command line changed; else these are removed before it runs.
    always: whether it runs each time, being quick where nothing is to do.
    once: whether outputs that exist are good, however they were made.
    fixed: whether another command than the one recorded is refused.
    space: bytes that must be free before it runs.
  """

  name: str
  title: str
  outputs: tuple[pathlib.Path, ...]
  command: tuple[str, ...] | None = None
  function: Callable[[], None] | None = None
  capture: pathlib.Path | None = None
  resumes: bool = False
  always: bool = False
  once: bool = False
  fixed: bool = False
  space: float = 0

  @property
  def key(self) -> str:
    """What makes a record of it out of date when it changes."""
    return shlex.join(self.command) if self.command else self.name


def run(plan: Sequence[Stage], workdir: pathlib.Path) -> int:
  """Runs what is not done of `plan`, in order; the first status that is not 0.

  workdir: where done.json lies.
  """
  record_path = workdir / "done.json"
  done = _read_record(record_path)
  for stage in plan:
    if stage.fixed and done.get(stage.name, stage.key) != stage.key:
      raise errors.UserError(
        f"{workdir} was begun with another command ({done[stage.name]}); give"
        " another --workdir, or delete that folder"
      )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
      f"--workdir={workdir} cannot be made: {error.strerror}"
    ) from None
  for number, stage in enumerate(plan, 1):
    say(f"\n[{number}/{len(plan)}] {stage.title}")
    if _is_done(stage, done):
      say("done before: " + ", ".join(str(path) for path in stage.outputs))
      continue
    if stage.space:
      atomic.check_free(
        workdir, stage.space, "give a --workdir on another disk"
      )
    if not stage.always:
      # Those after it may build on it.
      for later in plan[number - 1 :]:
        done.pop(later.name, None)
      _write_record(record_path, done)
    try:
      status = _run_stage(stage)
    except KeyboardInterrupt:
      status = 130
    if status in (130, 143, -signal.SIGINT, -signal.SIGTERM):
      say("\ninterrupted; type the same command again to go on")
      return 130 if status in (130, -signal.SIGINT) else 143
    if status:
      say(f"\nstopped: `{stage.title}` failed with status {status}")
      return status if status > 0 else 128 - status
    done[stage.name] = stage.key
    _write_record(record_path, done)
  return 0


def _is_done(stage: Stage, done: dict[str, str]) -> bool:
  if stage.always or not all(path.exists() for path in stage.outputs):
    return False
  return stage.once or done.get(stage.name) == stage.key


def _run_stage(stage: Stage) -> int:
  if stage.function:
    stage.function()
    return 0
  if not stage.resumes:
    for path in stage.outputs:  # left by a run that was cut off
      if path.is_dir():
        shutil.rmtree(path)
      else:
        path.unlink(missing_ok=True)
  say("$ " + _typed(stage.command))
  return run_command(stage)


def run_command(stage: Stage) -> int:
  """Runs a stage's command as a child; returns its status.

  Ctrl-C reaches the child as well, as part of the same terminal job: it is
  left to finish in its own way. SIGTERM is passed on.
  """
  kept = None
  if stage.capture:
    kept = stage.capture.with_name(stage.capture.name + ".tmp")
  stdout = open(kept, "wb") if kept else None  # noqa: SIM115
  interrupted = terminated = False
  child = subprocess.Popen([sys.executable, *stage.command], stdout=stdout)

  def pass_on(number, frame):
    nonlocal terminated
    terminated = True
    child.send_signal(number)

  former = signal.signal(signal.SIGTERM, pass_on)
  try:
    while True:
      try:
        status = child.wait()
        break
      except KeyboardInterrupt:
        interrupted = True
  finally:
    signal.signal(signal.SIGTERM, former)
    if stdout:
      stdout.close()
  if interrupted or terminated:
    status = 130 if interrupted else 143
  if kept and status:
    kept.unlink(missing_ok=True)
  elif kept:
    os.replace(kept, stage.capture)
    say(stage.capture)
  return status


def _read_record(path: pathlib.Path) -> dict[str, str]:
  try:
    record = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}  # nothing done yet
  return record if isinstance(record, dict) else {}


def _write_record(path: pathlib.Path, done: dict[str, str]):
  atomic.write_text(path, json.dumps(done, indent=2) + "\n")


def say(text: object):
  """Prints a text before a child writes to the same terminal."""
  print(text, flush=True)


def _typed(command: Sequence[str]) -> str:
  """A command line to read and to copy; line breaks as bash's $'...'."""
  words = []
  for word in ("python", *command):
    if "\n" in word:
      name, _, value = word.partition("=")
      value = value.replace("\\", "\\\\").replace("'", "\\'")
      words.append(f"{name}=$'" + value.replace("\n", "\\n") + "'")
    else:
      words.append(shlex.quote(word))
  return " ".join(words)
