"""What a training config means: its sections, checked."""

import collections
import dataclasses
import json
import math
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

from llama_jax import errors, shell
from llama_jax.data import batches
from llama_jax.data import ramp as ramp_lib
from llama_jax.evals import settings as evals_settings
from llama_jax.model import lora as lora_lib
from llama_jax.objectives import OBJECTIVES, next_token
from llama_jax.parallel import mesh
from llama_jax.training import metrics, schedule
from llama_jax.training import optimizer as optimizer_lib

# What a config without an objective asks for.
_PLAIN = next_token.NextToken()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Which model and how it computes.

  Attributes:
    size: a name of model/sizes.py, or "" where init says it.
    dtype: of computation, see model/decoder.py; "auto" is what the devices
      are fastest in. Params and optimizer are float32 whatever it is.
    attention, rematerialise: see model/decoder.py.
    vocab_size, rope_theta, context_length: what init's become, as Code Llama
      changes Llama 2's; 0 leaves them.
  """

  size: str
  dtype: str
  attention: str
  rematerialise: str
  vocab_size: int
  rope_theta: float
  context_length: int


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """How long, how much at once, and what is not put up with.

  Attributes:
    steps: updates in all; or 0, where epochs says it.
    batch_size: sequences of an update, over all devices and microbatches.
    accumulation: microbatches that an update is summed over.
    ramp: what batch_size, sequence_length and accumulation grow to: dicts of
      those three and from_tokens, see data/ramp.py.
    z_loss: weight of log(Z)^2 beside each token's loss (arXiv:2204.02311).
    spike_factor: a step whose loss or gradient norm is so many times its
      trailing mean is left out; 0 leaves out only what is not finite.
    max_skipped: steps left out in a row that stop the run.
    seed: of fresh params.
    epochs: passes over data.text instead of steps, or 0.
  """

  steps: int
  batch_size: int
  accumulation: int
  ramp: tuple[dict[str, int], ...]
  z_loss: float
  spike_factor: float
  max_skipped: int
  seed: int
  epochs: float = 0.0

  def __post_init__(self):
    if self.epochs and (self.steps or not 0 < self.epochs < float("inf")):
      raise errors.ConfigError(
        f"training.epochs={self.epochs} and training.steps={self.steps}: give"
        " one of them, above 0, and leave the other 0."
      )
    names = ("batch_size", "accumulation", "max_skipped")
    for name in names if self.epochs else ("steps", *names):
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
    if not 0 <= self.z_loss < float("inf"):
      raise errors.ConfigError(
        f"training.z_loss={self.z_loss} must be 0 or more; 1e-4 is usual."
      )
    if self.spike_factor and not self.spike_factor > 1:
      raise errors.ConfigError(
        f"training.spike_factor={self.spike_factor} must be above 1, or 0 for"
        " none."
      )
    if not 0 <= self.seed < 2**32:
      raise errors.ConfigError(
        f"training.seed={self.seed} must be from 0 to 2^32 - 1."
      )
    names = {field.name for field in dataclasses.fields(ramp_lib.Stage)}
    for stage in self.ramp:
      if not hasattr(stage, "keys") or set(stage) != names:
        raise errors.ConfigError(
          f"training.ramp: {stage!r} is no stage; it needs {sorted(names)}."
        )
      ramp_lib.Stage(**stage)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save, and what stays.

  Attributes:
    every: steps between two.
    keep: the newest so many stay.
    keep_every: so does every step that it divides; 0 for none.
    pinned: and these steps.

  What is to stay is saved, whether or not `every` divides it.
  """

  every: int
  keep: int
  keep_every: int
  pinned: tuple[int, ...]

  def __post_init__(self):
    for name, least in (("every", 1), ("keep", 1), ("keep_every", 0)):
      if getattr(self, name) < least:
        raise errors.ConfigError(
          f"checkpoint.{name}={getattr(self, name)} must be {least} or more."
        )
    right = isinstance(self.pinned, (tuple, list)) and all(
      type(step) is int and step >= 0 for step in self.pinned
    )
    if not right:
      raise errors.ConfigError(
        f"checkpoint.pinned={self.pinned!r} must be steps, such as"
        " (1000, 2000)."
      )

  def due(self, step: int) -> bool:
    """Whether to save after update number `step`."""
    kept = self.keep_every and step % self.keep_every == 0
    return bool(step % self.every == 0 or kept or step in self.pinned)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A whole run.

  Attributes:
    init: a checkpoint reference to start from, or None.
    objective: one of objectives.OBJECTIVES; a config without this section
      predicts the next token.
    lora: what is trained in place of the whole model, or None, as in a config
      without this section.
  """

  init: str | None
  model: ModelConfig
  parallel: mesh.ParallelConfig
  data: batches.DataConfig
  training: TrainingConfig
  optimizer: optimizer_lib.OptimizerConfig
  checkpoint: CheckpointConfig
  evaluation: evals_settings.EvaluationConfig
  metrics: metrics.MetricsConfig
  objective: Any = _PLAIN
  lora: lora_lib.LoRA | None = None


def read(config) -> Experiment:
  """The dataclasses behind a ConfigDict; raises ConfigError."""
  sections = {
    field.name: field.type
    for field in dataclasses.fields(Experiment)
    if dataclasses.is_dataclass(field.type)
  }
  given = dict(config.items())
  objective = _objective(given.pop("objective", {"name": "next_token"}))
  lora = given.pop("lora", None)
  unknown = sorted(set(given) - set(sections) - {"init"})
  missing = sorted(set(sections) - set(given))
  if unknown or missing:
    raise errors.ConfigError(
      f"the config has unknown sections {unknown} and lacks {missing};"
      f" it takes init, objective, lora, {', '.join(sections)}."
    )
  return Experiment(
    init=given.get("init") or None,
    objective=objective,
    lora=None if lora is None else shell.section(lora_lib.LoRA, lora, "lora"),
    **{
      name: shell.section(cls, given[name], name)
      for name, cls in sections.items()
    },
  )


def _objective(values):
  """The dataclass of config.objective, by its name."""
  values = dict(values.items())
  name = values.pop("name", None)
  if name not in OBJECTIVES:
    raise errors.ConfigError(
      f"config.objective.name={name!r} is not known; use one of"
      f" {', '.join(OBJECTIVES)}."
    )
  return shell.section(OBJECTIVES[name], values, "objective")


def describe(config) -> str:
  """A ConfigDict and what made the run, as the JSON of config.json."""
  import importlib.metadata

  names = (
    "llama_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
  )
  made_by = {
    "git": _git("rev-parse", "HEAD"),
    "changed_files": len(_git("status", "--porcelain").splitlines()),
    "python": platform.python_version(),
    "versions": {name: importlib.metadata.version(name) for name in names},
    "devices": collections.Counter(
      device.device_kind for device in jax.devices()
    ),
    "command": sys.argv,
  }
  return json.dumps(
    config.to_dict() | {"made_by": made_by}, indent=2, default=str
  )


def read_described(folder: pathlib.Path):
  """The ConfigDict that `describe` wrote in a run's folder."""
  import ml_collections

  file = folder / "config.json"
  try:
    values = json.loads(file.read_text(encoding="utf-8"))
    values.pop("made_by", None)
    return ml_collections.ConfigDict(values)
  except (OSError, ValueError, AttributeError, TypeError) as error:
    raise errors.BadFileError(
      f"{file}: not the config of a run ({error}); give --config=FILE, or the"
      " --workdir of a run."
    ) from error


def differences(config, folder: pathlib.Path) -> list[str]:
  """Knobs of a ConfigDict that the run in a folder has otherwise, one a text.

  Of a folder without a run, nothing.
  """
  if not (folder / "config.json").is_file():
    return []
  given, was = (
    _knobs(json.loads(json.dumps(one.to_dict(), default=str)))
    for one in (config, read_described(folder))
  )
  return [
    f"{knob}={given.get(knob)!r} (the run has {was.get(knob)!r})"
    for knob in sorted(given.keys() | was.keys())
    if given.get(knob) != was.get(knob)
  ]


def _knobs(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Values by their dotted names."""
  found: dict[str, Any] = {}
  for name, value in section.items():
    if isinstance(value, dict):
      found |= _knobs(value, f"{prefix}{name}.")
    else:
      found[prefix + name] = value
  return found


def _git(*words: str) -> str:
  """What git says of the source this is; nothing where it is no clone."""
  here = pathlib.Path(__file__).parent
  try:
    done = subprocess.run(
      ["git", "-C", here, *words], capture_output=True, text=True, timeout=10
    )
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return done.stdout.strip() if not done.returncode else ""


def make_ramp(asked: Experiment, row_length: int | None) -> ramp_lib.Ramp:
  """Its batches by step; row_length of prepared data, None for data.text."""
  training, data = asked.training, asked.data
  first = ramp_lib.Stage(
    from_tokens=0,
    batch_size=training.batch_size,
    sequence_length=data.sequence_length,
    accumulation=training.accumulation,
  )
  stages = [first, *(ramp_lib.Stage(**stage) for stage in training.ramp)]
  longest = max(stage.sequence_length for stage in stages)
  if row_length is not None and row_length < longest:
    raise errors.ConfigError(
      f"data.sequence_length={longest} is longer than the rows of"
      f" {row_length} tokens in data.prepared={data.prepared}; prepare it with"
      f" row_length={longest}, or use {row_length} or less."
    )
  return ramp_lib.Ramp(stages, row_length or longest)


def rates(asked: Experiment, ramp: ramp_lib.Ramp):
  """Step (0 is the first) -> its learning rate."""
  shape, total = asked.optimizer, asked.training.steps
  warmup = math.ceil(shape.warmup_fraction * total)
  if warmup > shape.warmup_steps:
    shape = dataclasses.replace(shape, warmup_steps=warmup)
  ends = ramp.at(min(shape.warmup_steps, total)).tokens, ramp.at(total).tokens

  def rate(step: int) -> float:
    tokens = ramp.at(step).tokens
    return schedule.learning_rate(shape, step, tokens, *ends)

  return rate
