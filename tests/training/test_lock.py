"""Real processes: the second is refused by name, a dead holder's is free."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from llama_jax import errors
from llama_jax.training import lock

HOLD = """
import os, pathlib, sys, time
from llama_jax.training import lock
with lock.RunLock(pathlib.Path(sys.argv[1])):
  if "fork" in sys.argv and os.fork() == 0:
    time.sleep(60)
    os._exit(0)
  print("held", flush=True)
  if "wait" in sys.argv:
    sys.stdin.read()
print("released", flush=True)
"""


@pytest.fixture
def hold(tmp_path):
  """Starts a process that takes the lock and says so; all end with the test."""
  started = []

  def start(*words, wait_for="held"):
    process = subprocess.Popen(
      [sys.executable, "-c", HOLD, str(tmp_path), *words],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    started.append(process)
    if wait_for:
      assert process.stdout.readline().strip() == wait_for
    return process

  yield start
  for process in started:
    # The forked child too: it is in the session that this test made.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def take(folder):
  with lock.RunLock(folder):
    return lock.read(folder / "lock")


def test_the_second_is_refused_by_name(hold, tmp_path):
  holder = hold("wait")
  before = time.monotonic()
  with pytest.raises(errors.UserError) as refused:
    take(tmp_path)
  assert time.monotonic() - before < 5
  said = str(refused.value)
  assert f"process {holder.pid} on {os.uname().nodename}" in said
  assert str(tmp_path) in said and "wait" in said
  # It is still the first one's.
  assert lock.read(tmp_path / "lock")["pid"] == holder.pid
  holder.communicate("")
  assert holder.returncode == 0
  assert not (tmp_path / "lock").exists()
  assert take(tmp_path)["pid"] == os.getpid()


def test_a_killed_holders_folder_is_free_at_once(hold, tmp_path):
  holder = hold("wait")
  holder.kill()
  holder.wait()
  assert lock.read(tmp_path / "lock")["pid"] == holder.pid
  assert take(tmp_path)["pid"] == os.getpid()
  assert not list(tmp_path.iterdir())


def test_a_child_that_a_dead_holder_left_behind(hold, tmp_path):
  """A forked data worker inherits the flock and outlives the trainer."""
  holder = hold("wait", "fork")
  os.kill(holder.pid, signal.SIGKILL)
  holder.wait()
  assert take(tmp_path)["pid"] == os.getpid()


def test_of_many_at_once_one_gets_it(hold, tmp_path):
  """Six start over a dead holder's lock."""
  first = hold("wait")
  first.kill()
  first.wait()
  rivals = [hold("wait", wait_for=None) for _ in range(6)]
  deadline = time.monotonic() + 60
  while sum(one.poll() is None for one in rivals) > 1:
    assert time.monotonic() < deadline
    time.sleep(0.05)
  (winner,) = [one for one in rivals if one.poll() is None]
  assert winner.stdout.readline() == "held\n"
  assert lock.read(tmp_path / "lock")["pid"] == winner.pid
  for one in rivals:
    if one is not winner:
      out, err = one.communicate()
      assert not out and "UserError" in err


def test_twice_in_one_process(tmp_path):
  with lock.RunLock(tmp_path):
    with pytest.raises(errors.UserError, match=f"process {os.getpid()} "):
      take(tmp_path)
    assert lock.read(tmp_path / "lock")
  take(tmp_path)


def elsewhere(folder, **fields):
  """Leaves a lock as a process on another machine would."""
  holder = {**lock.myself(), "token": "1", "host": "node7", "kernel": "other"}
  (folder / "lock").write_text(json.dumps(holder | fields))


@pytest.mark.parametrize("flock", [True, False])
def test_another_machines_lock_is_judged_by_its_heartbeat(
  tmp_path, monkeypatch, flock
):
  monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)
  if not flock:
    monkeypatch.setattr(lock.fcntl, "flock", no_flock)
  elsewhere(tmp_path)
  with pytest.raises(errors.UserError, match="on node7"):
    take(tmp_path)
  assert lock.read(tmp_path / "lock")["host"] == "node7"
  old = time.time() - lock.STALE_SECONDS - 1
  os.utime(tmp_path / "lock", (old, old))
  assert take(tmp_path)["pid"] == os.getpid()


def test_the_heart_beats(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
  with lock.RunLock(tmp_path):
    os.utime(tmp_path / "lock", (1, 1))
    deadline = time.monotonic() + 5
    while (tmp_path / "lock").stat().st_mtime < 2:
      assert time.monotonic() < deadline
      time.sleep(0.01)


def test_one_that_was_taken_over_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
  with lock.RunLock(tmp_path) as mine:
    mine.check()
    elsewhere(tmp_path)
    deadline = time.monotonic() + 5
    with pytest.raises(errors.UserError, match=r"on node7.*this one stops"):
      while time.monotonic() < deadline:
        mine.check()
        time.sleep(0.01)
  # The other's lock is left to it.
  assert lock.read(tmp_path / "lock")["host"] == "node7"


def no_flock(file, flags):
  del file, flags
  raise OSError(errno.EOPNOTSUPP, "not supported")


def test_without_flock_processes_are_asked_for(hold, tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)
  monkeypatch.setattr(lock.fcntl, "flock", no_flock)
  holder = hold("wait")
  with pytest.raises(errors.UserError, match=f"process {holder.pid} "):
    take(tmp_path)
  holder.kill()
  # A zombie has ended too.
  os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
  assert take(tmp_path)["pid"] == os.getpid()
  # A later process with a dead holder's pid is not the holder.
  reused = {**lock.myself(), "pid": os.getppid(), "started": "1"}
  (tmp_path / "lock").write_text(json.dumps(reused))
  assert take(tmp_path)["pid"] == os.getpid()


def test_without_flock_the_last_of_two_at_once_has_it(tmp_path, monkeypatch):
  """Both saw a free folder; whoever wrote first finds the other's name."""
  monkeypatch.setattr(lock.fcntl, "flock", no_flock)
  monkeypatch.setattr(lock.time, "sleep", lambda _: elsewhere(tmp_path))
  with pytest.raises(errors.UserError, match=r"same moment by .* on node7"):
    take(tmp_path)


@pytest.mark.parametrize("left", ["", "{", "[1]", "\x00" * 40])
def test_a_torn_lock_file_names_nobody(tmp_path, left):
  (tmp_path / "lock").write_text(left)
  assert take(tmp_path)["pid"] == os.getpid()
