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

if __name__ == "__main__":
  from llama_jax import huge_pages

  huge_pages.ask("llama_jax.train")

import contextlib
import functools
import json
import os
import pathlib
import shlex
import signal
import sys

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from llama_jax import errors, experiment, shell
from llama_jax import run as run_lib
from llama_jax.checkpoint import adapters, atomic, steps, store
from llama_jax.data import batches as batches_lib
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import lora as lora_lib
from llama_jax.training import curves, flops, lock
from llama_jax.training import metrics as metrics_lib

TOO_MANY_SKIPPED = 3


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
    profile: updates to trace.
  """
  with contextlib.ExitStack() as stack:
    first = jax.process_index() == 0
    held = None
    if first and folder.is_dir():
      held = stack.enter_context(lock.hold(folder))
    run = run_lib.set_up(asked, folder)
    config = run.decoder.config

    # The run's folder. A float32 state is params and two moments.
    trained = sum(leaf.size for leaf in jax.tree.leaves(run.shapes.params))
    atomic.check_free(folder, 12 * trained)
    if first:
      held = held or stack.enter_context(lock.hold(folder))
    stack.enter_context(jax.set_mesh(run.devices))
    keep = asked.checkpoint
    checkpoints = stack.enter_context(
      steps.Checkpoints(folder, keep.keep, keep.keep_every, keep.pinned)
    )
    state = run.restore(checkpoints)
    asked = run.asked
    if state is not None and int(state.step) > asked.training.steps:
      raise errors.ConfigError(
        f"training.steps={asked.training.steps}, but the run in {folder} is at"
        f" step {int(state.step)}; give that or more."
      )
    # Only now: what is refused leaves a run's folder as it was.
    if first:
      if state is None:
        store.write_model(folder, config, run.tokenizer)
        adapters.write(folder, asked.lora, run.base)
      atomic.write_text(folder / "config.json", shown + "\n")
    run.prepare(folder)
    state = run.first() if state is None else state
    start = int(state.step)
    _describe(run, start, folder)
    return _loop(run, state, start, checkpoints, held, folder, profile)


def _loop(
  run: run_lib.Run, state, start: int, checkpoints, held, folder, profile
) -> int:
  """The steps that are left; returns an exit code."""
  asked, training = run.asked, run.asked.training
  untrained = {}
  if asked.init and asked.evaluation.every and start == 0 < training.steps:
    for name, value in run.goal.evaluate(state.params).items():
      untrained[f"before/{name}"] = value
  metrics = metrics_lib.Metrics(
    folder,
    start,
    training.steps,
    asked.metrics,
    sources=run.batches.mixture.names,
    flops=functools.partial(
      flops.per_token, run.decoder.config, frozen=asked.lora is not None
    ),
    peak_flops=flops.peak(run.devices),
  )
  saved = start if checkpoints.latest() == start else None
  wanted = range(start, training.steps)
  reading = batches_lib.read_ahead(
    run.batches, wanted, run.local, asked.data.workers
  )
  skipped_in_row = np.int32(0)
  traced = _Trace(folder, profile, start, training.steps)
  with (
    contextlib.closing(metrics),
    contextlib.closing(reading),
    traced,
    _Signals() as signals,
  ):
    for step, batch in zip(wanted, reading, strict=True):
      traced.before(step)
      rate = run.rate(step)
      before = skipped_in_row
      state, values = run.update(
        state, run.put(step, batch), np.float32(rate), run.goal.frozen
      )
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
          **(untrained if step == 0 else {}),
        },
      )
      traced.after(step, state)
      stopping = signals.received is not None
      # The step before tells whether this one must be waited for.
      failing = (
        int(before) >= training.max_skipped - 1
        and int(skipped_in_row) >= training.max_skipped
      )
      if asked.evaluation.due(step + 1, training.steps) and not stopping:
        with metrics.aside():
          metrics.attach(run.goal.evaluate(state.params))
      checkpoints.check()
      if held is not None:
        held.check()
      due = asked.checkpoint.due(step + 1)
      if stopping or failing or due or step + 1 == training.steps:
        metrics.flush()
        with metrics.aside():
          run.save(checkpoints, state, step + 1)
        saved = step + 1
      if failing:
        checkpoints.wait()
        return _give_up(run, step + 1, int(skipped_in_row), folder)
      if stopping:
        break
    metrics.flush()
    done = int(state.step)
    if saved != done:
      run.save(checkpoints, state, done)
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


def _give_up(
  run: run_lib.Run, done: int, in_row: int, folder: pathlib.Path
) -> int:
  """Tells what was in the batches that were left out, and how to look again.

  done: updates tried; the last in_row of them were left out.
  """
  first = done - in_row
  if jax.process_index():
    return TOO_MANY_SKIPPED
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
  rows = metrics_lib.read(folder / "metrics.jsonl")
  most = rows[-1]["step"] if rows else asked.training.steps or sys.maxsize
  if step > most:
    raise errors.UserError(
      f"--replay={step}: the run in {folder} has made {most} steps; name one of"
      " them."
    )
  run = run_lib.set_up(asked, folder)
  wanted = [s for s in steps.list_steps(folder / "checkpoints") if s < step]
  with jax.set_mesh(run.devices), _Signals() as signals:
    if wanted:
      # One that was pruned meanwhile, or is damaged, is an error of its own.
      state = run.restore(steps.Checkpoints(folder, reading=True), wanted[-1])
    else:
      state = run.first()
    start = int(state.step)
    run.prepare(folder)
    for at in range(start, step):
      batch = run.put(at, run.batches.get(at, run.local(at)))
      state, values = run.update(
        state, batch, np.float32(run.rate(at)), run.goal.frozen
      )
      if signals.received is not None:
        return 128 + signals.received
  told = {name: values[name].item() for name in ("loss", "grad_norm")}
  told = {"step": step, "from_checkpoint": start} | told
  told["gradient_hash"] = metrics_lib.hexadecimal(values["gradient_hash"])
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
    # print may be what was interrupted.
    os.write(2, b"\nstopping: this step ends, then it is saved\n")


class _Trace:
  """Traces updates START to STOP, counted as in metrics.jsonl, of those made.

  wanted: range of them; start, stop: steps made before and after.
  """

  def __init__(self, folder, wanted: range, start: int, stop: int):
    self._folder = folder / "profile"
    self._on = False
    self._steps = range(max(wanted.start - 1, start), min(wanted.stop, stop))
    if wanted and not self._steps:
      print(
        f"note: --profile={wanted.start}:{wanted.stop} traces nothing: updates"
        f" {start + 1} to {stop} are made.",
        file=sys.stderr,
      )

  def __enter__(self) -> "_Trace":
    return self

  def __exit__(self, *error) -> None:
    if self._on:
      jax.profiler.stop_trace()

  def before(self, step: int) -> None:
    if self._steps and step == self._steps.start:
      jax.profiler.start_trace(str(self._folder))
      self._on = True

  def after(self, step: int, state) -> None:
    if self._on and step + 1 == self._steps.stop:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
      self._on = False


def _describe(run: run_lib.Run, start: int, folder: pathlib.Path) -> None:
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
    f" {first.sequence_length} tokens{_adapters(run)}\n"
    f"run        steps {start} to {run.asked.training.steps} in {folder}",
    flush=True,
  )


def _adapters(run: run_lib.Run) -> str:
  """A line on what a LoRA run trains and holds; nothing of another."""
  lora = run.asked.lora
  if lora is None:
    return ""
  trained = sum(leaf.size for leaf in jax.tree.leaves(run.shapes.params))
  held = lora_lib.account(run.decoder.config, lora)
  shown = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in held.items())
  return (
    f"\nadapters   {trained:,} parameters of rank {lora.rank} beside a base in"
    f" {lora.base_dtype}; MB in all: {shown}"
  )


def _steps(text: str | None, most: int) -> range:
  """START:STOP of --profile."""
  if not text:
    return range(0)
  start, _, stop = text.partition(":")
  numbers = start.isdigit() and stop.isdigit()
  if not numbers or not 1 <= int(start) <= int(stop) <= most:
    raise errors.UserError(
      f"--profile={text} must be START:STOP, updates from 1 to"
      f" training.steps={most}."
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
    if others := experiment.differences(config, folder):
      print(
        f"note: this is not the run's config: {', '.join(others)}. Without"
        " --config the run's own is taken.",
        file=sys.stderr,
      )
    sys.exit(replay(asked, folder, _REPLAY.value))
  profile = _steps(_PROFILE.value, asked.training.steps or sys.maxsize)
  sys.exit(train(asked, folder, experiment.describe(config), profile))


if __name__ == "__main__":
  _CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.")
  _WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
  _PROFILE = flags.DEFINE_string(
    "profile", None, "START:STOP, updates to trace into WORKDIR/profile."
  )
  _REPLAY = flags.DEFINE_integer(
    "replay", None, "Compute this step again and print its gradient's hash.", 1
  )
  shell.run(main)
