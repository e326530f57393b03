"""One trainer a run folder: who holds it, and whether they still live.

The holder keeps an flock on `lock` in the folder and its name inside. The
kernel lets go of an flock when its holder ends, however it ends, so a dead
holder's folder is free at once. What an flock cannot tell is judged by what
stands in the file:

- Some file systems keep an flock from this machine alone, or know none. A
  holder on another machine lives while its heartbeat, the file's own time, is
  fresh; without flock, one on this machine lives while its process does.
- What a dead holder forked keeps its flock: a holder on this machine whose
  process is gone is passed over all the same.
"""

import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from typing import Any

from llama_jax import errors

HEARTBEAT_SECONDS = 5.0
# Of a holder on another machine, whose process cannot be asked for.
STALE_SECONDS = 30.0
# Where flock does not decide: long enough for two that came at once to see it.
SETTLE_SECONDS = 1.0
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def hold(folder: pathlib.Path) -> "RunLock":
  """Holds a run's folder while its `with` lasts.

  Raises:
    errors.UserError: within three seconds, where another holds it; names it.
  """
  return RunLock(folder)


class RunLock:
  """Holds a run folder while its `with` lasts; raises UserError if it cannot.

  The refusal comes within three seconds and names the holder. Of several
  processes of one run only the first takes it.
  """

  def __init__(self, folder: pathlib.Path):
    self._path = folder / "lock"
    self._token = uuid.uuid4().hex
    self._file: int | None = None
    self._ended = threading.Event()
    self._lost = False

  def __enter__(self) -> "RunLock":
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._take()
    self._thread = threading.Thread(
      target=self._beat, name="lock heartbeat", daemon=True
    )
    self._thread.start()
    return self

  def __exit__(self, *error) -> None:
    self._ended.set()
    self._thread.join()
    if self._mine():
      self._path.unlink(missing_ok=True)
    os.close(self._file)

  def check(self) -> None:
    """Raises UserError where another trainer took the folder meanwhile.

    One on another machine does when this one showed no heartbeat for
    STALE_SECONDS: asleep, stopped, or cut off from the folder. As cheap as
    reading an attribute: for every step.
    """
    if self._lost:
      raise errors.UserError(
        f"{self._path.parent}: another trainer took this run over"
        f" ({_shown(read(self._path))}); this one stops."
      )

  def _take(self) -> None:
    decided = True
    while self._file is None:
      file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
      try:
        flocked = _flock(file)
        holder = read(self._path)
        if not _same(file, self._path):
          continue  # released or taken over between open and flock
        if flocked is False and _here(holder) and not _alive(holder):
          # Someone may have taken the flock and not yet written its name.
          time.sleep(SETTLE_SECONDS / 2)
          if read(self._path) != holder:
            continue
          # What it forked has the flock of this file; make another one.
          self._path.unlink(missing_ok=True)
          decided = False
          continue
        if flocked is False or _lives(holder, self._path, bool(flocked)):
          self._refuse("is in use by")
        self._write(file)
        if not _same(file, self._path):
          continue  # removed by one who saw the dead holder's name
        self._file = file
      finally:
        if self._file is None:
          os.close(file)
    if not (decided and flocked):
      time.sleep(SETTLE_SECONDS)
      if not self._mine():
        os.close(self._file)
        self._refuse("was taken at the same moment by")

  def _refuse(self, how: str) -> None:
    holder = read(self._path)
    if holder is None:  # between its flock and its name
      time.sleep(SETTLE_SECONDS)
      holder = read(self._path)
    raise errors.UserError(
      f"{self._path.parent} {how} {_shown(holder)}; wait for it, stop it, or"
      " give another folder."
    )

  def _write(self, file: int) -> None:
    """In place: a new file would not have the flock."""
    text = json.dumps({"token": self._token, **myself()}, indent=1) + "\n"
    os.ftruncate(file, 0)
    os.pwrite(file, text.encode(), 0)
    os.fsync(file)

  def _mine(self) -> bool:
    return (read(self._path) or {}).get("token") == self._token

  def _beat(self) -> None:
    while not self._ended.wait(HEARTBEAT_SECONDS):
      holder = read(self._path)
      if holder is not None and holder.get("token") != self._token:
        self._lost = True
        return
      try:
        os.utime(self._path)
      except OSError:
        # Cut off from the folder for now; whether it is still ours shows at
        # the next beat that gets through.
        continue


def read(path: pathlib.Path) -> dict[str, Any] | None:
  """Who a lock file names; None where there is none or it is not readable."""
  try:
    holder = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None
  return holder if isinstance(holder, dict) else None


def myself() -> dict[str, Any]:
  """This process as a lock file names it."""
  kernel, pids = _machine()
  return {
    "host": socket.gethostname(),
    "kernel": kernel,
    "pids": pids,
    "pid": os.getpid(),
    "started": _started(os.getpid()),
    "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    "command": " ".join(sys.argv),
  }


def _machine() -> tuple[str, str]:
  """The boot of this kernel, and the namespace that its pids are of.

  Containers often share a host name, and never a namespace.
  """
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot, os.readlink("/proc/self/ns/pid")
  except OSError:  # not Linux
    return socket.gethostname(), ""


def _started(pid: int) -> str | None:
  """When a process started, in ticks since boot; None where nobody says.

  Tells a process from a later one with the same pid.
  """
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return None
  # The name, in brackets, may hold anything; a zombie (Z) is dead.
  fields = stat.rpartition(")")[2].split()
  return None if fields[0] in "ZX" else fields[19]


def _lives(holder, path: pathlib.Path, flocked: bool) -> bool:
  """Whether whom the file names lives, where we hold its flock or none is."""
  if not holder:
    return False
  if flocked and holder.get("kernel") == _machine()[0]:
    return False  # this kernel would not have given it to two
  if _here(holder):
    return _alive(holder)
  return _age(path) < STALE_SECONDS


def _here(holder: dict[str, Any] | None) -> bool:
  """Whether the holder's pid means something to us."""
  return bool(holder) and (
    (holder.get("kernel"), holder.get("pids")) == _machine()
  )


def _alive(holder: dict[str, Any]) -> bool:
  """Whether a holder on this machine still runs."""
  pid = holder.get("pid")
  if not isinstance(pid, int) or pid < 1:
    return False
  if pathlib.Path("/proc/self/stat").exists():
    return _started(pid) == holder.get("started")
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass  # another user's
  return True


def _flock(file: int) -> bool | None:
  """True when taken, False when another has it, None without flock."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
      return False
    if error.errno in _NO_FLOCK:
      return None
    raise
  return True


def _same(file: int, path: pathlib.Path) -> bool:
  """Whether an open file is still the one at this path."""
  try:
    return os.path.samestat(os.fstat(file), os.stat(path))
  except FileNotFoundError:
    return False


def _age(path: pathlib.Path) -> float:
  """Seconds since the last heartbeat by the clock of the file system itself,
  which may stand on a third machine."""
  probe = path.with_name(f".lock.{uuid.uuid4().hex}")
  try:
    probe.touch()
    return probe.stat().st_mtime - path.stat().st_mtime
  except FileNotFoundError:
    return float("inf")
  finally:
    probe.unlink(missing_ok=True)


def _shown(holder: dict[str, Any] | None) -> str:
  if not holder:
    return "another process"
  return (
    f"process {holder.get('pid')} on {holder.get('host')} since"
    f" {holder.get('since')} ({holder.get('command')})"
  )
