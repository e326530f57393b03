"""What a run tells: a row a step in metrics.jsonl, TensorBoard, W&B, the bar.

A row has `step`, what the step gave, what the loop knows, and by the clock:
`seconds`, the step's own; `tokens_per_second`; `mfu`, by flops.py's counting;
`memory`, the peak so far in bytes; `time`, Unix seconds when it was done; and
`goodput`: the seconds of all steps that stand, over the time since the run
first started. Compiling, restoring, saving, evaluating, steps that a resume
did again and the time that nothing ran are what goodput loses.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llama_jax import errors
from llama_jax.parallel import hosts
from llama_jax.training import writers

# What differs between two runs of the same steps.
CLOCKED = (
  "seconds",
  "tokens_per_second",
  "mfu",
  "memory",
  "goodput",
  "time",
)


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
  """What is told beside the usual.

  Attributes:
    layer_norms: the norm of each array's gradient and params, layer by layer.
    wandb: a W&B project, or "" for none.
    curves_every: seconds between two drawings of curves.png while the run
      goes, each by a process of the lowest priority; 0 for the end alone.
  """

  layer_norms: bool
  wandb: str
  curves_every: float

  def __post_init__(self):
    if not 0 <= self.curves_every < float("inf"):
      raise errors.ConfigError(
        f"metrics.curves_every={self.curves_every} must be 0 seconds or more."
      )
    if self.wandb and importlib.util.find_spec("wandb") is None:
      raise errors.ConfigError(
        f"metrics.wandb={self.wandb} needs W&B, which is not installed: pip"
        ' install wandb, or use --config.metrics.wandb="".'
      )


class Metrics:
  """Writes one row a step to every place, one step late.

  Late, because reading a step's loss waits for the step: by then the next one
  is already on its way to the device. Of several processes the first writes;
  the others wait alike, so that none runs ahead.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    first_step: int,
    steps: int,
    settings: MetricsConfig,
    *,
    sources: Sequence[str] = (),
    flops: Callable[[float], float] | None = None,
    peak_flops: float | None = None,
  ):
    """Opens the writers; rows of steps after first_step are dropped.

    Args:
      folder: the run's.
      first_step: updates made so far; the run goes on from there.
      steps: updates in all.
      settings: see MetricsConfig.
      sources: names behind the [S] of what `add` is given as source_....
      flops: attention length -> FLOPs of training on a token.
      peak_flops: FLOP/s of all devices; without one of the two mfu is None.
    """
    self._sources = tuple(sources)
    self._flops, self._peak_flops = flops, peak_flops
    self._pending: _Pending | None = None
    self._writers = None
    if jax.process_index() == 0:
      started = _started(folder)
      self._began = started["time"]
      self._standing = rewind(folder / "metrics.jsonl", first_step)
      self._writers = writers.Writers(
        folder, first_step, steps, settings.wandb, started["id"]
      )
      self._drawing = writers.Drawing(folder, settings.curves_every)
    self._compiling = _Compiling()
    self._mark = time.monotonic()

  def add(
    self,
    step: int,
    values: Mapping[str, Any],
    known: Mapping[str, Any],
  ) -> None:
    """Takes the metrics of update number `step` (the first is 1).

    Args:
      step: its number.
      values: name -> what the device computes: scalars; source_NAME [S], told
        as NAME/SOURCE, source_loss only where source_tokens is not 0; vectors,
        told as NAME/0 ...; mappings of these, told as NAME/KEY; and unsigned
        words, told in hexadecimal. What is not finite is told as null.
      known: the same of what the host knows, batch_size and sequence_length
        among it. attention_length, where it is given, is what mfu is counted
        with (flops.attention_length of packed rows) instead of the latter.
    """
    self.flush()
    self._pending = _Pending(step, values, dict(known))
    if all(
      leaf.is_ready()
      for leaf in jax.tree.leaves(values)
      if isinstance(leaf, jax.Array)
    ):
      # It was not computed behind our back, so its clock ends here.
      self._settle()

  def attach(self, values: Mapping[str, Any]) -> None:
    """Adds to the row of the step that was added last."""
    if self._pending is None:
      raise ValueError("no step was added since the last flush.")
    self._pending.known |= values

  @contextlib.contextmanager
  def aside(self) -> Iterator[None]:
    """What is done within is no step's time: saving, evaluating.

    Waits for the step that was added last.
    """
    self._settle()
    try:
      yield
    finally:
      self._mark = time.monotonic()
      self._compiling.forget()

  def flush(self) -> None:
    """Waits for the pending step and writes its row."""
    if self._pending is None:
      return
    self._settle()
    pending, self._pending = self._pending, None
    if self._writers is None:
      return
    known = pending.known
    tokens = known["batch_size"] * known["sequence_length"]
    rate = tokens / pending.seconds
    length = known.get("attention_length", known["sequence_length"])
    mfu = None
    if self._flops and self._peak_flops:
      mfu = rate * self._flops(length) / self._peak_flops
    self._standing += pending.seconds
    now = time.time()
    row = {
      "step": pending.step,
      **self._told(pending.values),
      **self._told(known),
      "tokens_per_second": rate,
      "seconds": pending.seconds,
      "mfu": mfu,
      "memory": hosts.peak_memory(),
      # The clock may have been set back.
      "goodput": min(1.0, self._standing / max(now - self._began, 1e-9)),
      "time": now,
    }
    self._writers.write(row)
    self._drawing.go()

  def _settle(self) -> None:
    """The clock of the pending step ends when the step does."""
    if self._pending is None or self._pending.seconds is not None:
      return
    jax.block_until_ready(self._pending.values)
    now = time.monotonic()
    compiling = self._compiling.forget()
    self._pending.seconds = max(now - self._mark - compiling, 1e-9)
    self._mark = now

  def _told(self, values: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: _on_host(value) for name, value in values.items()}
    tokens = values.get("source_tokens")
    told: dict[str, Any] = {}
    for name, value in values.items():
      short = name.removeprefix("source_")
      if short == name:
        told |= _flat(name, value)
        continue
      for index, source in enumerate(self._sources):
        if name != "source_loss" or tokens[index]:
          told |= _flat(f"{short}/{source}", value[index])
    return told

  def close(self) -> None:
    """Writes what is pending and closes the writers."""
    try:
      self.flush()
    finally:
      self._compiling.close()
      if self._writers is not None:
        self._drawing.close()
        self._writers.close()


@dataclasses.dataclass
class _Pending:
  """A step whose row is not written. seconds: None until the step is done."""

  step: int
  values: Mapping[str, Any]
  known: dict[str, Any]
  seconds: float | None = None


def _on_host(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _on_host(one) for key, one in value.items()}
  return value if isinstance(value, str) or value is None else np.asarray(value)


def _flat(name: str, value: Any) -> dict[str, Any]:
  """What a row says of a value: names to JSON's own types."""
  if isinstance(value, Mapping):
    told: dict[str, Any] = {}
    for key, one in value.items():
      told |= _flat(f"{name}/{key}", one)
    return told
  if isinstance(value, str) or value is None:
    return {name: value}
  if value.dtype.kind == "u":
    return {name: hexadecimal(value)}
  if value.ndim:
    return {f"{name}/{i}": _number(one) for i, one in enumerate(value.ravel())}
  return {name: _number(value)}


def _number(value: np.ndarray) -> float | int | bool | None:
  """JSON has no other numbers than finite ones."""
  return value.item() if np.isfinite(value) else None


def hexadecimal(words) -> str:
  """Unsigned 32-bit words, such as a hash, in hexadecimal digits."""
  return "".join(f"{word:08x}" for word in np.ravel(words).tolist())


class _Compiling:
  """How long JAX has traced and compiled, as it says itself."""

  def __init__(self):
    self._spans: list[tuple[float, float]] = []
    jax.monitoring.register_event_duration_secs_listener(self._note)

  def _note(self, event: str, duration: float, **others) -> None:
    del others
    if event.startswith("/jax/core/compile/"):
      now = time.monotonic()
      # One function is traced within another: the outer ends last.
      self._spans = [s for s in self._spans if s[0] < now - duration]
      self._spans.append((now - duration, now))

  def forget(self) -> float:
    """Seconds since it was last asked."""
    spans, self._spans = self._spans, []
    return sum(end - start for start, end in spans)

  def close(self) -> None:
    jax.monitoring.unregister_event_duration_listener(self._note)


def _started(folder: pathlib.Path) -> dict[str, Any]:
  """When the run first started, and its name for W&B; kept from then on."""
  file = folder / "started.json"
  if file.is_file():
    try:
      started = json.loads(file.read_text(encoding="utf-8"))
      return {"time": float(started["time"]), "id": str(started["id"])}
    except (ValueError, KeyError, TypeError) as error:
      raise errors.BadFileError(
        f"{file}: not what a run keeps there ({error}); remove it: goodput is"
        " then counted from now on."
      ) from error
  started = {"time": time.time(), "id": uuid.uuid4().hex[:12]}
  part = folder / ".started.json.part"
  part.write_text(json.dumps(started) + "\n", encoding="utf-8")
  os.replace(part, file)
  return started


def scan(file: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """(offset of its end, row) of a metrics.jsonl, a row at a time.

  A last line that a kill cut short is left out; damage before it raises
  BadFileError. Nothing where there is no file.
  """
  if not file.is_file():
    return
  end, torn = 0, None
  with file.open("rb") as lines:
    for number, line in enumerate(lines, start=1):
      if torn is not None:
        raise errors.BadFileError(
          f"{file}, line {torn}: not a JSON row; move the file away."
        )
      end += len(line)
      try:
        row = json.loads(line)
        row["step"] + 0  # a number
      except (ValueError, KeyError, TypeError):
        torn = number
        continue
      yield end, row


def read(file: pathlib.Path) -> list[dict[str, Any]]:
  """All rows of a metrics.jsonl, as scan gives them."""
  return [row for _, row in scan(file)]


def rewind(file: pathlib.Path, step: int) -> float:
  """Cuts off the rows after `step`; the sum of the others' seconds.

  Afterwards the file is there and ends where the next row begins.
  """
  kept, seconds = 0, 0.0
  for end, row in scan(file):
    if row["step"] > step:
      break
    kept, seconds = end, seconds + row["seconds"]
  with file.open("a+b") as lines:
    lines.truncate(kept)
    lines.seek(max(kept - 1, 0))
    # A kill may have left all of the last row but its end.
    if lines.read(1) not in (b"", b"\n"):
      lines.write(b"\n")
  return seconds
