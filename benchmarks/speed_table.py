"""The README's table of speed, made of the files under benchmarks/results.

  python benchmarks/speed_table.py

Writes it between the two marks in README.md and prints it. Nothing is typed in
by hand: a figure is there when a benchmark wrote it, beside the peer that was
measured in the same run.
"""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any

import cpu_report

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKS = ("<!-- speed_table.py writes from here -->", "<!-- to here -->")
HEADER = (
  "SmolLM2-135M, two CPU cores",
  "ours",
  "beside",
  "theirs",
  "ratio (rounds)",
  "target",
)
# cpu_decode.json has these rows too, with one more peer.
ELSEWHERE = ("prefill", "decode", "first tokens")
# Of pretraining's rate, that finetuning is to reach.
FINETUNING = 0.9


@dataclasses.dataclass(frozen=True)
class Line:
  """One comparison.

  Attributes:
    work: what was done, with its unit.
    ours, theirs: medians.
    beside: who else did it.
    ratio: ours over theirs, with the least and largest of a round.
    better: "higher" or "lower".
    target: of the ratio, or None.
  """

  work: str
  ours: float
  beside: str
  theirs: float
  ratio: dict[str, float]
  better: str
  target: float | None

  def _reaches(self, ratio: float) -> bool:
    found = self.ratio["ratio"]
    return found >= ratio if self.better == "higher" else found <= ratio

  def cells(self) -> tuple[str, ...]:
    ratio = cpu_report.ratio(self.ratio)
    target = "" if self.target is None else f"{self.target:g}"
    if self.target is not None and not self._reaches(self.target):
      target += ", missed"
    return (
      self.work,
      cpu_report.figure(self.ours),
      self.beside,
      cpu_report.figure(self.theirs),
      ratio if self._reaches(1) else f"**{ratio}**",
      target,
    )


def cpu(result: dict[str, Any]) -> Iterator[Line]:
  """Training, memory and starting, from cpu.json."""
  for row in result["rows"]:
    name, median = row["name"], row["median"]
    if name.startswith(ELSEWHERE):
      continue
    if row["bar"] is None and not name.startswith("process"):
      continue
    work = f"{name}, {row['unit']}"
    if row["baseline"] == "cold":
      peers = [("itself, cache cold", "cold", row["ratio"], row["bar"])]
    else:
      peers = [
        ("transformers", "peer float32", row["ratio"], row["bar"]),
        (
          "transformers, bfloat16",
          "peer bfloat16",
          row["ratio_bfloat16"]["float32"],
          row["bar_bfloat16"],
        ),
      ]
    for beside, under, ratio, bar in peers:
      if ratio is None or (under == "peer bfloat16" and bar is None):
        continue
      yield Line(
        work,
        median["ours float32"],
        beside,
        median[under],
        ratio,
        row["better"],
        bar,
      )


def cpu_decode(result: dict[str, Any]) -> Iterator[Line]:
  """Prefill and decoding, from cpu_decode.json: what has a target, and all that
  our float32 does beside a peer."""
  for row in result["rows"]:
    if row["unit"] not in ("tokens/s", "GB"):
      continue
    for one in row["ratios"]:
      if one["bar"] is None and one["over"] != "ours float32":
        continue
      kind = ", int8" if one["over"] == "ours int8" else ""
      yield Line(
        f"{row['name']}{kind}, {row['unit']}",
        row["median"][one["over"]],
        one["under"].removesuffix(" float32").replace("ours", "ours, float32"),
        row["median"][one["under"]],
        one,
        row["better"],
        one["bar"],
      )


def finetune(result: dict[str, Any]) -> Iterator[Line]:
  """Each stage beside pretraining, from finetune.json."""
  plan = result["plan"]
  shape = f"{plan['rows']} x {plan['length']}"
  base = result["runs"]["pretraining"]["tokens_per_second"]
  for name, run in result["runs"].items():
    if name == "pretraining":
      continue
    rates = run["tokens_per_second"]
    rounds = [ours / theirs for ours, theirs in zip(rates, base, strict=True)]
    yield Line(
      f"{name} {shape}, tokens/s",
      statistics.median(rates),
      "pretraining",
      statistics.median(base),
      {
        "ratio": run["of_pretraining"],
        "min": min(rounds),
        "max": max(rounds),
      },
      "higher",
      None if "live" in name else FINETUNING,
    )


FILES = {
  "cpu": cpu,
  "cpu_decode": cpu_decode,
  "cpu_decode_mixed": cpu_decode,  # --only=mixed takes most of an hour
  "finetune": finetune,
}


def table(folder: pathlib.Path = RESULTS) -> str:
  """The table in Markdown, with the machine and days of its figures."""
  rows, measured = [HEADER, ("---",) * len(HEADER)], []
  for name, lines in FILES.items():
    path = folder / f"{name}.json"
    if not path.is_file():
      continue
    result = json.loads(path.read_text(encoding="utf-8"))
    rows += [line.cells() for line in lines(result)]
    rounds, cpu = result["plan"]["rounds"], result["machine"]["cpu"]
    plural = "s" if rounds > 1 else ""
    measured.append(f"`{name}.json` ({rounds} round{plural}, {cpu})")
  text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
  return f"{text}\n\nFrom {', '.join(measured)}; where we lose is bold."


def put(readme: str, made: str) -> str:
  """readme with the table between its marks; ValueError where they are not."""
  first, last = MARKS
  if first not in readme or last not in readme:
    raise ValueError(f"README.md needs the lines {first} and {last}.")
  before, _, rest = readme.partition(first)
  _, _, after = rest.partition(last)
  return f"{before}{first}\n{made}\n{last}{after}"


def main() -> None:
  made = table()
  path = ROOT / "README.md"
  path.write_text(put(path.read_text(encoding="utf-8"), made), encoding="utf-8")
  print(made)


if __name__ == "__main__":
  main()
