"""A process that trains, again and again, killed as it is told: for tests.

  python tests/survival.py FOLDER < jobs.jsonl

Each line of the input is a job: {"argv": [...], "kill": null | {"after":
seconds} | {"call": [name, nth, "before" | "after"]} | {"step": n, "signal":
number}}. It runs in a fork that was made after the imports, and its exit code
is answered on one line of JSON, with the seconds it took; what it said is in
FOLDER/JOB.out and FOLDER/JOB.err.

A call is one of the operating system's that name or remove files: killed
before or after its nth, a process leaves the disk as it was at that point of a
save, of the pruning after it, of a restore or of the run folder's first files.
"""

import json
import os
import pathlib
import runpy
import signal
import sys
import threading
import time
import traceback

import flax  # noqa: F401
import grain  # noqa: F401
import matplotlib  # noqa: F401
import ml_collections  # noqa: F401
import optax  # noqa: F401
import tensorboardX  # noqa: F401

from llama_jax import evals, experiment  # noqa: F401
from llama_jax.checkpoint import orbax, steps  # noqa: F401
from llama_jax.training import metrics, step  # noqa: F401

CALLS = ("rename", "replace", "unlink", "rmdir", "fsync")


def die():
  os.kill(os.getpid(), signal.SIGKILL)


def kill_at(name: str, nth: int, when: str) -> None:
  """Dies before or after the nth os.NAME of this process."""
  call, count, lock = getattr(os, name), [0], threading.Lock()

  def counted(*args, **others):
    with lock:
      count[0] += 1
      last = count[0] == nth
    if last and when == "before":
      die()
    result = call(*args, **others)
    if last:
      die()
    return result

  setattr(os, name, counted)


def signal_at(workdir: pathlib.Path, at: int, number: int) -> None:
  """Sends a signal once metrics.jsonl has the row of a step."""

  def watch():
    while True:
      rows = metrics.read(workdir / "metrics.jsonl")
      if rows and rows[-1]["step"] >= at:
        os.kill(os.getpid(), number)
        return
      time.sleep(0.005)

  threading.Thread(target=watch, daemon=True).start()


def child(job) -> int:
  sys.argv = job["argv"]
  kill = job["kill"] or {}
  if "call" in kill:
    kill_at(*kill["call"])
  if "after" in kill:
    # From the first step on: starting takes as long as twenty steps.
    began = pathlib.Path(job["workdir"]) / "metrics.jsonl"

    def watch():
      while not began.exists():
        time.sleep(0.005)
      time.sleep(kill["after"])
      die()

    threading.Thread(target=watch, daemon=True).start()
  if "step" in kill:
    signal_at(pathlib.Path(job["workdir"]), kill["step"], kill["signal"])
  if "cores" in job:
    os.sched_setaffinity(0, job["cores"])
  try:
    runpy.run_module("llama_jax.train", run_name="__main__", alter_sys=True)
  except SystemExit as error:
    return error.code or 0
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


def main(folder: pathlib.Path) -> None:
  for number, line in enumerate(sys.stdin):
    job = json.loads(line)
    began = time.monotonic()
    pid = os.fork()
    if not pid:
      os.environ.update(job.get("environment", {}))
      for kind, target in (("out", 1), ("err", 2)):
        file = os.open(f"{folder}/{number}.{kind}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, target)
      code = child(job)
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    answer = {"code": code, "seconds": time.monotonic() - began}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
