"""Commands in processes that are forked after the imports: for tests.

  python tests/forked.py < jobs.jsonl

Importing JAX and all of the package takes seconds, a fork no time. Each line
of the input is a job:

  argv         a module and its flags, run as python -m runs them
  cwd          where
  out, err     files that take what it says
  given        a file that it reads as its standard input
  environment  what is added to the environment; of JAX's settings only
               JAX_COMPILATION_CACHE_DIR is heeded so late
  cores        numbers of the cores that it may use
  kill         null, or when it is to die, for a job with a --workdir:
               {"after": seconds after the first step}, {"step": n, "signal":
               number} or {"call": [name, nth, "before" | "after"]}

The answer is its exit code, on a line of its own.

A call is one of the operating system's that name or remove files: killed
before or after its nth, a process leaves the disk as it was at that point of a
save, of the pruning after it, of a restore or of the run folder's first files.
"""

import importlib
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 900  # seconds of a job
# What the verbs import, also those that import it late.
IMPORTS = (
  "flax",
  "grain",
  "matplotlib",
  "ml_collections",
  "optax",
  "tensorboardX",
  "llama_jax.batch",
  "llama_jax.experiment",
  "llama_jax.llama",
  "llama_jax.shell",
  "llama_jax.checkpoint.gguf",
  "llama_jax.checkpoint.hugging_face",
  "llama_jax.checkpoint.orbax",
  "llama_jax.checkpoint.steps",
  "llama_jax.checkpoint.store",
  "llama_jax.evals",
  "llama_jax.text",
  "llama_jax.training.curves",
  "llama_jax.training.metrics",
  "llama_jax.training.step",
)


class Forks:
  """This file as a process, spoken to."""

  def __init__(self, folder: pathlib.Path, **settings):
    """
    Args:
      folder: where the jobs' output goes.
      settings: keys of every job, such as environment.
    """
    self._folder, self._settings = folder, settings
    self._started, self._finished = 0, 0
    self._process = subprocess.Popen(
      [sys.executable, "-W", "ignore", __file__],
      cwd=ROOT,
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def start(self, argv, cwd=ROOT, given="", **settings) -> None:
    """Jobs wait for the one before."""
    names = {
      kind: f"{self._folder}/{self._started}.{kind}"
      for kind in ("out", "err", "given")
    }
    pathlib.Path(names["given"]).write_text(given)
    job = {"argv": [str(word) for word in argv], "cwd": str(cwd), "kill": None}
    job |= names | self._settings | settings
    self._started += 1
    print(json.dumps(job), file=self._process.stdin, flush=True)

  def finish(self) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the first job not yet asked for."""
    answer = self._process.stdout.readline()
    assert answer, f"the forking process died: {self._process.wait()}"
    code = int(answer)
    said = [
      pathlib.Path(f"{self._folder}/{self._finished}.{kind}").read_text()
      for kind in ("out", "err")
    ]
    self._finished += 1
    return code, *said

  def run(self, argv, *args, **settings) -> tuple[int, str, str]:
    self.start(argv, *args, **settings)
    return self.finish()

  def close(self) -> None:
    self._process.stdin.close()
    self._process.stdout.close()
    self._process.wait(timeout=60)


def die() -> None:
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


def kill_after(workdir: pathlib.Path, seconds: float) -> None:
  """From the first step on: starting takes as long as twenty steps."""

  def watch():
    while not (workdir / "metrics.jsonl").exists():
      time.sleep(0.005)
    time.sleep(seconds)
    die()

  threading.Thread(target=watch, daemon=True).start()


def signal_at(workdir: pathlib.Path, at: int, number: int) -> None:
  """Sends a signal once metrics.jsonl has the row of a step."""
  from llama_jax.training import metrics

  def watch():
    while True:
      rows = metrics.read(workdir / "metrics.jsonl")
      if rows and rows[-1]["step"] >= at:
        os.kill(os.getpid(), number)
        return
      time.sleep(0.005)

  threading.Thread(target=watch, daemon=True).start()


def expect(kill, argv) -> None:
  """Arranges for the death of this process."""
  workdir = pathlib.Path(
    next(w.partition("=")[2] for w in argv if w.startswith("--workdir="))
  )
  if "call" in kill:
    kill_at(*kill["call"])
  elif "after" in kill:
    kill_after(workdir, kill["after"])
  else:
    signal_at(workdir, kill["step"], kill["signal"])


def child(job) -> int:
  """Exit code of a job's command, in the process that is to run it."""
  for number, kind in enumerate(("given", "out", "err")):
    file = os.open(job[kind], os.O_RDWR | os.O_CREAT, 0o600)
    os.dup2(file, number)
    os.close(file)
  # What the parent has read ahead is not ours.
  sys.stdin = open(0, closefd=False)  # noqa: SIM115
  signal.alarm(LIMIT)
  os.chdir(job["cwd"])
  sys.path[0] = job["cwd"]
  environment = job.get("environment", {})
  os.environ.update(environment)
  if cache := environment.get("JAX_COMPILATION_CACHE_DIR"):
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
  if "cores" in job:
    os.sched_setaffinity(0, job["cores"])
  if job["kill"]:
    expect(job["kill"], job["argv"])
  sys.argv = job["argv"]
  try:
    runpy.run_module(job["argv"][0], run_name="__main__", alter_sys=True)
  except SystemExit as error:
    return error.code or 0
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


def main() -> None:
  # The tests' own; a verb is to set what it needs.
  os.environ.pop("NPROC", None)
  for name in IMPORTS:
    importlib.import_module(name)
  for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
      code = child(job)
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(code, flush=True)


if __name__ == "__main__":
  main()
