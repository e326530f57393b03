"""Training on one GPU beside transformers and jax-linear-attention.

  python benchmarks/gpu_train.py --rows=T1,T3 [--minutes=9] [--resume]
    [--out=benchmarks/results/gpu_train.json] [--nano]

benchmarks/README.md says what the rows are and which to run in one command.
Every turn is a process of its own (gpu_train_ours.py, gpu_train_peer.py,
gpu_train_jla.py), since JAX and torch cannot share a card's memory. First both
must agree, or nothing is timed. The file is written after every turn, and
--resume goes on from it. Nothing but the standard library and llama_jax.errors
is imported here.
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
import tempfile
import time

import gpu_train_rows as table
import gpu_train_turn as turns

from llama_jax import errors

HERE = pathlib.Path(__file__).resolve().parent
PACKAGE = HERE.parent / "llama_jax"
TRY_SECONDS = 240  # of one try, compilation and all
ATTENTION_TOLERANCE = 0.02  # bfloat16 has 8 bits: 0.004 each, a few in a row


class Benchmark:
  """One run, resumable: all that is known lies in `found`."""

  def __init__(self, settings, rows, found, save):
    """
    Args:
      settings: the parsed flags.
      rows: name -> Row.
      found: a dict to fill, or what an earlier run left.
      save: writes it.
    """
    self.plan = table.NANO if settings.nano else table.Plan()
    if settings.rounds:
      self.plan = dataclasses.replace(self.plan, rounds=settings.rounds)
    self.rows, self.found, self._save = rows, found, save
    self._settings = settings
    self._deadline = time.monotonic() + settings.minutes * 60

  def say(self, text):
    print(text, flush=True)

  def turn(self, side, flags="", seconds=float("inf")):
    """A fresh process of one side, as a context; it may take so long."""
    given = self._settings
    python = {"ours": sys.executable, "peer": given.peer_python}.get(
      side, given.jla_python
    )
    deadline = min(self._deadline, time.monotonic() + seconds)
    return turns.start(side, python, given.cache, flags, deadline)

  # Before any timing.

  def prepare(self):
    """What the sides are; raises UserError unless both compute the same."""
    with self.turn("ours") as ours:
      about = {"ours": ours.ask("hello")}
      # A row's model is known by now, also where the row has no time left.
      models = {
        name: ours.ask("describe", spec=row.spec())
        for name, row in self.rows.items()
      }
    for side, python in (
      ("peer", self._settings.peer_python),
      ("jla", self._settings.jla_python),
    ):
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
    marks = (about["ours"]["device"], hash_source())
    if self.found.setdefault("marks", list(marks)) != list(marks):
      raise errors.UserError(
        f"--out={self._settings.out} was measured on {self.found['marks'][0]}"
        " or by other code; give another file, or leave out --resume."
      )
    self.found["about"], self.found["models"] = about, models
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

  def _check(self):
    name = next(iter(self.rows))
    row, plan = self.rows[name], self.plan
    spec = row.spec(
      num_layers=plan.check_layers,
      sequence=plan.check_length,
      rows=2,
      mean_document=0,
    )
    with self.turn("ours") as ours, tempfile.TemporaryDirectory() as folder:
      shape = self.found["models"][name]["config"]
      checked = ours.ask(
        "check_attention",
        length=plan.check_length,
        heads=shape["num_heads"],
        kv_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
      )
      for kernel, off in checked["errors"].items():
        if isinstance(off, str):
          self._note(f"attention {kernel}", True, f"not here: {off}")
          continue
        shown = ", ".join(f"{error:.1e}" for error in off)
        self._note(
          f"attention {kernel}, output and gradients off by",
          all(error <= ATTENTION_TOLERANCE for error in off),
          f"{shown} of the norm, allowed {ATTENTION_TOLERANCE}",
        )
      if not self.has("peer"):
        self._note("transformers", True, self.found["about"]["peer"]["missing"])
        return
      config = ours.ask("describe", spec=spec)["config"]
      file = f"{folder}/ours.npy"
      ours.ask("logits", spec=spec, file=file)
      steps = {
        dtype: ours.ask("first", spec=spec | {"dtype": dtype}, attention=kernel)
        for dtype, kernel in (("float32", "chunked"), ("bfloat16", "auto"))
      }
      # The card is one: our process ends first.
      ours.end()
      with self.turn("peer") as peer:
        told = peer.ask("compare", config=config, spec=spec, file=file)
        self._note(
          "logits, largest difference",
          told["off"] <= 1e-3,
          f"{told['off']:.1e}",
        )
        for dtype in steps:
          theirs = peer.ask(
            "first", config=config, spec=spec | {"dtype": dtype}
          )
          loss = abs(steps[dtype]["loss"] - theirs["loss"])
          norm = abs(steps[dtype]["grad_norm"] / theirs["grad_norm"] - 1)
          self._note(
            f"one step in {dtype}",
            loss <= 1e-3 and norm <= 0.01,
            f"loss off by {loss:.1e}, gradient norm by {norm:.1e} of it;"
            " allowed 1e-3 and 1e-2",
          )

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
      "flops_per_token": model["flops_per_token"],
    }
    self.say(f"row {name}: {row.title}, {row.rows} x {row.sequence} tokens")
    if name == "T2L":
      self._converge(row, entry)
    elif name == "C1":
      self._first_step(row, entry)
    else:
      self._choose_ours(row, entry)
      self._choose_peer(row, entry, model["config"])
      self._choose_jla(row, entry, model["config"])
      self._rounds(row, entry, model["config"])
      entry["summary"] = table.summarise(row, entry, self._dense_flops(row))
    entry["done"] = True
    self._save()

  def _policy(self, row, **changes):
    """What --policy says, else the first to be tried, with these changes."""
    first = {
      "rematerialise": "none" if row.sequence < 32768 else "dots",
      "microbatch": row.microbatches[0],
      "loss_chunk": table.LOSS_CHUNKS[0],
      "attention": self._settings.attention,
      "flags": "",
    }
    return first | changes

  def _known_policy(self, row):
    """The policy of the first row measured with this model, for T2L and C1."""
    for other in self.found["rows"].values():
      if other.get("policy") and other["spec"]["size"] == row.size:
        return other["policy"]
    return self._policy(row)

  def _try(self, side, entry, key, steps, **arguments):
    """One figure of entry["tries"][side], taken once; None: does not fit."""
    tries = entry.setdefault("tries", {}).setdefault(side, [])
    for one in tries:
      if one["key"] == key:
        return one["seconds"]
    flags = key.get("flags", "")
    try:
      with self.turn(side, flags, TRY_SECONDS) as turn:
        told = turn.ask("train", warmups=1, steps=steps, **arguments)
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

  def _choose_ours(self, row, entry):
    if "policy" in entry:
      return
    if self._settings.policy:
      entry["policy"] = self._policy(row, **self._settings.policy)
      return
    for other in self.found["rows"].values():
      if "policy" in other and other["spec"] == row.spec(mean_document=0):
        entry["policy"] = other["policy"]
        return

    def seconds(policy):
      found = self._try(
        "ours", entry, policy, self.plan.tries, spec=row.spec(), policy=policy
      )
      return float("inf") if found is None else found

    nano = self._settings.nano
    # Less is kept down the list. Two that fit are compared, since recomputing
    # may cost less than memory traffic; more only cost time.
    best, fitted = None, 0
    for kept in ("none", "full") if nano else table.POLICIES:
      policy = self._policy(row, rematerialise=kept)
      taken = seconds(policy)
      fitted += taken < float("inf")
      if best is None or taken < seconds(best):
        best = policy
      if fitted == 2:
        break
    if seconds(best) == float("inf"):
      raise turns.Failed("no policy fits on this device")
    changes = [{"microbatch": size} for size in row.microbatches[1:]]
    changes += [{"loss_chunk": n} for n in table.LOSS_CHUNKS[1:]]
    if nano:
      changes = []
    if self._settings.xla_sweep:
      changes += [{"flags": flag} for flag in table.XLA_FLAGS]
    for change in changes:
      if "flags" in change:
        change = {"flags": f"{best['flags']} {change['flags']}".strip()}
      if seconds(best | change) < seconds(best):
        best = best | change
    entry["policy"] = best

  def _choose_peer(self, row, entry, config):
    if "variant" in entry or not self.has("peer"):
      return
    # Packed rows and FP8 have no like in transformers.
    if row.mean_document or row.dtype == "float8":
      entry["no_peer"] = "transformers has neither packed rows nor FP8"
      return

    def seconds(variant):
      found = self._try(
        "peer",
        entry,
        variant,
        self.plan.tries,
        config=config,
        spec=row.spec(),
        variant=variant,
      )
      return float("inf") if found is None else found

    others = [
      other["variant"]
      for other in self.found["rows"].values()
      if other.get("variant")
    ]
    best = dict(others[0]) if others else dict(table.PEER_FIRST)
    best |= {"microbatch": row.microbatches[0], "checkpoint": False}
    if self._settings.nano:
      best["compile"] = "eager"
    while seconds(best) == float("inf"):
      if best["microbatch"] > 1:
        best = best | {"microbatch": best["microbatch"] // 2}
      elif not best["checkpoint"]:
        best = best | {"checkpoint": True}
      else:
        entry["no_peer"] = "transformers did not run; see tries"
        return
    changes = () if others or self._settings.nano else table.PEER_CHANGES
    for change in (*changes, {"microbatch": 2 * best["microbatch"]}):
      if change.get("microbatch", 0) > row.rows or best["checkpoint"]:
        continue
      if seconds(best | change) < seconds(best):
        best = best | change
    entry["variant"] = best

  def _choose_jla(self, row, entry, config):
    if "jla" in entry or not (row.jla and self.has("jla")):
      return
    found = {}
    for name in table.JLA_VARIANTS:
      if name == "fused mlp" and row.dtype == "float8":
        continue  # its bfloat16 products alone
      for size in row.microbatches[:2]:
        variant = {"name": name, "microbatch": size}
        seconds = self._try(
          "jla",
          entry,
          variant,
          self.plan.tries,
          config=config,
          spec=row.spec(),
          variant=variant,
        )
        if seconds is not None:
          found[seconds] = variant
    if found:
      entry["jla"] = found[min(found)]

  def _sides(self, row, entry, config):
    """Name of a column -> (side, arguments of train, flags), in turn."""
    policy = entry["policy"]

    def ours(**changes):
      return (
        "ours",
        {"spec": row.spec(**changes), "policy": policy},
        policy["flags"],
      )

    sides = {"ours": ours()}
    if row.mean_document:
      sides["ours dense"] = ours(mean_document=0)
    if row.dtype == "float8":
      sides["ours bfloat16"] = ours(dtype="bfloat16")
    theirs = {"config": config, "spec": row.spec()}
    if variant := entry.get("variant"):
      for precision in ("masters", "bfloat16"):
        changed = {"variant": variant | {"precision": precision}}
        sides[f"transformers {precision}"] = ("peer", theirs | changed, "")
    if variant := entry.get("jla"):
      sides["jax-linear-attention"] = (
        "jla",
        theirs | {"variant": variant},
        "",
      )
    return sides

  def _rate(self, turn):
    plan = self.plan
    return turn.ask(
      "rate", size=plan.matrix, soak=plan.soak, repeats=plan.repeats
    )["flops"]

  def _rounds(self, row, entry, config):
    """All rounds in one command, or as many whole ones as its time allows."""
    rounds, rates = [], {}
    plan = self.plan
    try:
      for number in range(plan.rounds):
        told = {}
        for name, (side, arguments, flags) in self._sides(
          row, entry, config
        ).items():
          with self.turn(side, flags) as turn:
            if name == "ours" and not number:
              rates["before"] = self._rate(turn)
            told[name] = turn.ask(
              "train", warmups=plan.warmups, steps=plan.steps, **arguments
            )
            if not told[name]["fits"]:
              raise turns.Failed(f"{name} did not fit this time")
          rate = row.rows * row.sequence / told[name]["seconds"]
          self.say(f"  round {number + 1}, {name}: {rate:,.0f} tokens/s")
        rounds.append(told)
        with self.turn("ours") as turn:
          rates["after"] = self._rate(turn)
        entry |= {"rounds": rounds, "rates": rates}
        self._save()
    except turns.OutOfTime:
      if not rounds:
        raise
      self.say(f"  time for {len(rounds)} of {plan.rounds} rounds")

  def _dense_flops(self, row):
    """FLOPs of a token where a packed row's tokens are one document."""
    with self.turn("ours") as turn:
      told = turn.ask("describe", spec=row.spec(mean_document=0))
    return told["flops_per_token"]

  def _converge(self, row, entry):
    """T2's loss: the same steps on real text in both dtypes."""
    policy = self._known_policy(row) | {"microbatch": row.microbatches[0]}
    losses = entry.setdefault("losses", {})
    for dtype in ("bfloat16", "float8"):
      if dtype not in losses:
        with self.turn("ours", policy["flags"]) as turn:
          losses[dtype] = turn.ask(
            "converge",
            spec=row.spec(dtype=dtype),
            policy=policy,
            steps=self.plan.loss_steps,
          )["loss"]
        self._save()
    last = {d: statistics.mean(found[-50:]) for d, found in losses.items()}
    entry["summary"] = last | {"difference": last["float8"] - last["bfloat16"]}
    self.say(f"  mean loss of the last 50 steps: {entry['summary']}")

  def _first_step(self, row, entry):
    """C1: once to fill the compile cache, then in a fresh process."""
    policy = self._known_policy(row)
    for name in ("as found", "warm"):
      with self.turn("ours", policy["flags"]) as turn:
        entry[name] = turn.ask(
          "first_step", spec=row.spec(), policy=policy, began=turn.began
        )
      self.say(f"  {name}: {entry[name]}")


def hash_json(value):
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def hash_source():
  """Of all code whose figures these are."""
  rooms = ("kernels", "model", "objectives", "parallel", "training")
  files = [f for room in rooms for f in sorted((PACKAGE / room).glob("*.py"))]
  files += sorted(HERE.glob("gpu_train*.py"))
  digest = hashlib.sha256()
  for file in files:
    digest.update(file.read_bytes())
  return digest.hexdigest()


def parse(arguments):
  """The flags; raises UserError for rows and policies that there are not."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--rows", default="T1", help=f"some of {','.join(table.ROWS)}")
  add("--out", default=str(HERE / "results" / "gpu_train.json"))
  add("--resume", action="store_true", help="go on from what --out holds")
  add("--minutes", type=float, default=9.0, help="stop in time, all written")
  add("--rounds", type=int, default=0, help="turns of every side (3)")
  add("--nano", action="store_true", help="tiny, on any device: does it run?")
  add("--peer_python", default=os.environ.get("PEER_PYTHON", ""))
  add("--jla_python", default=os.environ.get("JLA_PYTHON", ""))
  add("--attention", default="auto", help="a key of kernels.ATTENTION")
  add("--policy", default="", help="REMATERIALISE:MICROBATCH:LOSS_CHUNK")
  add("--xla_sweep", action="store_true", help="try XLA flags too")
  add("--cache", default=str(HERE.parent / "build" / "gpu_train"))
  settings = parser.parse_args(arguments)
  settings.rows = settings.rows.split(",")
  for name in settings.rows:
    if name not in table.ROWS:
      raise errors.UserError(
        f"--rows={name} is not known; use some of {','.join(table.ROWS)}."
      )
  if settings.policy:
    parts = settings.policy.split(":")
    if len(parts) != 3 or parts[0] not in table.POLICIES:
      raise errors.UserError(
        f"--policy={settings.policy} must be REMATERIALISE:MICROBATCH:"
        f"LOSS_CHUNK, say none:4:2048; REMATERIALISE is one of"
        f" {', '.join(table.POLICIES)}."
      )
    settings.policy = {
      "rematerialise": parts[0],
      "microbatch": int(parts[1]),
      "loss_chunk": int(parts[2]),
    }
  return settings


def main(arguments):
  settings = parse(arguments)
  out = pathlib.Path(settings.out)
  found = {}
  if settings.resume and out.is_file():
    found = json.loads(out.read_text(encoding="utf-8"))

  def save():
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(part, out)

  found |= {
    "benchmark": "gpu_train",
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "host": {"python": platform.python_version(), "cpus": os.cpu_count()},
    "environment": {
      name: value
      for name, value in sorted(os.environ.items())
      if name.startswith(("XLA_", "JAX_", "NVIDIA_", "CUDA_"))
    },
  }
  found.setdefault("settings", []).append(vars(settings))
  rows = {name: table.ROWS[name] for name in settings.rows}
  benchmark = Benchmark(
    settings, table.nano(rows) if settings.nano else rows, found, save
  )
  found["plan"] = dataclasses.asdict(benchmark.plan)
  try:
    benchmark.prepare()
    for name in settings.rows:
      try:
        benchmark.measure(name)
      except turns.Failed as error:
        found["rows"][name]["failed"] = str(error)
        print(f"row {name} failed: {error}", file=sys.stderr)
  except turns.OutOfTime:
    print("the time is up; the same command with --resume goes on")
  finally:
    save()
  print(f"\n{table.show(found)}\n\nall figures: {out}")


if __name__ == "__main__":
  try:
    main(sys.argv[1:])
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
