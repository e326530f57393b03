"""A side's process, as the drivers of the CPU benchmarks hold it."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, TextIO

from llama_jax import errors, huge_pages

HERE = pathlib.Path(__file__).resolve().parent


class Worker:
  """A side's process, asked over its pipes (cpu_worker.py)."""

  def __init__(self, name: str, process: subprocess.Popen, said: TextIO):
    self.name = name
    self.began = time.time()
    self._process, self._said = process, said

  def ask(self, call: str, **arguments) -> dict[str, Any]:
    """One request; raises UserError with what the worker said if it fails."""
    try:
      self._process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
      self._process.stdin.flush()
      line = self._process.stdout.readline()
    except BrokenPipeError:
      line = ""
    answer = json.loads(line) if line else {"error": self._last_words()}
    if "error" in answer:
      # One line: the last of a traceback says what it was.
      print(answer["error"], file=sys.stderr)
      last = answer["error"].strip().splitlines()[-1]
      raise errors.UserError(f"{self.name} failed in {call}: {last}")
    return answer

  def cpu_seconds(self) -> float:
    """What all its threads have used so far; 0 where the system hides it."""
    stat = pathlib.Path(f"/proc/{self._process.pid}/stat")
    if not stat.exists():
      return 0.0
    # Behind the name, which may hold spaces: user and system are 12th and 13th.
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

  def _last_words(self) -> str:
    status = self._process.wait()
    self._said.seek(0)
    lines = self._said.read().strip().splitlines()[-20:]
    return "\n".join([*lines, f"it ended with status {status}"])


@contextlib.contextmanager
def start_worker(python: str, script: pathlib.Path) -> Iterator[Worker]:
  """A worker's process, for as long as the context lasts."""
  environment = {
    name: value
    for name, value in os.environ.items()
    # The first would warm what is to be cold, the second hide cpu_worker.py.
    if name not in ("JAX_COMPILATION_CACHE_DIR", "PYTHONSAFEPATH")
  }
  environment |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
  }
  # As our verbs start themselves; the other libraries are given them too.
  environment |= huge_pages.environment()
  if python == sys.executable:
    paths = [str(HERE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
  else:
    # What is on our path is not made for another interpreter.
    environment.pop("PYTHONPATH", None)
  with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
    try:
      process = subprocess.Popen(
        [python, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
        env=environment,
      )
    except OSError as error:
      raise errors.UserError(
        f"{python} does not run: {error.strerror}; --peer_python and"
        " --llama_cpp_python name Pythons of environments that"
        " benchmarks/README.md says how to make."
      ) from None
    worker = Worker(script.stem, process, said)
    try:
      yield worker
    finally:
      process.kill()
      process.wait()
      process.stdout.close()
      # A request that was never read cannot be flushed any more.
      with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
