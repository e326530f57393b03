"""Trains: a config becomes a mesh, data, a model, a state, and a loop.

  python -m llama_jax.train --config=configs/quickstart.py --workdir=DIR \\
    [--config.optimizer.peak_lr=3e-4 ...] [--config.parallel.fsdp=4]

The same command again goes on where the run folder's newest checkpoint ends.
Ctrl-C or SIGTERM saves one more checkpoint and stops.
"""

import dataclasses
import functools
import json
import pathlib
import signal
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from llama_jax import checkpoint, errors, shell, text
from llama_jax.checkpoint import atomic, store
from llama_jax.data import batches
from llama_jax.model import config as config_lib
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes
from llama_jax.objectives import next_token
from llama_jax.parallel import hosts, mesh
from llama_jax.training import metrics as metrics_lib
from llama_jax.training import optimizer as optimizer_lib
from llama_jax.training import state as state_lib
from llama_jax.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Which model and how it computes.

  Attributes:
    size: a name of model/sizes.py, or "" where init says it.
    dtype: of computation, see model/decoder.py; "auto" is what the devices
      are fastest in. Params and optimizer are float32 whatever it is.
    attention, rematerialise: see model/decoder.py.
  """

  size: str
  dtype: str
  attention: str
  rematerialise: str


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """How long and how much at once.

  Attributes:
    steps: updates in all.
    batch_size: rows of an update, over all devices and microbatches.
    accumulation: microbatches that an update is summed over.
    seed: of fresh params.
  """

  steps: int
  batch_size: int
  accumulation: int
  seed: int

  def __post_init__(self):
    for name in ("steps", "batch_size", "accumulation"):
      if getattr(self, name) < 1:
        raise errors.ConfigError(
          f"training.{name}={getattr(self, name)} must be 1 or more."
        )
    if self.batch_size % self.accumulation:
      raise errors.ConfigError(
        f"training.accumulation={self.accumulation} does not divide"
        f" training.batch_size={self.batch_size};"
        f" use one of {mesh.divisors(self.batch_size)}."
      )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save. every: steps between two; keep: how many stay."""

  every: int
  keep: int

  def __post_init__(self):
    for name in ("every", "keep"):
      if getattr(self, name) < 1:
        raise errors.ConfigError(
          f"checkpoint.{name}={getattr(self, name)} must be 1 or more."
        )


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A whole run. init: a checkpoint reference to start from, or None."""

  init: str | None
  model: ModelConfig
  parallel: mesh.ParallelConfig
  data: batches.DataConfig
  training: TrainingConfig
  optimizer: optimizer_lib.OptimizerConfig
  checkpoint: CheckpointConfig


def read_experiment(config) -> Experiment:
  """The dataclasses behind a ConfigDict; raises ConfigError."""
  sections = {
    field.name: field.type
    for field in dataclasses.fields(Experiment)
    if dataclasses.is_dataclass(field.type)
  }
  given = dict(config.items())
  unknown = sorted(set(given) - set(sections) - {"init"})
  missing = sorted(set(sections) - set(given))
  if unknown or missing:
    raise errors.ConfigError(
      f"the config has unknown sections {unknown} and lacks {missing};"
      f" it takes init, {', '.join(sections)}."
    )
  return Experiment(
    init=given.get("init") or None,
    **{
      name: shell.section(cls, given[name], name)
      for name, cls in sections.items()
    },
  )


def choose_model(
  experiment: Experiment, folder: pathlib.Path
) -> tuple[config_lib.LlamaConfig, object]:
  """The LlamaConfig and tokenizer: of the run so far, of init, or by name."""
  size, init = experiment.model.size, experiment.init
  place = experiment.data.tokenizer
  tokenizer = text.load_tokenizer(place) if place else None
  if (folder / "model.json").is_file():
    saved = f"orbax:{folder}"
    config = store.read_model_config(folder)
    tokenizer = tokenizer or store.read_model_tokenizer(folder)
  elif init:
    saved = init
    config = checkpoint.read_config(init, "--config.init")
    tokenizer = tokenizer or checkpoint.read_tokenizer(init, "--config.init")
  elif size:
    return sizes.get(size), _needed(tokenizer)
  else:
    raise errors.ConfigError(
      "there is no model: give --config.init=REF to go on from a checkpoint, or"
      f" --config.model.size, one of {', '.join(sizes.SIZES)}."
    )
  if size and sizes.get(size) != config:
    raise errors.ConfigError(
      f"--config.model.size={size} is not the size of {saved}; leave it empty."
    )
  return config, _needed(tokenizer)


def _needed(tokenizer):
  if tokenizer is None:
    raise errors.ConfigError(
      "there is no tokenizer: give --config.data.tokenizer=PATH."
    )
  return tokenizer


def check(experiment: Experiment, config, tokenizer, num_devices: int) -> None:
  """Refuses, before any compile, what cannot work together."""
  training = experiment.training
  parallel = experiment.parallel.resolve(num_devices)
  rows = training.batch_size // training.accumulation
  mesh.check(
    parallel,
    {
      "tensor": {
        "model.num_kv_heads": config.num_kv_heads,
        "model.num_heads": config.num_heads,
        "model.mlp_dim": config.mlp_dim,
        "model.vocab_size": config.vocab_size,
      },
      "fsdp": {"model.embed_dim": config.embed_dim},
      "batch": {"training.batch_size / training.accumulation": rows},
    },
  )
  if tokenizer.vocab_size > config.vocab_size:
    raise errors.ConfigError(
      f"the tokenizer has {tokenizer.vocab_size} words and the model"
      f" {config.vocab_size}; give the model's own with"
      " --config.data.tokenizer=PATH."
    )
  if experiment.data.sequence_length > config.context_length:
    raise errors.ConfigError(
      f"data.sequence_length={experiment.data.sequence_length} is longer than"
      f" the model's context of {config.context_length}; use that or less."
    )


def first_state(experiment: Experiment, decoder, optimizer, placed):
  """State 0: params of init or fresh ones, in float32, on the mesh."""
  if experiment.init:
    params = checkpoint.load(
      experiment.init, "--config.init", placed.params
    ).params
  else:
    params = None

  def make(params):
    if params is None:
      key = jax.random.key(experiment.training.seed)
      params = nn.unbox(decoder_lib.init(decoder, key))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    return state_lib.create(params, optimizer)

  return jax.jit(make, out_shardings=placed, donate_argnums=0)(params)


class Signals:
  """Notes Ctrl-C and SIGTERM, so that a step is never cut in two."""

  def __init__(self):
    self.received: int | None = None

  def __enter__(self) -> "Signals":
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


def train(experiment: Experiment, folder: pathlib.Path, shown: str) -> int:
  """Runs or resumes an experiment in its folder; returns an exit code.

  Args:
    experiment: what to do.
    folder: the run's.
    shown: the resolved config as JSON, kept as config.json.
  """
  # The model and its words.
  config, tokenizer = choose_model(experiment, folder)
  check(experiment, config, tokenizer, jax.device_count())
  devices = mesh.make(experiment.parallel)
  dtype = experiment.model.dtype
  decoder = decoder_lib.Decoder(
    config,
    dtype=hosts.fastest_dtype() if dtype == "auto" else dtype,
    attention=experiment.model.attention,
    rematerialise=experiment.model.rematerialise,
  )

  # The data: which rows step n reads follows from n alone.
  training = experiment.training
  rows = batches.load_rows(experiment.data, tokenizer)
  source = batches.Batches(rows, training.batch_size, experiment.data.seed)

  # The run's folder. A float32 state is params and two moments.
  atomic.check_free(folder, 12 * decoder_lib.count_parameters(config))
  folder.mkdir(parents=True, exist_ok=True)
  store.write_model(folder, config, tokenizer)
  atomic.write_text(folder / "config.json", shown + "\n")

  optimizer = optimizer_lib.make(experiment.optimizer, training.steps)
  schedule = optimizer_lib.schedule(experiment.optimizer, training.steps)
  with (
    jax.set_mesh(devices),
    store.Checkpoints(folder, experiment.checkpoint.keep) as checkpoints,
  ):
    # The state: the newest checkpoint's, or the first.
    shapes, placed = state_lib.shardings(
      functools.partial(decoder_lib.init, decoder), optimizer, devices
    )
    done = checkpoints.latest()
    if done is None:
      state = first_state(experiment, decoder, optimizer, placed)
    else:
      state = restore(checkpoints, done, shapes, placed)
    start = int(state.step)
    _describe(decoder, devices, rows, experiment, start, folder)

    # The update.
    loss_sum = functools.partial(_loss_sum, decoder)
    update = jax.jit(
      step_lib.make(next_token.make(loss_sum), optimizer, schedule),
      out_shardings=(placed, None),
      donate_argnums=0,
    )

    # The loop.
    metrics = metrics_lib.Metrics(folder, start, training.steps)
    saved = done
    local = hosts.local_rows(training.batch_size)
    try:
      with Signals() as signals:
        for step in range(start, training.steps):
          batch = source.get(step, local)
          batch = {
            name: rows.reshape(training.accumulation, -1, *rows.shape[1:])
            for name, rows in batch.items()
          }
          state, values = update(state, hosts.put_batch(batch, devices, axis=1))
          metrics.add(step + 1, values)
          stopping = signals.received is not None
          if stopping or (step + 1) % experiment.checkpoint.every == 0:
            metrics.flush()
            save(checkpoints, state, step + 1)
            saved = step + 1
          if stopping:
            break
        metrics.flush()
        if saved != int(state.step):
          save(checkpoints, state, int(state.step))
        checkpoints.wait()
    finally:
      metrics.close()
    metrics_lib.draw(folder)
    if signals.received is not None and int(state.step) < training.steps:
      print(
        f"stopped and saved at step {int(state.step)} of {training.steps};"
        " the same command goes on from there.",
        file=sys.stderr,
      )
      return 128 + signals.received
    print(
      f"done: step {int(state.step)}, checkpoint orbax:{folder},"
      f" curves {folder / 'curves.png'}"
    )
    return 0


def _loss_sum(decoder, params, *args):
  return decoder.apply({"params": params}, *args, method="loss_sum")


def save(checkpoints: store.Checkpoints, state, step: int) -> None:
  rest = {"opt_state": state.opt_state, "skipped": state.skipped}
  # The data's position is the number of updates tried, skipped ones too.
  checkpoints.save(step, state.params, rest, {"step": step})


def restore(checkpoints: store.Checkpoints, step: int, shapes, placed):
  """The state of a step, each array on its shards."""
  target = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
    placed,
  )
  rest = {"opt_state": target.opt_state, "skipped": target.skipped}
  params, rest, meta = checkpoints.restore(step, target.params, rest)
  return state_lib.TrainState(
    step=jnp.int32(meta["step"]), params=params, **rest
  )


def _describe(decoder, devices, rows, experiment, start, folder) -> None:
  total = decoder_lib.count_parameters(decoder.config)
  axes = ", ".join(f"{name}={size}" for name, size in devices.shape.items())
  training, data = experiment.training, experiment.data
  print(
    f"model      {total:,} parameters, compute in {decoder.dtype}\n"
    f"mesh       {axes} on {devices.size} {devices.devices.flat[0].platform}"
    " device(s)\n"
    f"data       {len(rows):,} rows of {data.sequence_length} tokens; a batch"
    f" has {training.batch_size}\n"
    f"run        steps {start} to {training.steps} in {folder}",
    flush=True,
  )


def main(argv) -> None:
  del argv
  if not _WORKDIR.value:
    raise errors.UserError("--workdir=DIR is needed: the run's folder.")
  config = _CONFIG.value
  if config is None:
    raise errors.UserError(
      "--config=FILE is needed: a recipe, such as configs/quickstart.py."
    )
  shown = json.dumps(config.to_dict(), indent=2, default=str)
  folder = pathlib.Path(_WORKDIR.value).expanduser()
  code = train(read_experiment(config), folder, shown)
  sys.exit(code)


if __name__ == "__main__":
  _CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.")
  _WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
  shell.run(main)
