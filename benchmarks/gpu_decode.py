"""Decoding on one GPU beside transformers.

  python benchmarks/gpu_decode.py --rows=D1,D4 [--minutes=9] [--resume]
    [--out=benchmarks/results/gpu_decode.json] [--nano]

benchmarks/README.md says what the rows are and which to run in one command,
gpu_run.py how a run goes. First both sides must agree, or nothing is timed.
"""

import tempfile

import gpu_decode_rows as table
import gpu_run
import gpu_turn as turns

from llama_jax import errors

PAGED_TOLERANCE = 0.02  # bfloat16 has 8 bits: 0.004 each, a few in a row
LOGITS_TOLERANCE = 1e-3
# Of the logits' spread: tokens that lie so near each other are a tie. Random
# weights in bfloat16 move a logit by some hundredths of it.
TIES = {"float32": 1e-3, "bfloat16": 0.1}
KL_TOKENS = 256


class Benchmark(gpu_run.Run):
  """Beside gpu_decode_ours.py: gpu_decode_peer.py."""

  NAME = "gpu_decode"
  ROOMS = ("decoding", "kernels", "model", "parallel")

  def __init__(self, settings, rows, found, save):
    plan = table.NANO if settings.nano else table.Plan()
    peers = {"peer": settings.peer_python}
    super().__init__(settings, plan, rows, peers, found, save)

  def _check(self):
    name, plan = next(iter(self.rows)), self.plan
    spec = self.rows[name].spec(num_layers=plan.check_layers)
    # A tied head says of random weights the same word over and over.
    untied = spec | {"tied": False}
    shape = self.found["models"][name]["config"]
    with self.turn("ours") as ours, tempfile.TemporaryDirectory() as folder:
      logits, greedy = (f"{folder}/{name}.npz" for name in ("logits", "greedy"))
      self._note_paged(
        ours.ask(
          "check_paged",
          heads=shape["num_heads"],
          kv_heads=shape["num_kv_heads"],
          head_dim=shape["head_dim"],
        )["errors"]
      )
      told = ours.ask(
        "greedy",
        spec=untied,
        prompt=plan.check_prompt,
        new=plan.check_new,
        ways=plan.ways,
        file=greedy,
      )
      self._note_greedy("our plain forward", told, told["short"])
      kl = ours.ask("kl", spec=spec, tokens=plan.check_new)["mean"]
      self._note(
        "KL of int8 from bfloat16",
        kl <= table.KL_BAR,
        f"{kl:.1e} nats, allowed {table.KL_BAR:g}",
      )
      if not self.has("peer"):
        self._note("transformers", True, self.found["about"]["peer"]["missing"])
        return
      ours.ask("logits", spec=spec, tokens=plan.check_prompt, file=logits)
      own, other = (
        ours.ask("describe", spec=one)["config"] for one in (spec, untied)
      )
      # The card is one: our process ends first.
      ours.end()
      with self.turn("peer") as peer:
        off = peer.ask("compare", config=own, file=logits)["off"]
        short = peer.ask("greedy", config=other, file=greedy)["short"]
    self._note(
      "logits, largest difference",
      off <= LOGITS_TOLERANCE,
      f"{off:.1e}, allowed {LOGITS_TOLERANCE:g}",
    )
    self._note_greedy("transformers", told, short)

  def _note_paged(self, found):
    for kernel, off in found.items():
      if isinstance(off, str):
        self._note(f"paged kernel {kernel}", True, f"not here: {off}")
        continue
      self._note(
        f"paged kernel {kernel}, off by",
        off <= PAGED_TOLERANCE,
        f"{off:.1e} of the norm, allowed {PAGED_TOLERANCE}",
      )

  def _note_greedy(self, under, told, short):
    """Tokens of each way are greedy under a model's logits, up to ties."""
    for way, off in zip(told["ways"], short, strict=True):
      allowed = TIES[way.split()[0]]
      self._note(
        f"{self.plan.check_new} greedy tokens, {way}, under {under}",
        off <= allowed,
        f"at most {off:.1e} of the logits' spread below the best, allowed"
        f" {allowed:g}; {told['different']} of them are different",
      )

  # A row.

  def _measure(self, name, row, entry, model):
    self.say(f"row {name}: {row.title}")
    if row.dtype == "int8" and "kl" not in entry:
      with self.turn("ours") as turn:
        entry["kl"] = turn.ask("kl", spec=row.spec(), tokens=KL_TOKENS)
      self.say(f"  KL of int8 from bfloat16: {entry['kl']['mean']:.1e} nats")
    sides = self._sides(row, entry, model["config"])
    self._rounds(
      entry, sides, lambda turn: self._rate(turn, row), model["tokens"]
    )
    entry["summary"] = table.summarise(
      row, entry, model, self.found["about"]["ours"]["device"]
    )

  def _rate(self, turn, row):
    kind = "matmul" if row.kind == "prefill" else "copy"
    return turn.ask(
      "rate",
      kind=kind,
      size=getattr(self.plan, kind),
      soak=self.plan.soak,
      repeats=self.plan.rate_repeats,
    )["rate"]

  def _sides(self, row, entry, config):
    """Columns, as _rounds takes them."""
    counts = {"warmups": self.plan.warmups, "repeats": self.plan.repeats}
    if row.kind == "batching":
      counts = {"count": row.rows}
    dtypes = {"ours": row.dtype}
    if row.dtype == "int8":
      dtypes["ours bfloat16"] = "bfloat16"
    sides = {}
    for column, dtype in dtypes.items():
      spec = row.spec(dtype=dtype)
      variant = self._choose_ours(row, entry, spec)
      given = self._given("ours", spec, variant) | counts
      sides[column] = ("ours", row.kind, given, variant["flags"])
    if len(dtypes) > 1:
      entry["no_peer"] = "int8 is beside our own bfloat16"
    elif variant := self._choose_peer(row, entry, config):
      given = self._given("peer", row.spec(), variant) | counts
      sides["transformers"] = ("peer", row.kind, given | {"config": config}, "")
    return sides

  def _given(self, side, spec, variant):
    """What a worker's method of this kind takes."""
    given = {"spec": spec, "variant": variant}
    if spec["kind"] == "decode":
      given["new"] = self.plan.new
      if side == "ours":
        given["per_call"] = self.plan.per_call
    return given

  def _choose_ours(self, row, entry, spec):
    given = self._settings.variant
    if row.kind == "batching":
      # The engine has the same pages, and too many programs to try others.
      given = given or self._chosen().get("ours decode 64 bfloat16")
      given = given or table.OURS["decode"][0]
      cache = "gather" if given["cache"] == "gather" else "auto"
      return given | {"attention": cache}
    if row.kind == "decode" and given:
      return given
    found = self._choose("ours", table.OURS, entry, spec)
    if not found:
      raise turns.Failed("no variant of ours ran; see tries")
    return found

  def _choose_peer(self, row, entry, config):
    if not self.has("peer"):
      entry["no_peer"] = self.found["about"]["peer"]["missing"]
      return None
    found = self._choose("peer", table.PEER, entry, row.spec(), config=config)
    if not found:
      entry["no_peer"] = "transformers did not run; see tries"
    return found

  def _chosen(self):
    """Like -> variant, of all rows so far."""
    return self.found.setdefault("chosen", {})

  def _choose(self, side, kinds, entry, spec, **config):
    """The fastest variant, found on the first row of its like, or None."""
    chosen, kind = self._chosen(), spec["kind"]
    like = f"{side} {kind} {spec['rows']} {spec['dtype']}"
    if like in chosen:
      return chosen[like]
    counts = {"warmups": 1, "repeats": self.plan.tries}
    if kind == "batching":
      counts = {"count": self.plan.requests}

    def seconds(variant):
      found = self._try(
        side,
        entry,
        variant | {"dtype": spec["dtype"]},
        kind,
        **self._given(side, spec, variant),
        **counts,
        **config,
      )
      return float("inf") if found is None else found

    best, changes = kinds[kind]
    if self._settings.nano:
      changes = changes[:1] if side == "ours" and kind == "decode" else ()
      if side == "peer" and kind == "decode":
        best = best | {"compile": "none"}
    for change in changes:
      if seconds(best) > seconds(best | change):
        best = best | change
    if seconds(best) == float("inf"):
      return None
    chosen[like] = best
    return best


def parse(arguments):
  """The flags; raises UserError for rows and variants that there are not."""
  parser = gpu_run.parser("gpu_decode", __doc__.splitlines()[0], table.ROWS)
  parser.add_argument(
    "--variant",
    default="",
    help="decode ours so: CACHE[:merged][:graphs], CACHE one of"
    f" {', '.join(table.CACHES)}",
  )
  settings = parser.parse_args(arguments)
  settings.rows = gpu_run.check_rows(settings.rows, table.ROWS)
  if settings.variant:
    cache, *rest = settings.variant.split(":")
    if cache not in table.CACHES or set(rest) - {"merged", "graphs"}:
      raise errors.UserError(
        f"--variant={settings.variant} must be CACHE[:merged][:graphs], CACHE"
        f" one of {', '.join(table.CACHES)}."
      )
    settings.variant = {
      "cache": cache,
      "merged": "merged" in rest,
      "flags": table.GRAPHS if "graphs" in rest else "",
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
