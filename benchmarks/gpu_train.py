"""Training on one GPU beside transformers and jax-linear-attention.

  python benchmarks/gpu_train.py --rows=T1,T3 [--minutes=9] [--resume]
    [--out=benchmarks/results/gpu_train.json] [--nano]

benchmarks/README.md says what the rows are and which to run in one command,
gpu_run.py how a run goes. First all sides must agree, or nothing is timed.
"""

import os
import statistics
import tempfile

import gpu_run
import gpu_train_rows as table
import gpu_turn as turns

from llama_jax import errors

ATTENTION_TOLERANCE = 0.02  # bfloat16 has 8 bits: 0.004 each, a few in a row


class Benchmark(gpu_run.Run):
  """Beside gpu_train_ours.py: gpu_train_peer.py and gpu_train_jla.py."""

  NAME = "gpu_train"
  ROOMS = ("kernels", "model", "objectives", "parallel", "training")

  def __init__(self, settings, rows, found, save):
    plan = table.NANO if settings.nano else table.Plan()
    peers = {"peer": settings.peer_python, "jla": settings.jla_python}
    super().__init__(settings, plan, rows, peers, found, save)

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

  def _measure(self, name, row, entry, model):
    entry["flops_per_token"] = model["flops_per_token"]
    self.say(f"row {name}: {row.title}, {row.rows} x {row.sequence} tokens")
    if name == "T2L":
      self._converge(row, entry)
    elif name == "C1":
      self._first_step(row, entry)
    else:
      self._choose_ours(row, entry)
      self._choose_peer(row, entry, model["config"])
      self._choose_jla(row, entry, model["config"])
      sides = self._sides(row, entry, model["config"])
      self._rounds(entry, sides, self._rate, row.rows * row.sequence)
      entry["summary"] = table.summarise(row, entry, self._dense_flops(row))

  def _try_training(self, side, entry, key, **arguments):
    return self._try(
      side,
      entry,
      key,
      "train",
      warmups=1,
      steps=self.plan.tries,
      **arguments,
    )

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
      found = self._try_training(
        "ours", entry, policy, spec=row.spec(), policy=policy
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
      found = self._try_training(
        "peer",
        entry,
        variant,
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
        seconds = self._try_training(
          "jla",
          entry,
          variant,
          config=config,
          spec=row.spec(),
          variant=variant,
        )
        if seconds is not None:
          found[seconds] = variant
    if found:
      entry["jla"] = found[min(found)]

  def _sides(self, row, entry, config):
    """Columns, as _rounds takes them."""
    policy = entry["policy"]
    counts = {"warmups": self.plan.warmups, "steps": self.plan.steps}

    def ours(**changes):
      given = {"spec": row.spec(**changes), "policy": policy} | counts
      return "ours", "train", given, policy["flags"]

    def theirs(side, variant):
      given = {"config": config, "spec": row.spec(), "variant": variant}
      return side, "train", given | counts, ""

    sides = {"ours": ours()}
    if row.mean_document:
      sides["ours dense"] = ours(mean_document=0)
    if row.dtype == "float8":
      sides["ours bfloat16"] = ours(dtype="bfloat16")
    if variant := entry.get("variant"):
      for precision in ("masters", "bfloat16"):
        changed = variant | {"precision": precision}
        sides[f"transformers {precision}"] = theirs("peer", changed)
    if variant := entry.get("jla"):
      sides["jax-linear-attention"] = theirs("jla", variant)
    return sides

  def _rate(self, turn):
    plan = self.plan
    return turn.ask(
      "rate", size=plan.matrix, soak=plan.soak, repeats=plan.repeats
    )["flops"]

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


def parse(arguments):
  """The flags; raises UserError for rows and policies that there are not."""
  parser = gpu_run.parser("gpu_train", __doc__.splitlines()[0], table.ROWS)
  add = parser.add_argument
  add("--jla_python", default=os.environ.get("JLA_PYTHON", ""))
  add("--attention", default="auto", help="a key of kernels.ATTENTION")
  add("--policy", default="", help="REMATERIALISE:MICROBATCH:LOSS_CHUNK")
  add("--xla_sweep", action="store_true", help="try XLA flags too")
  settings = parser.parse_args(arguments)
  settings.rows = gpu_run.check_rows(settings.rows, table.ROWS)
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
  rows = {name: table.ROWS[name] for name in settings.rows}
  if settings.nano:
    rows = table.nano(rows)
  gpu_run.measure(
    settings,
    lambda found, save: Benchmark(settings, rows, found, save),
    table.show,
  )


if __name__ == "__main__":
  gpu_run.command(main)
