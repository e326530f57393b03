"""A run of a GPU benchmark: its sides' turns, its checks, its file.

What a benchmark adds are its rows (gpu_train.py, gpu_decode.py). Every turn is
a process of its own, since JAX and torch cannot share a card's memory. The file
is written after every turn, and --resume goes on from it. Nothing but the
standard library and llama_jax.errors is imported here.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import gpu_turn as turns

from llama_jax import errors

HERE = pathlib.Path(__file__).resolve().parent
PACKAGE = HERE.parent / "llama_jax"
BENCHMARKS = ("gpu_train", "gpu_decode")
TRY_SECONDS = 240  # of one try, compilation and all
DRIFT = 0.03  # of a rate of the device, before and after a row


class Run:
  """One run, resumable: all that is known lies in `found`.

  A subclass has _check, which raises unless the sides agree, and _measure(name,
  row, entry, model), which fills a row's entry.

  Attributes:
    NAME: one of BENCHMARKS; its workers' files begin with it.
    ROOMS: folders of the package whose speed is measured.
  """

  NAME = ""
  ROOMS: tuple[str, ...] = ()

  def __init__(self, settings, plan, rows, peers, found, save):
    """
    Args:
      settings: the parsed flags.
      plan: how much is measured; --rounds changes it.
      rows: name -> Row.
      peers: side -> its interpreter, empty where it is absent.
      found: a dict to fill, or what an earlier run left.
      save: writes it.
    """
    if settings.rounds:
      plan = dataclasses.replace(plan, rounds=settings.rounds)
    self.plan, self.rows, self.found, self._save = plan, rows, found, save
    self._settings, self._peers = settings, peers
    self._deadline = time.monotonic() + settings.minutes * 60

  def say(self, text):
    print(text, flush=True)

  def turn(self, side, flags="", seconds=float("inf")):
    """A fresh process of one side, as a context; it may take so long."""
    python = self._peers.get(side, sys.executable)
    deadline = min(self._deadline, time.monotonic() + seconds)
    worker = f"{self.NAME}_{side}.py"
    return turns.start(worker, python, self._settings.cache, flags, deadline)

  # Before any timing.

  def prepare(self):
    """What the sides are; raises UserError unless all compute the same."""
    with self.turn("ours") as ours:
      about = {"ours": ours.ask("hello")}
      # A row's model is known by now, also where the row has no time left.
      models = {
        name: ours.ask("describe", spec=row.spec())
        for name, row in self.rows.items()
      }
    for side, python in self._peers.items():
      if not python:
        about[side] = {"missing": f"--{side}_python was not given"}
        continue
      try:
        with self.turn(side) as turn:
          about[side] = turn.ask("hello")
      except (turns.Failed, OSError) as error:
        about[side] = {"missing": str(error)}
    for side, said in about.items():
      self.say(f"{side}: {said}")
    marks = [about["ours"]["device"], self._hash_source()]
    if self.found.setdefault("marks", marks) != marks:
      raise errors.UserError(
        f"--out={self._settings.out} was measured on {self.found['marks'][0]}"
        " or by other code; give another file, or leave out --resume."
      )
    self.found["about"] = about
    self.found.setdefault("models", {}).update(models)
    if not self.found.get("checked"):
      self.found["checks"] = []
      self._check()
      self.found["checked"] = True
    self._save()

  def has(self, side):
    return "missing" not in self.found["about"][side]

  def _note(self, what, ok, detail):
    line = f"{what}: {detail}"
    self.found["checks"].append(line)
    self.say(f"check  {line}")
    if not ok:
      self._save()
      raise errors.UserError(f"nothing is timed, for a check failed: {line}.")

  def _hash_source(self):
    """Of all code whose figures these are."""
    files = [
      file
      for room in self.ROOMS
      for file in sorted((PACKAGE / room).glob("*.py"))
    ]
    files += [
      file
      for file in sorted(HERE.glob("gpu_*.py"))
      if file.stem.startswith(self.NAME) or not file.stem.startswith(BENCHMARKS)
    ]
    digest = hashlib.sha256()
    for file in files:
      digest.update(file.read_bytes())
    return digest.hexdigest()

  # A row.

  def measure(self, name):
    """All of a row that is not in the file yet."""
    row = self.rows[name]
    entry = self.found.setdefault("rows", {}).setdefault(name, {})
    if entry.get("done"):
      return
    entry.pop("failed", None)
    model = self.found["models"][name]
    entry |= {
      "title": row.title,
      "spec": row.spec(),
      "config_hash": hash_json(model["config"]),
    }
    self._measure(name, row, entry, model)
    entry["done"] = True
    self._save()

  def _try(self, side, entry, key, call, **arguments):
    """One figure of entry["tries"][side], taken once; None: does not fit."""
    tries = entry.setdefault("tries", {}).setdefault(side, [])
    for one in tries:
      if one["key"] == key:
        return one["seconds"]
    try:
      with self.turn(side, key.get("flags", ""), TRY_SECONDS) as turn:
        told = turn.ask(call, **arguments)
    except turns.Failed as error:
      told = {"fits": False, "error": str(error)}
    except turns.OutOfTime:
      if time.monotonic() > self._deadline:
        raise
      told = {"fits": False, "error": f"no answer in {TRY_SECONDS} s"}
    seconds = told["seconds"] if told["fits"] else None
    tries.append({"key": key, "seconds": seconds} | told)
    self.say(f"  {side} {key}: {told.get('error', seconds or 'does not fit')}")
    self._save()
    return seconds

  def _rounds(self, entry, sides, rate, tokens):
    """All rounds in one command, or as many whole ones as its time allows.

    Args:
      entry: gets "rounds" and the device's "rates", after the first turn and
        after the last.
      sides: column -> (side, call, its arguments, flags), in turn; "ours" is
        the first.
      rate: turn of ours -> what the device can do.
      tokens: of which a call's seconds are.
    """
    rounds, rates = [], {}
    try:
      for number in range(self.plan.rounds):
        told = {}
        for name, (side, call, arguments, flags) in sides.items():
          with self.turn(side, flags) as turn:
            told[name] = turn.ask(call, **arguments)
            if not told[name]["fits"]:
              raise turns.Failed(f"{name} did not fit this time")
            if not rates:  # later it adds nothing to the peak of memory
              rates["before"] = rate(turn)
          shown = f"{tokens / told[name]['seconds']:,.0f} tokens/s"
          self.say(f"  round {number + 1}, {name}: {shown}")
        rounds.append(told)
        with self.turn("ours") as turn:
          rates["after"] = rate(turn)
        entry |= {"rounds": list(rounds), "rates": dict(rates)}
        self._save()
    except turns.OutOfTime:
      if "rounds" not in entry:
        raise
      self.say(
        f"  time for {len(entry['rounds'])} of {self.plan.rounds} rounds"
      )


def ratios(rounds):
  """Column -> how often as fast ours is: median, least and most of a round."""
  found = {}
  for name in rounds[0]:
    if name != "ours":
      pairs = [
        told[name]["seconds"] / told["ours"]["seconds"] for told in rounds
      ]
      found[name] = {
        "ratio": statistics.median(pairs),
        "min": min(pairs),
        "max": max(pairs),
      }
  return found


def drift(rates):
  """How far the device's rate moved while a row was measured."""
  moved = abs(rates["after"] / rates["before"] - 1)
  return {"drift": moved, "dropped": moved > DRIFT}


def show_ratio(summary, column):
  """Ours over a column in words, with its bar; "" for ours itself."""
  ratio = summary["ratios"].get(column)
  if not ratio:
    return ""
  shown = f"{ratio['ratio']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
  for start, least in summary["bars"].items():
    if column.startswith(start):
      shown += f", bar {least:g}"
  return shown


def show_drift(summary):
  if not summary["dropped"]:
    return ""
  return f"; DROPPED, the device's rate moved by {summary['drift']:.0%}"


def hash_json(value):
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def parser(name, description, rows):
  """The flags that all benchmarks have.

  Args:
    name: one of BENCHMARKS.
    description: for --help.
    rows: all there are; the first is the default.
  """
  made = argparse.ArgumentParser(description=description)
  add = made.add_argument
  add("--rows", default=next(iter(rows)), help=f"some of {','.join(rows)}")
  add("--out", default=str(HERE / "results" / f"{name}.json"))
  add("--resume", action="store_true", help="go on from what --out holds")
  add("--minutes", type=float, default=9.0, help="stop in time, all written")
  add("--rounds", type=int, default=0, help="turns of every side (3)")
  add("--nano", action="store_true", help="tiny, on any device: does it run?")
  add("--peer_python", default=os.environ.get("PEER_PYTHON", ""))
  add("--cache", default=str(HERE.parent / "build" / name))
  return made


def check_rows(given, rows):
  """--rows as a list, D4 for D4-1B and all like it; UserError for others."""
  names = []
  for one in given.split(","):
    meant = [name for name in rows if name.split("-")[0] == one or name == one]
    if not meant:
      raise errors.UserError(
        f"--rows={one} is not known; use some of {','.join(rows)}."
      )
    names += meant
  return names


def measure(settings, begin, show):
  """One command: reads what is known, measures the rows, writes all.

  Args:
    settings: the parsed flags.
    begin: (found, save) -> the Run.
    show: found -> the table, as text.
  """
  out = pathlib.Path(settings.out)
  found = {}
  if settings.resume and out.is_file():
    found = json.loads(out.read_text(encoding="utf-8"))

  def save():
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(part, out)

  run = begin(found, save)
  found |= {
    "benchmark": run.NAME,
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "host": {"python": platform.python_version(), "cpus": os.cpu_count()},
    "environment": {
      name: value
      for name, value in sorted(os.environ.items())
      if name.startswith(("XLA_", "JAX_", "NVIDIA_", "CUDA_"))
    },
    "plan": dataclasses.asdict(run.plan),
  }
  found.setdefault("settings", []).append(vars(settings))
  try:
    run.prepare()
    for name in settings.rows:
      try:
        run.measure(name)
      except turns.Failed as error:
        found["rows"][name]["failed"] = str(error)
        print(f"row {name} failed: {error}", file=sys.stderr)
  except turns.OutOfTime:
    print("the time is up; the same command with --resume goes on")
  finally:
    save()
  print(f"\n{show(found)}\n\nall figures: {out}")


def command(main):
  """Runs a benchmark's main; a user's mistake is one line and status 2."""
  try:
    main(sys.argv[1:])
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
