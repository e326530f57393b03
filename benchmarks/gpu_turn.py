"""A turn of a GPU benchmark: a side's process while it is asked."""

import contextlib
import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent


class OutOfTime(Exception):
  """The command's minutes are used up; what is measured is written."""


class Failed(Exception):
  """A turn ended in an error; its text is the last line."""


class Turn:
  """A side's process while it is asked."""

  def __init__(self, process, said, deadline):
    self.began = time.time()
    self._process, self._said, self._deadline = process, said, deadline

  def end(self):
    """Gives back the card's memory at once."""
    self._process.kill()
    self._process.wait()

  def ask(self, call, **arguments):
    """An answer; raises Failed with what the worker said, or OutOfTime."""
    request = json.dumps({"call": call, **arguments}) + "\n"
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write(request.encode())
      self._process.stdin.flush()
    line = b""
    while not line.endswith(b"\n"):
      left = self._deadline - time.monotonic()
      if (
        left <= 0 or not select.select([self._process.stdout], [], [], left)[0]
      ):
        raise OutOfTime
      more = os.read(self._process.stdout.fileno(), 1 << 16)
      if not more:
        self._process.wait()
        self._said.seek(0)
        words = self._said.read().decode(errors="replace")
        print("\n".join(words.splitlines()[-20:]), file=sys.stderr)
        raise Failed(f"it ended with status {self._process.returncode}")
      line += more
    answer = json.loads(line)
    if "error" in answer:
      print(answer["error"], file=sys.stderr)
      raise Failed(answer["error"].strip().splitlines()[-1][:300])
    return answer


@contextlib.contextmanager
def start(worker, python, cache, flags, deadline):
  """A side's process, for as long as the context lasts.

  Args:
    worker: the name of its file, beside this one.
    python: its interpreter.
    cache: a folder for compiled programs.
    flags: XLA_FLAGS beside those of the environment.
    deadline: of time.monotonic(), after which no answer is waited for.
  """
  cache = pathlib.Path(cache).resolve()
  environment = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
  }
  # It would hide the modules beside the worker.
  environment.pop("PYTHONSAFEPATH", None)
  if python == sys.executable:
    paths = [str(HERE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
  with tempfile.TemporaryFile() as said:
    process = subprocess.Popen(
      [python, str(HERE / worker)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=said,
      env=environment,
    )
    turn = Turn(process, said, deadline)
    try:
      yield turn
    finally:
      turn.end()
      process.stdout.close()
      with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
