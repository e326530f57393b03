"""The rows of the GPU training benchmark, what is tried, and how it reads."""

import dataclasses
import statistics
from collections.abc import Mapping

import gpu_run

PEAK = 989e12  # of H100 and H200 in dense bfloat16


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of BENCHMARKS.md.

  Attributes:
    title: in words.
    size, num_layers: the model, 0 for all of its layers.
    sequence, rows: the shape of a step's batch.
    microbatches: rows of ours at once, the policy chosen with the first;
      transformers begins with it too.
    bar: MFU to reach.
    bars: column -> at least this often as fast as that.
    dtype: "float8" has bfloat16 beside it.
    mean_document: tokens of a packed document; dense rows stand beside it.
    jla: jax-linear-attention has this model.
  """

  title: str
  size: str
  sequence: int
  rows: int
  microbatches: tuple[int, ...]
  bar: float | None
  bars: Mapping[str, float] = dataclasses.field(default_factory=dict)
  num_layers: int = 0
  dtype: str = "bfloat16"
  mean_document: int = 0
  jla: bool = False

  def spec(self, **changes):
    names = ("size", "num_layers", "sequence", "rows", "dtype", "mean_document")
    return {name: getattr(self, name) for name in names} | changes


ONE = "llama3.2-1b"


def _hf(ratio):
  return {"transformers": ratio}


ROWS = {
  "T1": Row(
    "1B",
    ONE,
    4096,
    16,
    (4, 8),
    0.57,
    {"transformers": 1.25, "jax-linear-attention": 1.03},
    jla=True,
  ),
  "T2": Row("1B FP8", ONE, 4096, 16, (4, 8), 0.72, dtype="float8", jla=True),
  "T3": Row("3B", "llama3.2-3b", 4096, 16, (2, 4), 0.58, _hf(1.2)),
  "T4": Row("8B, 8 layers", "llama3.1-8b", 8192, 8, (1, 2), 0.59, _hf(1.15), 8),
  "T6": Row("1B at 32k", ONE, 32768, 2, (1,), 0.5),
  "T7": Row(
    "1B packed",
    ONE,
    4096,
    16,
    (4, 8),
    None,
    {"ours dense": 0.95},
    mean_document=600,
  ),
  # Not timed as the others are.
  "T2L": Row("1B FP8, loss", ONE, 4096, 4, (4,), None, dtype="float8"),
  "C1": Row("1B, first step", ONE, 4096, 16, (4,), None),
}
POLICIES = ("none", "dots", "attention", "full")
LOSS_CHUNKS = (2048, 8192)
# BENCHMARKS.md's list.
XLA_FLAGS = (
  "--xla_gpu_enable_triton_gemm=false",
  "--xla_gpu_enable_cublaslt=true",
  "--xla_gpu_enable_latency_hiding_scheduler=true",
  "--xla_gpu_exhaustive_tiling_search=true",
  "--xla_gpu_enable_while_loop_double_buffering=true",
)
# What transformers is tried with, each against the best so far.
PEER_FIRST = {
  "attention": "sdpa",
  "compile": "default",
  "head": "chunked",
  "precision": "masters",
  "checkpoint": False,
}
PEER_CHANGES = (
  {"attention": "cudnn"},
  {"attention": "flash"},
  {"head": "whole"},
  {"compile": "max-autotune"},
)
JLA_VARIANTS = ("lean", "fused mlp", "plain")


@dataclasses.dataclass(frozen=True)
class Plan:
  """How much is measured: rounds, steps of a turn, tries while choosing."""

  rounds: int = 3
  warmups: int = 2
  steps: int = 8
  tries: int = 3
  matrix: int = 8192
  soak: float = 10.0
  repeats: int = 50
  loss_steps: int = 600
  check_layers: int = 2
  check_length: int = 512


NANO = Plan(1, 1, 2, 1, 256, 0.0, 5, 4, 2, 64)


def nano(rows):
  """The same rows of a model of two layers, on any device."""
  return {
    name: dataclasses.replace(
      row,
      size="nano",
      num_layers=0,
      sequence=64,
      rows=4,
      microbatches=(2, 4),
      mean_document=row.mean_document and 16,
    )
    for name, row in rows.items()
  }


def summarise(row, entry, dense_flops):
  """Medians, shares of the peaks, ratios round by round.

  Args:
    row: the Row.
    entry: with its rounds, rates and flops_per_token.
    dense_flops: of a token, where a packed row's tokens are one document.
  """
  tokens = row.rows * row.sequence
  before, after = (entry["rates"][n] for n in ("before", "after"))
  columns = {}
  for name in entry["rounds"][0]:
    each = [tokens / told[name]["seconds"] for told in entry["rounds"]]
    flops = entry["flops_per_token"]
    if name == "ours dense":
      flops = dense_flops
    rate = statistics.median(each)
    columns[name] = {
      "tokens_per_second": rate,
      "step_seconds": tokens / rate,
      "mfu": rate * flops / PEAK,
      "sol": rate * flops / statistics.mean((before, after)),
      "peak_bytes": max((told[name]["peak"] or 0) for told in entry["rounds"]),
    }
  return {
    "columns": columns,
    "ratios": gpu_run.ratios(entry["rounds"]),
    **gpu_run.drift(entry["rates"]),
    "bar_mfu": row.bar,
    "bars": dict(row.bars),
  }


def show(found):
  """A line for each row and column, as text."""
  lines = [
    f"{'':5}{'':24}{'tokens/s':>10}{'MFU':>7}{'SOL':>7}{'s/step':>9}"
    f"{'GB':>7}  ours over it"
  ]
  for name, entry in found.get("rows", {}).items():
    summary = entry.get("summary", {})
    for column, told in summary.get("columns", {}).items():
      shown = gpu_run.show_ratio(summary, column)
      if column == "ours" and summary["bar_mfu"]:
        shown = f"bar of MFU {summary['bar_mfu']:.0%}"
      shown += gpu_run.show_drift(summary)
      share = [
        "-" if told[k] is None else f"{told[k]:.1%}" for k in ("mfu", "sol")
      ]
      lines.append(
        f"{name:5}{column:24}{told['tokens_per_second']:>10,.0f}{share[0]:>7}"
        f"{share[1]:>7}{told['step_seconds']:>9.3f}"
        f"{told['peak_bytes'] / 1e9:>7.1f}  {shown}"
      )
    if "difference" in summary:
      lines.append(
        f"{name:5}loss in FP8 less bf16: {summary['difference']:+.4f}"
      )
    if "warm" in entry:
      lines.append(
        f"{name:5}first step, warm: {entry['warm']['seconds']:.1f} s"
      )
    if not entry.get("done"):
      lines.append(f"{name:5}not finished; --resume goes on")
  return "\n".join(lines)
