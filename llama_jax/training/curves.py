"""metrics.jsonl as a picture: losses, what an objective tells beside them,
learning rate, gradient norm."""

import array
import functools
import math
import os
import pathlib

import numpy as np

from llama_jax.training import metrics

# More points on a line than a picture has pixels show nothing more.
MOST_POINTS = 1500
# Sources beyond this many would not be told apart.
MOST_SOURCES = 10
# Of the data's own words. A distilled student's held-out loss is this, not what
# it minimises.
_NLL = "nll"
_PLAIN = (
  "loss",
  "learning_rate",
  "grad_norm",
  "skipped",
  "batch_size",
  "sequence_length",
)
# What an objective tells, held out too; drawn where it does.
_TOLD = ("accuracy", "margin", "kl", _NLL)
# What was held out was measured before the first step too, told with it.
_BEFORE = "before/"
_NONE = np.empty(0)
_FAINT, _STRONG, _RED, _GRAY = "#9db8d9", "#1f4e8c", "#c0504d", "#8a8a8a"


def draw(folder: pathlib.Path) -> pathlib.Path | None:
  """Draws metrics.jsonl as curves.png; returns its path, None without rows."""
  columns = _columns(folder / "metrics.jsonl")
  if not len(columns["step"]):
    return None
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  from matplotlib import ticker

  # One source's loss is the loss.
  several = len(_named(columns)) > 1
  distilled = "kl" in columns
  told = [n for n in _TOLD if n in columns and (n != _NLL or distilled)]
  heights = {
    _loss: 3.2,
    **({_by_name: 3.2} if several else {}),
    **{functools.partial(_told, name): 1.6 for name in told},
    _rate: 1.1,
    _norm: 1.5,
  }
  panels, tall = list(heights), list(heights.values())
  figure, places = plt.subplots(
    len(panels),
    1,
    figsize=(9, 0.6 + sum(tall)),
    height_ratios=tall,
    sharex=True,
    dpi=120,
    layout="constrained",
  )
  for panel, axes in zip(panels, places, strict=True):
    panel(axes, columns)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  _mark_stages(places, columns)
  places[0].set_title(f"{folder.resolve().name}: training", loc="left")
  places[-1].set_xlabel("step")
  places[-1].xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
  places[-1].xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
  part = folder / f".curves.{os.getpid()}.part.png"
  try:
    figure.savefig(part)
    os.replace(part, folder / "curves.png")
  finally:
    plt.close(figure)
    part.unlink(missing_ok=True)
  return folder / "curves.png"


def _is_drawn(name: str) -> bool:
  name = name.removeprefix(_BEFORE)
  if name.removeprefix("heldout/") in _TOLD:
    return True
  return name in _PLAIN or name.startswith(("loss/", "heldout_loss"))


def _columns(file: pathlib.Path) -> dict[str, np.ndarray]:
  """What is drawn, float64; NaN where a row lacks it or is null."""
  found = {name: array.array("d") for name in ("step", *_PLAIN)}
  for count, (_, row) in enumerate(metrics.scan(file), start=1):
    for name, value in row.items():
      if name not in found:
        if not _is_drawn(name):
          continue
        found[name] = array.array("d", [math.nan] * (count - 1))
      found[name].append(math.nan if value is None else value)
    for values in found.values():
      if len(values) < count:
        values.append(math.nan)
  return {name: np.frombuffer(a, np.float64) for name, a in found.items()}


def _left_out(columns) -> np.ndarray:
  """Which steps were skipped, bool."""
  return np.diff(np.nan_to_num(columns["skipped"]), prepend=0) > 0


def _made(columns, name: str) -> np.ndarray:
  """A column where the step was made, NaN where it was skipped."""
  return np.where(_left_out(columns), np.nan, columns[name])


def _named(columns) -> list[str]:
  """Sources and held-out domains, most important first: as they came."""
  names = [
    name.split("/", 1)[1]
    for name in columns
    if name.startswith(("loss/", "heldout_loss/"))
  ]
  return list(dict.fromkeys(names))[:MOST_SOURCES]


def _mean(values: np.ndarray, width: int) -> np.ndarray:
  """Trailing mean over `width` values, those that are NaN left out."""
  known = np.isfinite(values)
  sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
  counts = np.concatenate([[0], np.cumsum(known)])
  ends = np.arange(1, len(values) + 1)
  starts = np.maximum(ends - width, 0)
  seen = counts[ends] - counts[starts]
  total = sums[ends] - sums[starts]
  return np.where(seen > 0, total / np.maximum(seen, 1), np.nan)


def _thin(*lines: np.ndarray) -> list[np.ndarray]:
  """Every k-th value and the last."""
  size = len(lines[0])
  kept = np.unique(np.linspace(0, size - 1, MOST_POINTS).astype(int))
  return [line[kept] for line in lines] if size > MOST_POINTS else list(lines)


def _width(steps: np.ndarray) -> int:
  """Steps of the trailing mean: a fiftieth of the run."""
  return max(2, len(steps) // 50)


def _each_step(axes, steps, values, color, label) -> None:
  """A line through every value, or where there are too many their range."""
  size = -(-len(steps) // MOST_POINTS)
  if size == 1:
    few = dict(marker="o", markersize=3) if len(steps) < 30 else {}
    axes.plot(steps, values, color=color, linewidth=0.9, label=label, **few)
    return
  starts = np.arange(0, len(steps), size)
  low = np.fmin.reduceat(values, starts)
  high = np.fmax.reduceat(values, starts)
  axes.fill_between(
    steps[starts], low, high, color=color, linewidth=0.5, label=label
  )


def _dots(axes, columns, name, color, label) -> None:
  """Held-out values: few, so each is a dot."""
  steps, values = columns["step"], columns[name]
  if (before := columns.get(_BEFORE + name)) is not None:
    steps, values = np.append(0, steps), np.append(before[0], values)
  there = np.isfinite(values)
  axes.plot(
    *_thin(steps[there], values[there]),
    color=color,
    linewidth=1.2,
    linestyle="--",
    marker="o",
    markersize=4.5 if there.sum() < 60 else 2,
    markeredgecolor="white",
    markeredgewidth=0.5,
    label=label,
  )


def _zoom(axes, values: np.ndarray, kept: np.ndarray = _NONE) -> None:
  """Leaves spikes, and the first steps of a long run, above the picture.

  kept: what is shown whatever it is.
  """
  values = values[np.isfinite(values)]
  if len(values) < 50:
    return
  low, high = np.percentile(values, (0, 98.5))
  kept = [low, high, *kept[np.isfinite(kept)]]
  low, high = min(kept), max(kept)
  room = 0.06 * max(high - low, 1e-6)
  axes.set_ylim(low - room, high + 2 * room)


def _loss(axes, columns) -> None:
  steps, values = columns["step"], _made(columns, "loss")
  width = _width(steps)
  _each_step(axes, steps, values, _FAINT, "each step")
  smooth = _mean(values, width)
  axes.plot(
    *_thin(steps, smooth),
    color=_STRONG,
    linewidth=1.8,
    label=f"mean of {width} steps",
  )
  heldout = columns.get("heldout_loss", _NONE)
  if len(heldout) and "kl" not in columns:
    _dots(axes, columns, "heldout_loss", _RED, "held out")
    _zoom(axes, values, heldout)
  else:
    _zoom(axes, values)
  unit = "pair" if "accuracy" in columns else "token"
  axes.set_ylabel(f"loss (nats per {unit})")
  axes.legend(frameon=False, loc="upper right")


def _by_name(axes, columns) -> None:
  import matplotlib

  colors = matplotlib.colormaps["tab10"].colors
  steps = columns["step"]
  # A source may have no token in most steps.
  width = max(min(10, len(steps) // 10), _width(steps))
  shown = []
  for name, color in zip(_named(columns), colors, strict=False):
    label = name
    if f"loss/{name}" in columns:
      smooth = _mean(_made(columns, f"loss/{name}"), width)
      shown.append(smooth)
      axes.plot(*_thin(steps, smooth), color=color, linewidth=1.5, label=name)
      label = None
    if f"heldout_loss/{name}" in columns:
      _dots(axes, columns, f"heldout_loss/{name}", color, label)
      shown.append(columns[f"heldout_loss/{name}"])
  _zoom(axes, np.concatenate(shown))
  axes.set_ylabel(f"loss by source (mean of {width})\nheld out: dots")
  axes.legend(frameon=False, loc="upper right", ncols=2)


def _told(name: str, axes, columns) -> None:
  steps, values = columns["step"], _made(columns, name)
  # A step has few pairs.
  width = max(min(10, len(steps) // 4), _width(steps))
  if name == "accuracy":
    axes.axhline(0.5, color=_GRAY, linewidth=0.8, linestyle=":")
  smooth = _mean(values, width)
  axes.plot(*_thin(steps, smooth), color=_STRONG, linewidth=1.5)
  heldout = "heldout_loss" if name == _NLL else f"heldout/{name}"
  if heldout in columns:
    _dots(axes, columns, heldout, _RED, "held out")
    if name == _NLL:
      axes.legend(frameon=False, loc="upper right")
  axes.set_ylabel(f"{name}\n(mean of {width})")


def _rate(axes, columns) -> None:
  axes.plot(
    *_thin(columns["step"], columns["learning_rate"]),
    color=_STRONG,
    linewidth=1.5,
  )
  axes.set_ylim(bottom=0)
  axes.set_ylabel("learning rate")
  axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _norm(axes, columns) -> None:
  from matplotlib import ticker

  steps, values = columns["step"], _made(columns, "grad_norm")
  _each_step(axes, steps, values, _FAINT, None)
  axes.plot(
    *_thin(steps, _mean(values, _width(steps))), color=_STRONG, linewidth=1.5
  )
  known = values[np.isfinite(values)]
  if len(known) and 0 < 10 * known.min() < known.max():
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
  left_out = steps[_left_out(columns)]
  if len(left_out):
    # At the top of the panel: a skipped step's norm may be no number.
    axes.plot(
      *_thin(left_out, np.full(len(left_out), 0.97)),
      transform=axes.get_xaxis_transform(),
      color=_RED,
      linestyle="",
      marker="v",
      markersize=6,
      label=f"{len(left_out)} skipped",
    )
    axes.legend(frameon=False, loc="upper right")
  axes.set_ylabel("gradient norm")


def _mark_stages(places, columns) -> None:
  """A line where the batch grows, what it grows to above the first panel."""
  steps = columns["step"]
  shape = np.stack([columns["batch_size"], columns["sequence_length"]])
  changed = np.flatnonzero(np.any(np.diff(shape, axis=1) != 0, axis=0)) + 1
  changed = [i for i in changed if np.isfinite(shape[:, i - 1 : i + 1]).all()]
  for index in changed[:20]:
    at = steps[index]
    for axes in places:
      axes.axvline(at, color=_GRAY, linewidth=0.8, linestyle=":")
    batch, length = shape[:, index].astype(int)
    places[0].annotate(
      f"{batch:,} x {length:,}",
      (at, 1.0),
      xycoords=("data", "axes fraction"),
      xytext=(3, 0),
      textcoords="offset points",
      fontsize=7.5,
      color=_GRAY,
      va="bottom",
    )
