"""What a run tells: metrics.jsonl, TensorBoard, the bar, the curves."""

import json
import os
import pathlib
import time
from typing import Any

import jax

from llama_jax import errors


class Metrics:
  """Writes one row a step to every place, one step late.

  Late, because reading a step's loss waits for the step: by then the next one
  is already on its way to the device.
  """

  def __init__(self, folder: pathlib.Path, first_step: int, steps: int):
    """Opens the writers; rows of steps after first_step are dropped.

    Args:
      folder: the run's.
      first_step: updates made so far; the run goes on from there.
      steps: updates in all.
    """
    import tensorboardX
    import tqdm

    self._file = folder / "metrics.jsonl"
    kept = [r for r in read(self._file) if r["step"] <= first_step]
    part = folder / ".metrics.jsonl.part"
    part.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(part, self._file)
    self._rows = self._file.open("a", encoding="utf-8")
    self._board = tensorboardX.SummaryWriter(
      str(folder / "tensorboard"), purge_step=first_step + 1
    )
    self._bar = tqdm.tqdm(
      total=steps,
      initial=first_step,
      desc="train",
      unit="step",
      dynamic_ncols=True,
      smoothing=0.1,
    )
    self._pending: tuple[int, Any] | None = None
    self._since = time.monotonic()

  def add(self, step: int, values: dict[str, jax.Array]) -> None:
    """Takes the metrics of update number `step` (the first is 1)."""
    self.flush()
    self._pending = (step, values)

  def flush(self) -> None:
    """Waits for the pending step and writes its row."""
    if self._pending is None:
      return
    (step, values), self._pending = self._pending, None
    row = {name: value.item() for name, value in values.items()}
    now = time.monotonic()
    row = {
      "step": step,
      **row,
      "tokens_per_second": row["tokens"] / (now - self._since),
      "seconds": now - self._since,
    }
    self._since = now
    self._rows.write(json.dumps(row) + "\n")
    self._rows.flush()
    for name, value in row.items():
      if name != "step":
        self._board.add_scalar(name, value, step)
    self._bar.set_postfix_str(
      f"loss {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s",
      refresh=False,
    )
    self._bar.update(1)

  def close(self) -> None:
    self.flush()
    self._bar.close()
    self._board.close()
    self._rows.close()


def read(file: pathlib.Path) -> list[dict[str, Any]]:
  """Rows of a metrics.jsonl; a last line that a kill cut short is left out."""
  if not file.is_file():
    return []
  lines = file.read_text(encoding="utf-8").split("\n")
  rows = []
  for number, line in enumerate(lines, start=1):
    if not line:
      continue
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError as error:
      if number < len(lines):
        raise errors.BadFileError(
          f"{file}, line {number}: not a JSON row; move the file away."
        ) from error
  return rows


def draw(folder: pathlib.Path) -> pathlib.Path | None:
  """Draws metrics.jsonl as curves.png; returns its path, None without rows."""
  rows = read(folder / "metrics.jsonl")
  if not rows:
    return None
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  steps = [row["step"] for row in rows]
  figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(8, 6), height_ratios=(3, 1), sharex=True, dpi=120
  )
  losses = [row["loss"] for row in rows]
  top.plot(steps, losses, color="#9db8d9", linewidth=1, label="each step")
  # A trailing mean over a tenth of the run shows the trend in the noise.
  width = max(2, len(losses) // 10)
  smooth = [
    sum(losses[max(0, i - width + 1) : i + 1])
    / len(losses[max(0, i - width + 1) : i + 1])
    for i in range(len(losses))
  ]
  top.plot(
    steps, smooth, color="#1f4e8c", linewidth=2, label=f"mean of {width} steps"
  )
  top.set_ylabel("loss (nats per token)")
  top.set_title(f"{folder.resolve().name}: training loss")
  top.legend(frameon=False)
  bottom.plot(
    steps,
    [row["learning_rate"] for row in rows],
    color="#c0504d",
    linewidth=1.5,
  )
  bottom.set_ylabel("learning rate")
  bottom.set_xlabel("step")
  bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
  for axes in (top, bottom):
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  figure.tight_layout()
  part = folder / ".curves.part.png"
  figure.savefig(part)
  plt.close(figure)
  os.replace(part, folder / "curves.png")
  return folder / "curves.png"
