"""The places that a run's rows go to, and the pictures drawn of them."""

import json
import pathlib
import subprocess
import sys
import time
from typing import Any


class Writers:
  """metrics.jsonl, TensorBoard, W&B and the bar."""

  def __init__(
    self,
    folder: pathlib.Path,
    first_step: int,
    steps: int,
    project: str,
    identity: str,
  ):
    """Opens them.

    Args:
      folder: the run's; its metrics.jsonl ends where the next row begins.
      first_step: of the rows that are there already.
      steps: of the whole run.
      project: of W&B, or "" for none.
      identity: of the run's page there.
    """
    import tensorboardX
    import tqdm
    from tensorboardX.proto import event_pb2

    # First of all, as it may fail.
    self._wandb = _open_wandb(project, folder, identity) if project else None
    self._rows = (folder / "metrics.jsonl").open("a", encoding="utf-8")
    # Not its SummaryWriter: that has one event, and one lock, for each number.
    self._board = tensorboardX.FileWriter(str(folder / "tensorboard"))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    for event in (
      event_pb2.Event(file_version="brain.Event:2"),
      # TensorBoard drops what earlier files say of this step and later ones.
      event_pb2.Event(session_log=start),
    ):
      self._board.add_event(event, step=first_step + 1)
    self._bar = tqdm.tqdm(
      total=steps,
      initial=first_step,
      desc="train",
      unit="step",
      dynamic_ncols=True,
      smoothing=0.1,
      # A log file keeps every one of them.
      mininterval=0.1 if sys.stderr.isatty() else 10,
    )

  def write(self, row: dict[str, Any]) -> None:
    from tensorboardX.proto import summary_pb2

    self._rows.write(json.dumps(row, allow_nan=False) + "\n")
    self._rows.flush()
    step = row["step"]
    numbers = {
      name: value
      for name, value in row.items()
      if isinstance(value, (int, float)) and name not in ("step", "time")
    }
    summary = summary_pb2.Summary(
      value=[
        summary_pb2.Summary.Value(tag=name, simple_value=value)
        for name, value in numbers.items()
      ]
    )
    self._board.add_summary(summary, step)
    if self._wandb is not None:
      self._wandb.log(numbers, step=step)
    loss = row.get("loss")
    shown = "not finite" if loss is None else f"{loss:.4f}"
    shown = f"loss {shown}, {row['tokens_per_second']:,.0f} tokens/s"
    if row["mfu"] is not None:
      shown += f", {row['mfu']:.1%} MFU"
    self._bar.set_postfix_str(shown, refresh=False)
    self._bar.update(1)

  def close(self) -> None:
    self._bar.close()
    self._board.close()
    self._rows.close()
    if self._wandb is not None:
      self._wandb.finish()


def _open_wandb(project: str, folder: pathlib.Path, identity: str):
  """The run's page, the same one after a restart.

  W&B keeps the first that it is told of a step; a resume that does steps again
  tells the same numbers.
  """
  import wandb

  return wandb.init(
    project=project,
    name=folder.resolve().name,
    id=identity,
    dir=str(folder),
    resume="allow",
  )


class Drawing:
  """Draws curves.png now and then in a process that takes no time from us."""

  _CODE = (
    "import os, pathlib, sys; os.nice(19);"
    " from llama_jax.training import curves;"
    " curves.draw(pathlib.Path(sys.argv[1]))"
  )

  def __init__(self, folder: pathlib.Path, every: float):
    self._folder, self._every = folder, every
    self._last = time.monotonic()
    self._child: subprocess.Popen | None = None

  def go(self) -> None:
    """Starts a drawing where one is due and none is under way."""
    if self._child is not None and self._child.poll() is not None:
      self._reap()
    due = self._every and time.monotonic() - self._last >= self._every
    if due and self._child is None:
      self._last = time.monotonic()
      self._child = subprocess.Popen(
        [sys.executable, "-c", self._CODE, str(self._folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the run
      )

  def _reap(self) -> None:
    _, said = self._child.communicate()
    if self._child.returncode:
      last = said.strip().splitlines()[-1:]
      print(f"curves.png was not drawn: {' '.join(last)}", file=sys.stderr)
    self._child = None

  def close(self) -> None:
    if self._child is None:
      return
    try:
      self._child.wait(10)
    except subprocess.TimeoutExpired:
      self._child.kill()
      self._child.communicate()
      return
    self._reap()
