"""Trains: a config becomes a mesh, data, a model, a state, and a loop.

  python -m llama_jax.train --config=configs/quickstart.py --workdir=DIR \\
    [--config.optimizer.peak_lr=3e-4 ...] [--config.parallel.fsdp=4]
    [--profile=START:STOP]
  python -m llama_jax.train --workdir=DIR --replay=STEP

The same command again goes on where the run folder's newest checkpoint ends.
Ctrl-C or SIGTERM saves one more checkpoint and stops. --replay computes one
step again from the checkpoint before it and prints its gradient's hash, which
metrics.jsonl has of every step; it writes nothing.

Exit codes beside those of shell.py: 3, too many steps in a row were left out.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shlex
import signal
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from llama_jax import checkpoint, errors, evals, experiment, shell
from llama_jax.checkpoint import atomic, steps, store
from llama_jax.data import batches as batches_lib
from llama_jax.data import prepared as prepared_lib
from llama_jax.data import ramp as ramp_lib
from llama_jax.model import decoder as decoder_lib
from llama_jax.objectives import next_token
from llama_jax.parallel import hosts, mesh
from llama_jax.training import curves, flops, lock
from llama_jax.training import metrics as metrics_lib
from llama_jax.training import optimizer as optimizer_lib
from llama_jax.training import state as state_lib
from llama_jax.training import step as step_lib

TOO_MANY_SKIPPED = 3


@dataclasses.dataclass(frozen=True)
class Run:
  """All that a step needs but its state.

  Attributes:
    asked: the experiment.
    tokenizer: the model's.
    decoder: the model.
    devices: the mesh.
    ramp: batch sizes by step.
    batches: data by step.
    heldout: domain -> rows to evaluate on.
    shapes, placed: of the state: ShapeDtypeStructs, and NamedShardings.
    first: () -> state 0.
    update: the compiled step.
    rate: step -> learning rate.
  """

  asked: experiment.Experiment
  tokenizer: Any
  decoder: decoder_lib.Decoder
  devices: jax.sharding.Mesh
  ramp: ramp_lib.Ramp
  batches: batches_lib.Batches
  heldout: dict[str, Any]
  shapes: state_lib.TrainState
  placed: state_lib.TrainState
  first: Any
  update: Any
  rate: Any

  def put(self, step: int, batch: dict[str, np.ndarray]):
    """A host's part of batch `step` as [A, B, ...] on the mesh."""
    parts = self.ramp.at(step).stage.accumulation
    batch = {
      name: rows.reshape(parts, -1, *rows.shape[1:])
      for name, rows in batch.items()
    }
    return hosts.put_batch(batch, self.devices, axis=1)

  def local(self, step: int) -> slice:
    """Rows of batch `step` that this host reads."""
    return hosts.local_rows(self.ramp.at(step).stage.batch_size)

  def position(self, step: int) -> dict[str, Any]:
    """Where the data stands before a step, for its checkpoint."""
    place = self.ramp.at(step)
    return {
      "step": step,
      "tokens": place.tokens,
      "row": place.row,
      "row_length": self.ramp.row_length,
      "rows": self.batches.sizes,
      "seed": self.asked.data.seed,
    }


def set_up(asked: experiment.Experiment, folder: pathlib.Path) -> Run:
  """Model, data and step of an experiment; nothing is written."""
  # The model and its words.
  config, tokenizer = experiment.choose_model(asked, folder)
  devices = mesh.make(asked.parallel)
  dtype = asked.model.dtype
  decoder = decoder_lib.Decoder(
    config,
    dtype=hosts.fastest_dtype() if dtype == "auto" else dtype,
    attention=asked.model.attention,
    rematerialise=asked.model.rematerialise,
  )

  # The data: which rows step n reads follows from n alone.
  if asked.data.prepared:
    prepared = prepared_lib.read(asked.data.prepared)
    ramp = experiment.make_ramp(asked, prepared.row_length)
    experiment.check(asked, config, tokenizer, ramp, devices.size)
    rows, heldout = prepared.sources, prepared.heldout
  else:
    ramp = experiment.make_ramp(asked, None)
    experiment.check(asked, config, tokenizer, ramp, devices.size)
    packed, unseen = batches_lib.pack_text(
      asked.data, tokenizer, ramp.row_length
    )
    rows, heldout = {"text": packed}, {"text": unseen} if unseen else {}
  batches = batches_lib.Batches(rows, asked.data, ramp)

  # The step.
  optimizer = optimizer_lib.make(asked.optimizer)
  shapes, placed = state_lib.shardings(
    functools.partial(decoder_lib.init, decoder), optimizer, devices
  )
  loss_sum = functools.partial(_loss_sum, decoder, asked.training.z_loss)
  update = jax.jit(
    step_lib.make(
      next_token.make(loss_sum, len(rows)),
      optimizer,
      asked.training.spike_factor,
      asked.metrics.layer_norms,
    ),
    # Every host reads the metrics.
    out_shardings=(placed, jax.NamedSharding(devices, jax.P())),
    donate_argnums=0,
  )
  return Run(
    asked=asked,
    tokenizer=tokenizer,
    decoder=decoder,
    devices=devices,
    ramp=ramp,
    batches=batches,
    heldout=heldout,
    shapes=shapes,
    placed=placed,
    first=functools.partial(_first_state, asked, decoder, optimizer, placed),
    update=update,
    rate=experiment.rates(asked, ramp),
  )


def _loss_sum(decoder, z_loss, params, *args):
  return decoder.apply({"params": params}, *args, z_loss, method="loss_sum")


def _first_state(asked, decoder, optimizer, placed):
  """State 0: params of init or fresh ones, in float32, on the mesh."""
  params = None
  if asked.init:
    params = checkpoint.load(asked.init, "--config.init", placed.params).params

  def make(params):
    if params is None:
      key = jax.random.key(asked.training.seed)
      params = nn.unbox(decoder_lib.init(decoder, key))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    params = decoder_lib.grow_vocabulary(params, decoder.config.vocab_size)
    return state_lib.create(params, optimizer)

  return jax.jit(make, out_shardings=placed, donate_argnums=0)(params)


def train(
  asked: experiment.Experiment,
  folder: pathlib.Path,
  shown: str,
  profile: range = range(0),
) -> int:
  """Runs or resumes an experiment in its folder; returns an exit code.

  Args:
    asked: what to do.
    folder: the run's.
    shown: what is kept as config.json, see experiment.describe.
    profile: steps to trace.
  """
  with contextlib.ExitStack() as stack:
    first = jax.process_index() == 0
    held = None
    if first and folder.is_dir():
      held = stack.enter_context(lock.hold(folder))
    run = set_up(asked, folder)
    config = run.decoder.config

    # The run's folder. A float32 state is params and two moments.
    atomic.check_free(folder, 12 * decoder_lib.count_parameters(config))
    if first:
      held = held or stack.enter_context(lock.hold(folder))
      store.write_model(folder, config, run.tokenizer)
      atomic.write_text(folder / "config.json", shown + "\n")

    stack.enter_context(jax.set_mesh(run.devices))
    keep = asked.checkpoint
    checkpoints = stack.enter_context(
      steps.Checkpoints(folder, keep.keep, keep.keep_every, keep.pinned)
    )
    state = restore(run, checkpoints) or run.first()
    start = int(state.step)
    _describe(run, start, folder)
    return _loop(run, state, start, checkpoints, held, folder, profile)


def _loop(
  run: Run, state, start: int, checkpoints, held, folder, profile
) -> int:
  """The steps that are left; returns an exit code."""
  asked, training = run.asked, run.asked.training
  evaluate = evals.make(
    asked.evaluation,
    run.decoder,
    run.tokenizer,
    run.heldout,
    run.devices,
    sequence_length=run.ramp.row_length,
    separate=asked.data.separate_documents,
  )
  metrics = metrics_lib.Metrics(
    folder,
    start,
    training.steps,
    asked.metrics,
    sources=run.batches.mixture.names,
    flops=functools.partial(flops.per_token, run.decoder.config),
    peak_flops=flops.peak(run.devices),
  )
  saved = start if checkpoints.latest() == start else None
  wanted = range(start, training.steps)
  reading = batches_lib.read_ahead(
    run.batches, wanted, run.local, asked.data.workers
  )
  skipped_in_row = None
  with (
    contextlib.closing(metrics),
    contextlib.closing(reading),
    _Signals() as signals,
  ):
    for step, batch in zip(wanted, reading, strict=True):
      if step == profile.start and profile:
        jax.profiler.start_trace(str(folder / "profile"))
      rate = run.rate(step)
      before = skipped_in_row
      state, values = run.update(state, run.put(step, batch), np.float32(rate))
      skipped_in_row = values["skipped_in_row"]
      place = run.ramp.at(step)
      metrics.add(
        step + 1,
        values,
        {
          "learning_rate": rate,
          "tokens_seen": place.tokens + place.stage.tokens,
          "batch_size": place.stage.batch_size,
          "sequence_length": place.stage.sequence_length,
          "attention_length": flops.attention_length(batch["segments"]),
          **{
            f"epochs/{name}": passes
            for name, passes in run.batches.epochs(step + 1).items()
          },
        },
      )
      if step + 1 == profile.stop and profile:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
      stopping = signals.received is not None
      # A step late, so that the next is on its way when this one is judged.
      failing = before is not None and int(before) >= training.max_skipped
      if asked.evaluation.due(step + 1, training.steps) and not stopping:
        with metrics.aside():
          metrics.attach(evaluate(state.params))
      checkpoints.check()
      if held is not None:
        held.check()
      due = (step + 1) % asked.checkpoint.every == 0
      if stopping or failing or due or step + 1 == training.steps:
        metrics.flush()
        with metrics.aside():
          save(run, checkpoints, state, step + 1)
        saved = step + 1
      if failing:
        checkpoints.wait()
        return _give_up(run, step + 1, int(skipped_in_row), folder)
      if stopping:
        break
    metrics.flush()
    done = int(state.step)
    if saved != done:
      save(run, checkpoints, state, done)
    checkpoints.wait()
  if jax.process_index() == 0:
    curves.draw(folder)
  if signals.received is not None and done < training.steps:
    print(
      f"stopped and saved at step {done} of {training.steps};"
      " the same command goes on from there.",
      file=sys.stderr,
    )
    return 128 + signals.received
  print(
    f"done: step {done}, checkpoint orbax:{folder},"
    f" curves {folder / 'curves.png'}"
  )
  return 0


def _give_up(run: Run, done: int, in_row: int, folder: pathlib.Path) -> int:
  """Tells what was in the batches that were left out, and how to look again.

  done: updates tried; the last in_row of them were left out.
  """
  first = done - in_row
  place = folder / "skipped" / f"{first + 1}-{done}"
  place.mkdir(parents=True, exist_ok=True)
  told = {step + 1: run.batches.documents(step) for step in range(first, done)}
  atomic.write_text(place / "documents.json", json.dumps(told, indent=1))
  np.savez(place / f"batch-{first + 1}.npz", **run.batches.get(first))
  words = [*_without(sys.argv, "replay"), f"--replay={first + 1}"]
  print(
    f"error: {in_row} steps in a row were left out, {first + 1} to {done}: not"
    " finite, or far above the usual loss or gradient. Params and moments are"
    f" those of step {first}, saved as step {done}; the batches' documents are"
    f" in {place}. To see the first of them again: python -m llama_jax.train"
    f" {' '.join(map(shlex.quote, words[1:]))}. The same command as before"
    " goes on with the batches after them.",
    file=sys.stderr,
  )
  return TOO_MANY_SKIPPED


def _without(words, name: str) -> list[str]:
  return [w for w in words if not w.lstrip("-").startswith(name)]


def replay(
  asked: experiment.Experiment, folder: pathlib.Path, step: int
) -> int:
  """Computes update number `step` again and prints its gradient's hash."""
  run = set_up(asked, folder)
  wanted = [s for s in steps.list_steps(folder / "checkpoints") if s < step]
  with jax.set_mesh(run.devices), _Signals() as signals:
    if wanted:
      # One that was pruned meanwhile, or is damaged, is an error of its own.
      state = restore(run, steps.Checkpoints(folder, reading=True), wanted[-1])
    else:
      state = run.first()
    start = int(state.step)
    for at in range(start, step):
      batch = run.put(at, run.batches.get(at, run.local(at)))
      state, values = run.update(state, batch, np.float32(run.rate(at)))
      if signals.received is not None:
        return 128 + signals.received
  told = {name: values[name].item() for name in ("loss", "grad_norm")}
  told = {"step": step, "from_checkpoint": start} | told
  told["gradient_hash"] = metrics_lib.hexadecimal(values["gradient_hash"])
  rows = metrics_lib.read(folder / "metrics.jsonl")
  logged = next((row for row in rows if row["step"] == step), None)
  if logged is not None:
    told["logged_hash"] = logged["gradient_hash"]
    told["same"] = told["gradient_hash"] == logged["gradient_hash"]
  print(json.dumps(told, indent=2))
  return 0 if told.get("same", True) else 1


class _Signals:
  """Notes Ctrl-C and SIGTERM, so that a step is never cut in two."""

  def __init__(self):
    self.received: int | None = None

  def __enter__(self) -> "_Signals":
    self._before = {
      number: signal.signal(number, self._note)
      for number in (signal.SIGINT, signal.SIGTERM)
    }
    return self

  def __exit__(self, *error) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number, frame) -> None:
    if self.received is not None:
      raise KeyboardInterrupt
    self.received = number


def save(run: Run, checkpoints: steps.Checkpoints, state, step: int) -> None:
  rest = {"opt_state": state.opt_state, "guard": state.guard}
  # The data's position is the number of updates tried, skipped ones too.
  checkpoints.save(step, state.params, rest, run.position(step))


def restore(
  run: Run,
  checkpoints: steps.Checkpoints,
  step: int | None = None,
):
  """The state of a step (None: the newest), or None where there is none.

  Raises:
    ConfigError: the config would go on with other data than the run's.
  """
  target = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    run.shapes,
    run.placed,
  )
  rest = {"opt_state": target.opt_state, "guard": target.guard}
  found = checkpoints.restore(target.params, rest, step)
  if found is None:
    return None
  here = run.position(found.step)
  # A new source may join; what the run has read must stay what it was.
  here["rows"] = {name: here["rows"].get(name) for name in found.meta["rows"]}
  for name, was in found.meta.items():
    if here.get(name) != was:
      raise errors.ConfigError(
        f"by step {found.step} this run had {name}={was}, but with this config"
        f" it would have {here.get(name)}: other data would follow. Keep its"
        " training.batch_size, training.ramp, data.sequence_length and data as"
        " they were (training.ramp changes them later on), or begin anew from"
        " its weights with --config.init=orbax:WORKDIR in"
        " another --workdir."
      )
  return state_lib.TrainState(
    step=jnp.int32(found.step), params=found.params, **found.rest
  )


def _describe(run: Run, start: int, folder: pathlib.Path) -> None:
  total = decoder_lib.count_parameters(run.decoder.config)
  axes = ", ".join(f"{name}={size}" for name, size in run.devices.shape.items())
  first = run.ramp.stages[0]
  rows = sum(run.batches.sizes.values())
  print(
    f"model      {total:,} parameters, compute in {run.decoder.dtype}\n"
    f"mesh       {axes} on {run.devices.size}"
    f" {run.devices.devices.flat[0].platform} device(s)\n"
    f"data       {rows:,} rows of {run.ramp.row_length} tokens in"
    f" {len(run.batches.sizes)} source(s); a batch has {first.batch_size} x"
    f" {first.sequence_length} tokens\n"
    f"run        steps {start} to {run.asked.training.steps} in {folder}",
    flush=True,
  )


def _steps(text: str | None, most: int) -> range:
  """START:STOP of --profile."""
  if not text:
    return range(0)
  start, _, stop = text.partition(":")
  if not (
    start.isdigit() and stop.isdigit() and int(start) < int(stop) <= most
  ):
    raise errors.UserError(
      f"--profile={text} must be START:STOP, two steps with 0 <= START < STOP"
      f" <= training.steps={most}."
    )
  return range(int(start), int(stop))


def main(argv) -> None:
  del argv
  if not _WORKDIR.value:
    raise errors.UserError("--workdir=DIR is needed: the run's folder.")
  folder = pathlib.Path(_WORKDIR.value).expanduser()
  config = _CONFIG.value
  if config is None and _REPLAY.value is not None:
    config = experiment.read_described(folder)
  if config is None:
    raise errors.UserError(
      "--config=FILE is needed: a recipe, such as configs/quickstart.py."
    )
  asked = experiment.read(config)
  if _REPLAY.value is not None:
    sys.exit(replay(asked, folder, _REPLAY.value))
  profile = _steps(_PROFILE.value, asked.training.steps)
  sys.exit(train(asked, folder, experiment.describe(config), profile))


if __name__ == "__main__":
  _CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.")
  _WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
  _PROFILE = flags.DEFINE_string(
    "profile", None, "START:STOP, steps to trace into WORKDIR/profile."
  )
  _REPLAY = flags.DEFINE_integer(
    "replay", None, "Compute this step again and print its gradient's hash.", 1
  )
  shell.run(main)
