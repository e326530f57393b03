"""Killed at any moment, a run's checkpoints lose nothing (R1, R11)."""

import json
import random
import shutil
import subprocess
import sys

import pytest

from llama_jax.checkpoint import manifest, steps

LAST = 80
KEEP, KEEP_EVERY, PINNED = 2, 40, [10]
SETTINGS = json.dumps([LAST, KEEP, KEEP_EVERY, PINNED])

# A run of a few bytes, in processes forked after the imports. One that is given
# an event dies just before it: audit hooks see every file that Python opens,
# renames or removes. Steps are logged when their save has begun.
DRIVER = """
import json, os, pathlib, re, signal, sys, threading, time
import jax, numpy as np
from llama_jax.checkpoint import orbax, steps
with orbax.context():  # imports it
  pass
LAST, KEEP, KEEP_EVERY, PINNED = json.loads(sys.argv[1])

def run(folder, log):
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  leaf = jax.ShapeDtypeStruct((64, 64), np.float32, sharding=one)
  with steps.Checkpoints(
    folder, KEEP, KEEP_EVERY, PINNED
  ) as checkpoints:
    got = checkpoints.restore({"w": leaf}, {"m": leaf})
    start = got.step if got else 0
    w, m = (
      (np.asarray(got.params["w"]), np.asarray(got.rest["m"])) if got
      else (np.zeros((64, 64), "f4"), np.ones((64, 64), "f4"))
    )
    assert got is None or got.meta == {"step": start, "sum": float(w.sum())}
    log(f"from {start}")
    for step in range(start + 10, LAST + 1, 10):
      m = m * np.float32(1.25)
      w = w + m
      meta = {"step": step, "sum": float(w.sum())}
      checkpoints.save(step, {"w": w}, {"m": m}, meta)
      log(f"begun {step}")
      checkpoints.check()
  log("done")

def child(folder, event, number, delay):
  root = str(folder / "checkpoints")
  count = 0
  seen = []
  def hook(name, args):
    nonlocal count
    if name not in (
      "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir"
    ) or not args or isinstance(args[0], int):
      return
    path = os.fspath(args[0])
    # rmtree names what lies in a folder it has opened.
    inside = name in ("os.remove", "os.rmdir") and args[1] not in (None, -1)
    if not inside and not str(path).startswith(root):
      return
    if inside:
      path = f"{root}/in/{path}"
    said = f"{name} {str(path)[len(root):]}"
    if name == "os.rename":
      said += f" {str(args[1])[len(root):]}"
    if event and re.search(event, said):
      if count == number:
        os.kill(os.getpid(), signal.SIGKILL)
      count += 1
    elif event is None:
      seen.append(said)
  sys.addaudithook(hook)
  if delay is not None:
    threading.Timer(
      delay, lambda: os.kill(os.getpid(), signal.SIGKILL)
    ).start()
  with open(folder / "log", "a") as file:
    run(folder, lambda line: print(line, file=file, flush=True))
  return seen

for line in sys.stdin:
  folder, event, number, delay = json.loads(line)
  pid = os.fork()
  if not pid:
    os.dup2(os.open(f"{folder}/err", os.O_CREAT | os.O_WRONLY), 2)
    try:
      seen = child(pathlib.Path(folder), event, number, delay)
      pathlib.Path(folder, "seen").write_text("\\n".join(seen))
      code = 0
    except BaseException:
      import traceback
      traceback.print_exc()
      sys.stderr.flush()
      code = 1
    os._exit(code)
  print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def start():
  """(folder, event, number, delay) -> exit code of a process of the run."""
  driver = subprocess.Popen(
    [sys.executable, "-W", "ignore", "-c", DRIVER, SETTINGS],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )

  def run(folder, event=None, number=0, delay=None):
    folder.mkdir(exist_ok=True)
    print(
      json.dumps([str(folder), event, number, delay]),
      file=driver.stdin,
      flush=True,
    )
    code = int(driver.stdout.readline())
    assert code in (0, -9), (folder / "err").read_text()
    return code

  yield run
  driver.stdin.close()
  assert driver.wait() == 0


def must_stay(newest):
  every = range(10, newest + 1, 10)
  return {
    step
    for step in every
    if step > newest - 10 * KEEP or step % KEEP_EVERY == 0 or step in PINNED
  }


def log_of(folder):
  return (folder / "log").read_text().splitlines()


def check_after_a_kill(folder, before):
  """What is there is whole, and nothing that must stay is missing.

  Args:
    folder: the run's.
    before: steps that were complete when the killed process started.
  """
  found = steps.list_steps(folder / "checkpoints")
  for step in found:
    manifest.check(folder / "checkpoints" / str(step))
  newest = max(found, default=0)
  assert newest >= max(before, default=0)
  assert set(found) >= must_stay(newest)
  begun = [int(x.split()[1]) for x in log_of(folder) if x.startswith("begun")]
  # The save under way is lost at most.
  assert newest >= max(begun, default=0) - 10
  return found


def check_the_end(folder, whole):
  """As if it had never been killed."""
  assert log_of(folder)[-1] == "done"
  there = sorted(p.name for p in (folder / "checkpoints").iterdir())
  assert there == sorted(map(str, must_stay(LAST)))
  for step in must_stay(LAST):
    ours, theirs = (
      run / "checkpoints" / str(step) / "meta.json" for run in (folder, whole)
    )
    # A sum over arrays that have come back from every step before.
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole") / "run"
  assert start(folder) == 0
  check_the_end_of_itself = sorted(must_stay(LAST))
  assert check_the_end_of_itself == [10, 40, 70, 80]
  assert steps.list_steps(folder / "checkpoints") == check_the_end_of_itself
  return folder


# name -> what Python is about to do, the time it does so.
POINTS = {
  "orbax begins": (r"mkdir /30.saving.orbax", 0),
  "an item's metadata": (r"open /40.saving.orbax.*params/_METADATA", 0),
  "orbax ends": (r"rename /30.saving.orbax\S+ /30.saving$", 0),
  "data state": (r"open /50.saving/.meta.json.part", 0),
  "data state named": (r"rename /50.saving/.meta.json.part", 0),
  "hashing": (r"open /60.saving/(params|training)/", 3),
  "manifest": (r"open /60.saving/manifest", 0),
  "manifest written": (r"open /60.saving/manifest", 1),
  "naming the first": (r"rename /10.saving /10$", 0),
  "naming": (r"rename /70.saving /70$", 0),
  "named": (r"open $", 5),
  "a name given up": (r"rename /20 /20.deleting", 0),
  "pruning begins": (r"(remove|rmdir|open) /(in|20.deleting)", 0),
  "pruning goes on": (r"(remove|rmdir) /in/", 9),
  "pruning ends": (r"rmdir /30.deleting$", 0),
  "pruning the next": (r"rename /50 /50.deleting", 0),
}


@pytest.mark.parametrize("name", POINTS)
def test_killed_at_a_point_of_a_save(start, whole, tmp_path, name):
  folder = tmp_path / "run"
  assert start(folder, *POINTS[name]) == -9
  found = check_after_a_kill(folder, [])
  assert start(folder) == 0
  assert f"from {max(found, default=0)}" in log_of(folder)
  check_the_end(folder, whole)


# The same in a run that finds its newest step damaged, and leavings.
RESTORE_POINTS = {
  "clearing": (r"(remove|rmdir) /in/", 5),
  "verifying": (r"open /\d+/manifest", 0),
  "verifying the one before": (r"open /\d+/manifest", 1),
  "moving aside": (r"rename /80 /80.damaged", 0),
  "reading the data state": (r"open /70/meta.json", 1),
  "reading arrays": (r"open /70/params/_METADATA", 1),
}


@pytest.mark.parametrize("name", RESTORE_POINTS)
def test_killed_at_a_point_of_a_restore(start, whole, tmp_path, name):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  inside = folder / "checkpoints"
  shutil.copytree(inside / "70", inside / "90.saving")
  file = next((inside / "80" / "params").rglob("_METADATA"))
  file.write_bytes(file.read_bytes()[:-1])
  assert start(folder, *RESTORE_POINTS[name]) == -9
  for step in (10, 40, 70):
    manifest.check(inside / str(step))
  assert start(folder) == 0
  assert (inside / "80.damaged").is_dir() and not (
    inside / "90.saving"
  ).exists()
  shutil.rmtree(inside / "80.damaged")
  check_the_end(folder, whole)


def killed_at_random(start, whole, folder, kills, rng, capsys):
  """Kills at random times until there were so many; then the run ends."""
  killed = redone = 0
  while killed < kills:
    shutil.rmtree(folder, ignore_errors=True)
    found = []
    while killed < kills and start(folder, delay=rng.uniform(0.3, 1.2)):
      before, found = found, check_after_a_kill(folder, found)
      redone += before == found
      killed += 1
    if log_of(folder)[-1] != "done":
      assert start(folder) == 0
    check_the_end(folder, whole)
  with capsys.disabled():
    print(f"\nR1, R11: {killed} kills at random, {killed} clean restarts")


def test_killed_at_random(start, whole, tmp_path, capsys):
  killed_at_random(start, whole, tmp_path / "run", 5, random.Random(0), capsys)


@pytest.mark.slow
def test_killed_at_random_often(start, whole, tmp_path, capsys):
  killed_at_random(start, whole, tmp_path / "run", 40, random.Random(1), capsys)


@pytest.mark.slow
def test_killed_before_each_thing_it_does(start, whole, tmp_path, capsys):
  """Every file that Python opens, renames or removes from step 50 on."""
  events = (whole / "seen").read_text().splitlines()
  first = next(i for i, x in enumerate(events) if x.startswith("os.mkdir /50"))
  for number in range(first, len(events)):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    if start(folder, "", number) == -9:
      check_after_a_kill(folder, [])
      assert start(folder) == 0
    check_the_end(folder, whole)
  with capsys.disabled():
    print(f"\nR1, R11: killed before each of {len(events) - first} events")
