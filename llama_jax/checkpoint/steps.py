"""A run's checkpoints: saved behind the run's back, verified before use.

  checkpoints/STEP/         params, training, meta.json, manifest.sha256
  checkpoints/STEP.damaged  one that did not match its manifest

A step is written as STEP.saving, every file of it hashed and put on the disk,
and then takes its name in one rename; a step that has to go gives up its name
(STEP.deleting) before anything of it does. So a number is a whole checkpoint,
whenever the process is killed; the other two are cleared at the next start.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import atomic, manifest, orbax

META = "meta.json"
_NONE = -1


class Restored(NamedTuple):
  """What a step held; params and rest are as they were given to save."""

  step: int
  params: Any
  rest: Any
  meta: dict[str, Any]


def list_steps(folder: pathlib.Path) -> list[int]:
  """The complete steps of a checkpoints folder, ascending."""
  return sorted(
    int(path.name)
    for path in folder.glob("*")
    if re.fullmatch("0|[1-9][0-9]*", path.name)
  )


class Checkpoints:
  """A run's steps; one save at a time is under way.

  Use as a context manager: leaving it waits for that save and raises if it
  failed. All processes of a run call the same methods in the same order.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    keep: int = 1,
    keep_every: int = 0,
    pinned: Collection[int] = (),
    *,
    reading: bool = False,
  ):
    """Clears what a killed process has left.

    Args:
      folder: the run's; nobody else trains in it, unless reading.
      keep: the newest steps that stay, 1 or more.
      keep_every: steps that are multiples of it stay too; 0 for none.
      pinned: steps that stay whatever else is said.
      reading: only restore, from a named step; nothing is cleared.
    """
    self._folder = pathlib.Path(folder).absolute() / "checkpoints"
    self._keep = keep
    self._keep_every = keep_every
    self._pinned = frozenset(pinned)
    self._saves = 0
    self._pending: concurrent.futures.Future[None] | None = None
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
    if _first() and not reading:
      self._folder.mkdir(parents=True, exist_ok=True)
      for pattern in ("*.saving*", "*.deleting"):
        for path in self._folder.glob(pattern):
          shutil.rmtree(path)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, *error) -> None:
    try:
      self.wait()
    except errors.UserError as failed:
      if kind is None:
        raise
      # What is being raised comes first; this must not go unsaid.
      print(f"warning: {failed}", file=sys.stderr)
    finally:
      self._thread.shutdown()

  def latest(self) -> int | None:
    """The newest complete step."""
    return max(list_steps(self._folder), default=None)

  def save(self, step: int, params, rest, meta: dict[str, Any]) -> None:
    """Starts to save; returns once the arrays may change.

    Waits for the save before; if that failed, raises, and this one is not
    begun.

    Args:
      step: its name.
      params: the model's.
      rest: whatever else training needs (optimizer state, counters).
      meta: JSON: what the arrays do not say (data position).
    """
    self.wait()
    if step in list_steps(self._folder):
      raise errors.UserError(f"{self._folder / str(step)} is there already.")
    shown = json.dumps(meta)
    self._clear(step)
    try:
      with orbax.context() as ocp, orbax.writable(self._folder):
        saving = ocp.save_checkpointables_async(
          self._part(step), {"params": params, "training": rest}
        )
    except errors.UserError:
      self._clear(step)
      raise
    self._saves += 1
    self._pending = self._thread.submit(
      self._finish, step, saving, shown, f"llama_jax save {self._saves}"
    )

  def check(self) -> None:
    """Raises if a save has failed since the last call; never waits."""
    if self._pending is not None and self._pending.done():
      self.wait()

  def wait(self) -> None:
    """Waits for the save under way; raises UserError if it failed."""
    if self._pending is None:
      return
    try:
      self._pending.result()
    finally:
      if self._pending.done():  # or else the wait was interrupted
        self._pending = None

  def restore(self, params, rest, step: int | None = None) -> Restored | None:
    """The newest step that matches its manifest, or a named one.

    Files are verified before any array is read. Newer steps that are damaged
    are moved aside, each with a warning, so that their numbers can be saved
    again.

    Args:
      params, rest: trees of jax.ShapeDtypeStruct with shardings.
      step: which; None for the newest.

    Returns:
      None where there is no step at all.

    Raises:
      BadFileError: the named step is missing, damaged or of another model; or
        there are steps and all are damaged (nothing is moved then).
    """
    problem: errors.BadFileError | None = None
    found = _NONE
    if _first():
      try:
        found = self._choose(step)
      except errors.BadFileError as error:
        problem = error
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      told = np.array([found, problem is not None], np.int64)
      found, failed = map(int, multihost_utils.broadcast_one_to_all(told))
      if failed and problem is None:
        problem = errors.BadFileError(
          f"{self._folder}: no sound checkpoint; process 0 says more."
        )
    if problem is not None:
      raise problem
    if found == _NONE:
      return None
    path = self._folder / str(found)
    target = {"params": params, "training": rest}
    with orbax.context() as ocp, orbax.readable(path):
      meta = json.loads((path / META).read_text())
      loaded = ocp.load_checkpointables(path, target)
    return Restored(found, loaded["params"], loaded["training"], meta)

  def _choose(self, step: int | None) -> int:
    """The step to restore, verified; moves damaged newer ones aside."""
    if step is not None:
      if step not in list_steps(self._folder):
        raise errors.BadFileError(
          f"{self._folder} has no step {step}; there are"
          f" {list_steps(self._folder) or 'none'}."
        )
      manifest.check(self._folder / str(step))
      return step
    damaged: dict[int, errors.BadFileError] = {}
    for found in reversed(list_steps(self._folder)):
      try:
        manifest.check(self._folder / str(found))
      except errors.BadFileError as error:
        damaged[found] = error
        continue
      for bad, why in damaged.items():
        aside = self._move_aside(bad)
        print(
          f"warning: {why} Going on from step {found} instead; step {bad} is"
          f" now {aside}.",
          file=sys.stderr,
        )
      return found
    if damaged:
      raise errors.BadFileError(
        f"{' '.join(map(str, damaged.values()))} No step of"
        f" {self._folder} is sound; restore one from a copy, or move the"
        " folder away to begin anew."
      )
    return _NONE

  def _move_aside(self, step: int) -> pathlib.Path:
    aside, number = self._folder / f"{step}.damaged", 1
    while aside.exists():
      number += 1
      aside = self._folder / f"{step}.damaged-{number}"
    os.rename(self._folder / str(step), aside)
    return aside

  def _part(self, step: int) -> pathlib.Path:
    return self._folder / f"{step}.saving"

  def _clear(self, step: int) -> None:
    """Removes what a save of this step has left; it holds space."""
    if _first():
      for path in self._folder.glob(f"{step}.saving*"):
        shutil.rmtree(path, ignore_errors=True)

  def _finish(self, step: int, saving, meta: str, barrier: str) -> None:
    """The part of a save that the run does not wait for."""
    final = self._folder / str(step)
    try:
      with orbax.writable(self._folder):
        saving.result()
        try:
          if _first():
            self._commit(step, meta)
        finally:
          orbax.barrier(barrier)
        if not final.exists():
          raise OSError("process 0 could not name it")
    except errors.UserError:
      self._clear(step)
      raise
    if _first():
      self._prune(step)

  def _commit(self, step: int, meta: str) -> None:
    part = self._part(step)
    atomic.write_text(part / META, meta)
    manifest.write(part)
    os.rename(part, self._folder / str(step))
    atomic.flush(self._folder)

  def _prune(self, newest: int) -> None:
    """Removes the steps that need not stay, now that `newest` is there."""
    steps = list_steps(self._folder)
    stay = {newest, *steps[-self._keep :], *self._pinned}
    if self._keep_every:
      stay |= {step for step in steps if step % self._keep_every == 0}
    for step in set(steps) - stay:
      gone = self._folder / f"{step}.deleting"
      try:
        os.rename(self._folder / str(step), gone)
        shutil.rmtree(gone)
      except OSError as error:
        # The run goes on; a disk that fills up will be told by a save.
        print(
          f"warning: {gone}: an old checkpoint could not be removed"
          f" ({error.strerror}).",
          file=sys.stderr,
        )


def _first() -> bool:
  """Whether this process is the one that renames and removes."""
  return jax.process_index() == 0
