"""What the CPU benchmarks write and show: the machine, rows, their tables."""

import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
from collections.abc import Sequence
from typing import Any

from llama_jax import huge_pages

HERE = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass
class Row:
  """One line of the table.

  Attributes:
    name: the key of its bar.
    unit: of the figures.
    figures: variant -> one figure a round.
  """

  name: str
  unit: str
  figures: dict[str, list[float]]

  @property
  def better(self) -> str:
    return "lower" if self.unit in ("s", "GB") else "higher"

  @property
  def medians(self) -> dict[str, float]:
    return {v: statistics.median(f) for v, f in self.figures.items()}

  def ratios(self, over: str, under: str) -> list[float]:
    """Round by round; empty where a variant was not measured."""
    pair = (self.figures.get(over, ()), self.figures.get(under, ()))
    return [a / b for a, b in zip(*pair, strict=False)]

  def ratio(self, over: str, under: str) -> dict[str, float] | None:
    """Of the medians, with the least and the largest of a round."""
    rounds = self.ratios(over, under)
    if not rounds:
      return None
    return {
      "ratio": self.medians[over] / self.medians[under],
      "min": min(rounds),
      "max": max(rounds),
    }

  def show(self) -> str:
    shown = ", ".join(f"{v} {figure(m)}" for v, m in self.medians.items())
    return f"       {self.name}, {self.unit}: {shown}"


def describe_machine() -> dict[str, Any]:
  """What a reader has to know to judge absolute figures."""
  model, features = platform.processor(), ()
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    fields = dict(
      (part.strip() for part in line.split(":", 1))
      for line in info.read_text().splitlines()
      if ":" in line
    )
    model = fields.get("model name", model)
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
    features = [f for f in wanted if f in fields.get("flags", "").split()]
  huge = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
  return {
    "cpu": model,
    "features": list(features),
    "cores": os.cpu_count(),
    "load_before": list(os.getloadavg()),
    "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    "system": platform.platform(),
    "python": platform.python_version(),
    "huge_pages": huge.read_text().strip() if huge.exists() else None,
  }


def describe_source() -> str | None:
  """The commit measured, "+" behind it where files differ from it."""

  def git(*arguments):
    return subprocess.run(
      ["git", "-C", str(HERE), *arguments],
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()

  try:
    return git("rev-parse", "HEAD") + ("+" if git("status", "-s") else "")
  except (OSError, subprocess.CalledProcessError):
    return None


def describe_environment() -> dict[str, str]:
  """The variables that change what libraries do, as workers have them."""
  named = ("XLA_FLAGS", "JAX_", "OMP_", "MKL_", "GLIBC_", "MALLOC_", "LD_PRE")
  return {
    name: value
    for name, value in sorted((os.environ | huge_pages.environment()).items())
    if name.startswith(named)
  }


def hash_config(config: dict[str, Any]) -> str:
  text = json.dumps(config, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def figure(value: float) -> str:
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio(found: dict[str, float] | None) -> str:
  """What Row.ratio found, in words."""
  if found is None:
    return "-"
  low, high = found["min"], found["max"]
  return f"{found['ratio']:.2f} ({low:.2f}-{high:.2f})"


def bar(value: float | None, better: str) -> str:
  if value is None:
    return "-"
  return f"{'>=' if better == 'higher' else '<='} {value:g}"


def columns(lines: Sequence[Sequence[str]]) -> str:
  """Text in columns; the first two are words, to the left."""
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if i < 2 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  )


def rates_table(rates: Sequence[dict[str, dict[str, float]]]) -> str:
  """What the machine gave each library, before and after the benchmark."""
  first, last = rates[0], rates[-1]
  lines = [("", "")]
  for side in first:
    lines[0] += (f"{side} before", "after")
  for name in first["ours"]:
    cells = [figure(r[side][name]) for side in first for r in (first, last)]
    lines.append((name, "", *cells))
  return columns(lines)


def write(result: dict[str, Any], path: pathlib.Path) -> None:
  """The JSON file, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + ".part")
  part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
  os.replace(part, path)
