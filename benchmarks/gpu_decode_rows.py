"""The rows of the GPU decoding benchmark, what is tried, and how it reads."""

import dataclasses
import statistics
from collections.abc import Mapping

import gpu_run

# Bytes/s at which BENCHMARKS.md counts its floors, by the device's name.
FLOOR_RATES = (("NVIDIA H100", 3.0e12), ("NVIDIA H200", 4.3e12))
KL_BAR = 1e-3  # nats, of int8 weights


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of BENCHMARKS.md.

  Attributes:
    title: in words.
    size, num_layers: the model, 0 for all of its layers.
    kind: "decode", "batching" or "prefill".
    rows: sequences at once; of batching, requests.
    cached: tokens before the one decoded, in the mean; of prefill, the prompt.
    bars: column -> at least this often as fast as that.
    mbu: share of the copy bandwidth to reach.
    floor: share of what the floor of BENCHMARKS.md allows.
    dtype: of the weights; "int8" has bfloat16 beside it.
    prompts, answers: of batching: least and most tokens of a request.
  """

  title: str
  size: str
  kind: str = "decode"
  rows: int = 1
  cached: int = 1024
  bars: Mapping[str, float] = dataclasses.field(default_factory=dict)
  mbu: float | None = None
  floor: float | None = None
  dtype: str = "bfloat16"
  num_layers: int = 0
  prompts: tuple[int, int] = (32, 1024)
  answers: tuple[int, int] = (16, 512)

  def spec(self, **changes):
    names = ("kind", "size", "num_layers", "rows", "cached", "dtype")
    names += ("prompts", "answers") if self.kind == "batching" else ()
    return {name: getattr(self, name) for name in names} | changes


ONE, THREE, EIGHT = "llama3.2-1b", "llama3.2-3b", "llama3.1-8b"


def _over(ratio):
  return {"transformers": ratio}


ROWS = {
  "D1": Row("1B, batch 1", ONE, mbu=0.65, bars=_over(1.3)),
  "D2": Row("3B, batch 1", THREE, mbu=0.75, bars=_over(1.2)),
  "D3": Row("8B, batch 1", EIGHT, mbu=0.82, bars=_over(1.1)),
  "D4-1B": Row("1B, batch 64", ONE, rows=64, floor=0.6, bars=_over(2.0)),
  "D4-3B": Row("3B, batch 64", THREE, rows=64, floor=0.65, bars=_over(2.0)),
  "D4-8B": Row("8B, batch 64", EIGHT, rows=64, floor=0.72, bars=_over(2.0)),
  "D5": Row("1B, 256 requests", ONE, "batching", 256, bars=_over(1.3)),
  "D6": Row(
    "8B, int8, batch 1", EIGHT, bars={"ours bfloat16": 1.5}, dtype="int8"
  ),
  "P1-1B": Row("1B, prefill", ONE, "prefill", cached=2048, bars=_over(1.0)),
  "P1-8B": Row("8B, prefill", EIGHT, "prefill", cached=2048, bars=_over(1.0)),
}

CACHES = ("static", "paged", "gather")
# The whole loop as one CUDA graph (BENCHMARKS.md). A flag of the process, since
# the engine's programs are compiled where they are called.
GRAPHS = (
  "--xla_gpu_enable_command_buffer="
  "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,WHILE"
  " --xla_gpu_graph_min_graph_size=1"
)
# What is tried of each kind, each change against the best so far.
OURS = {
  "decode": (
    {"cache": "static", "merged": True, "flags": ""},
    (
      {"cache": "paged"},
      {"cache": "gather"},
      {"merged": False},
      {"flags": GRAPHS},
    ),
  ),
  "prefill": (
    {"attention": "auto", "merged": True, "flags": ""},
    ({"merged": False}, {"flags": GRAPHS}),
  ),
}
PEER = {
  "decode": (
    {"attention": "sdpa", "compile": "reduce-overhead"},
    ({"compile": "max-autotune"}, {"attention": "eager"}),
  ),
  "prefill": (
    {"attention": "sdpa", "compile": "none"},
    (
      {"attention": "flash"},
      {"attention": "cudnn"},
      {"compile": "default"},
      {"compile": "max-autotune"},
    ),
  ),
  # Continuous batching's levels of compilation.
  "batching": (
    {"attention": "sdpa", "compile": 0},
    ({"attention": "paged|eager"}, {"compile": 2}),
  ),
}


# (dtype, cache, merged): ways to decode that must give the same greedy tokens,
# in float32 and, as pages are read in place in bfloat16 alone, in both.
WAYS = (
  ("float32", "static", False),
  ("float32", "paged", True),
  ("bfloat16", "static", True),
  ("bfloat16", "paged", False),
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """How much is measured.

  Attributes:
    rounds: times that every side has its turn.
    warmups, repeats: of what is timed in a turn; tries: repeats while choosing.
    new: tokens decoded in a repeat; per_call: in one call of the device.
    requests: of batching, while choosing.
    matmul, copy: size of products, bytes of a copy.
    soak, rate_repeats: of the device's rates; see gpu_rates.py.
    check_layers, check_prompt, check_new: of the model that is checked first.
    ways: some of WAYS.
  """

  rounds: int = 3
  warmups: int = 1
  repeats: int = 5
  tries: int = 2
  new: int = 128
  per_call: int = 32
  requests: int = 64
  matmul: int = 8192
  copy: int = 1 << 30
  soak: float = 10.0
  rate_repeats: int = 50
  check_layers: int = 2
  check_prompt: int = 64
  check_new: int = 64
  ways: tuple[tuple[str, str, bool], ...] = WAYS


NANO = Plan(
  rounds=1,
  repeats=1,
  tries=1,
  new=8,
  per_call=4,
  requests=3,
  matmul=256,
  copy=1 << 20,
  soak=0.0,
  rate_repeats=3,
  check_layers=1,
  check_prompt=8,
  check_new=8,
  ways=WAYS[1:3],
)


def nano(rows):
  """The same rows of a model of one layer, on any device."""
  return {
    name: dataclasses.replace(
      row,
      size="nano",
      num_layers=1,
      rows=min(row.rows, 4),
      cached=24,
      prompts=(4, 8),
      answers=(2, 8),
    )
    for name, row in rows.items()
  }


def summarise(row, entry, model, device):
  """Medians, shares of what the device can do, ratios round by round.

  Args:
    row: the Row.
    entry: with its rounds and rates.
    model: what our side's describe said.
    device: its name.
  """
  rate = statistics.mean(entry["rates"].values())
  floor_rate = next(
    (known for start, known in FLOOR_RATES if device.startswith(start)), rate
  )
  columns = {}
  for name in entry["rounds"][0]:
    told = [one[name] for one in entry["rounds"]]
    seconds = statistics.median(one["seconds"] for one in told)
    columns[name] = column = {
      "tokens_per_second": model["tokens"] / seconds,
      "seconds": seconds,
      "peak_bytes": max((one["peak"] or 0) for one in told),
    }
    if row.kind == "decode":
      dtype = row.dtype if name == "ours" else "bfloat16"
      read = model["weight_bytes"][dtype]
      read += row.rows * row.cached * model["token_bytes"]
      column |= {
        "mbu": read / seconds / rate,
        "floor": read / seconds / floor_rate,
      }
    elif row.kind == "prefill":
      column["sol"] = model["prefill_flops"] / seconds / rate
  return {
    "columns": columns,
    "ratios": gpu_run.ratios(entry["rounds"]),
    **gpu_run.drift(entry["rates"]),
    "bar_mbu": row.mbu,
    "bar_floor": row.floor,
    "bars": dict(row.bars),
  }


def show(found):
  """A line for each row and column, as text."""
  lines = [
    f"{'':6}{'':16}{'tokens/s':>10}{'ms':>10}{'MBU':>7}{'floor':>7}{'SOL':>7}"
    f"{'GB':>7}  ours over it"
  ]
  rows = found.get("rows", {})
  rates = {
    name: entry["summary"]["columns"]["ours"]["tokens_per_second"]
    for name, entry in rows.items()
    if "summary" in entry
  }
  for name, entry in rows.items():
    summary = entry.get("summary", {})
    for column, told in summary.get("columns", {}).items():
      shown = gpu_run.show_ratio(summary, column)
      if column == "ours":
        for share in ("mbu", "floor"):
          if summary[f"bar_{share}"]:
            shown = f"bar of {share} {summary[f'bar_{share}']:.0%}"
      shown += gpu_run.show_drift(summary)
      shares = "".join(
        f"{told[k]:>7.0%}" if k in told else f"{'-':>7}"
        for k in ("mbu", "floor", "sol")
      )
      lines.append(
        f"{name:6}{column:16}{told['tokens_per_second']:>10,.0f}"
        f"{told['seconds'] * 1e3:>10.2f}{shares}"
        f"{told['peak_bytes'] / 1e9:>7.1f}  {shown}"
      )
    if "kl" in entry:
      lines.append(
        f"{name:6}KL of int8 from bfloat16: {entry['kl']['mean']:.1e} nats a"
        f" token, bar {KL_BAR:g}"
      )
    if name == "D5" and summary and "D4-1B" in rates:
      lines.append(
        f"{name:6}{rates[name] / rates['D4-1B']:.0%} of D4-1B's rate"
      )
    if not entry.get("done"):
      lines.append(f"{name:6}not finished; --resume goes on")
  return "\n".join(lines)
