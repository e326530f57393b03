"""An experiment's objective joined to its model and its data.

What is minimised knows no model, and what measures knows no config: this is
where they meet. Predicting the next token needs nothing beside the rows; those
of preferences may need what a reference thinks of them.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import checkpoint, compatibility, errors, evals, experiment
from llama_jax.checkpoint import atomic
from llama_jax.data import batches as batches_lib
from llama_jax.data import packing
from llama_jax.decoding import placement
from llama_jax.kernels import divergence
from llama_jax.objectives import distill, dpo, next_token, reward
from llama_jax.training import step as step_lib

# In a run's folder.
REFERENCE, TEACHER = "reference.npz", "teacher.npz"

Rows = Sequence[dict[str, Any]]


def formatting(asked: experiment.Experiment) -> bool:
  """Whether the tokens around an answer are trained with it."""
  return not getattr(asked.objective, "mask_formatting", False)


def head(asked: experiment.Experiment) -> str:
  """The LlamaConfig.head of the model that the objective trains."""
  return "scalar" if isinstance(asked.objective, reward.Reward) else "words"


def in_epochs(
  asked: experiment.Experiment, sizes: Mapping[str, int]
) -> experiment.Experiment:
  """The same with training.steps, where training.epochs was given.

  In a mixture an epoch ends when the first source is used up: no row is seen
  more often than there are epochs.

  sizes: rows to train on, by source.
  """
  training = asked.training
  if not training.epochs:
    return asked
  _, weights = asked.data.mixtures()[0]
  total = sum(weights.values())
  used_up = [
    sizes[name] * total / weight
    for name, weight in weights.items()
    if weight and name in sizes
  ]
  rows = min(used_up, default=sum(sizes.values()))
  steps = max(1, round(training.epochs * rows / training.batch_size))
  return dataclasses.replace(
    asked, training=dataclasses.replace(training, epochs=0.0, steps=steps)
  )


class Goal:
  """What a run minimises and measures.

  Attributes:
    objective: see objectives/__init__.py.
    frozen: what it reads and nothing trains; `prepare` fills it.
  """

  def __init__(
    self,
    asked: experiment.Experiment,
    decoder,
    tokenizer,
    devices: jax.sharding.Mesh,
    rows: Mapping[str, Rows],
    heldout: Mapping[str, Rows],
    row_length: int,
    join: Callable | None,
  ):
    """join: (frozen base, adapters) -> the decoder's params, of a LoRA run."""
    self._asked, self._decoder, self._devices = asked, decoder, devices
    self._heldout = heldout
    self._join = join
    self.objective = _make(asked, decoder, len(rows))
    if join is not None:
      self.objective = _of_adapters(join, self.objective)
    self.frozen: dict[str, Any] = {}
    pairs = asked.data.form == batches_lib.PREFERENCES
    self._tasks = self._measure = None
    if head(asked) == "words":
      self._tasks = evals.make(
        asked.evaluation,
        decoder,
        tokenizer,
        {} if pairs else heldout,
        devices,
        sequence_length=row_length,
        separate=asked.data.separate_documents,
      )
    if pairs:
      self._measure = self._everywhere(self.objective)

  def evaluate(self, params) -> dict[str, float | np.ndarray]:
    """Measures by name, for the loop to call under jax.set_mesh."""
    found: dict[str, float | np.ndarray] = {}
    if self._tasks:
      whole = params
      if self._join is not None:
        whole = self._join(self.frozen["base"], params)
      found = self._tasks(whole)
    if self._measure is None:
      return found
    total = None
    for rows in self._measured():
      for _, batch in self._batches(rows):
        one = self._measure(params, batch, self.frozen)
        total = one if total is None else jax.tree.map(jnp.add, total, one)
    return found | (_tell(total) if total is not None else {})

  def _measured(self) -> list[Rows]:
    """Held-out rows of each source, those that are measured on."""
    asked = self._asked.evaluation
    most = asked.rows if asked.every else 0
    return [rows[:most] for rows in self._heldout.values()]

  def prepare(self, folder: pathlib.Path, drawn: Rows, base) -> None:
    """Gets the second model's params, or what it says of the rows.

    Args:
      folder: the run's.
      drawn: what the run reads to train on.
      base: a LoRA run's frozen params, its reference too; or None.
    """
    if base is not None:
      self.frozen["base"] = base
    objective = self._asked.objective
    if isinstance(objective, distill.Distill):
      if not objective.top_k:
        self.frozen["teacher"] = self._load(
          objective.teacher, compatibility.TEACHER_KNOB
        )
        return
      rows = list(drawn)
      told = self._told(folder / TEACHER, rows, self._ask_teacher)
    elif getattr(objective, "reference", "") == dpo.LIVE:
      self.frozen["reference"] = self._reference()
      return
    elif getattr(objective, "reference", "") == dpo.CACHED:
      rows = [*drawn, *(row for one in self._measured() for row in one)]
      told = self._told(folder / REFERENCE, rows, self._ask_reference)
    else:
      return
    for index, row in enumerate(rows):
      row.setdefault("extra", {}).update({n: a[index] for n, a in told.items()})

  def _reference(self):
    """What the params were at first: config.init's, or a LoRA run's base."""
    base = self.frozen.get("base")
    return base or self._load(self._asked.init, "--config.init")

  def _load(self, reference: str, knob: str):
    """Params in the compute dtype, on the mesh."""
    config = checkpoint.read_config(reference, knob)
    placed = placement.shardings(config, self._devices)
    params = checkpoint.load(reference, knob, placed).params
    dtype = self._decoder.dtype
    # float8 is how products are formed, not how weights are kept.
    dtype = jnp.dtype("bfloat16" if dtype == "float8" else dtype)
    cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(dtype))
    return jax.jit(cast, out_shardings=placed, donate_argnums=0)(params)

  def _told(self, file, rows: Rows, ask) -> dict[str, np.ndarray]:
    """What another model says of rows, computed once."""
    objective = dataclasses.asdict(self._asked.objective)
    about = [self._asked.init, self._decoder.dtype, objective]
    if self._asked.lora:
      about.append(dataclasses.asdict(self._asked.lora))
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for row in rows:
      digest.update(row["tokens"].tobytes() + row["segments"].tobytes())
    found = _kept(file, digest.hexdigest(), len(rows))
    if found is None:
      print(f"{file.stem:<10} reads {len(rows):,} rows", flush=True)
      parts = list(ask(rows))
      found = {n: np.concatenate([one[n] for one in parts]) for n in parts[0]}
      if jax.process_index() == 0:
        _keep(file, digest.hexdigest(), found)
    return found

  def _ask_reference(self, rows: Rows) -> Iterator[dict[str, np.ndarray]]:
    """Log-probabilities of the segments of rows: reference, [rows, S]."""
    token_nll = functools.partial(_apply, self._decoder, "token_nll")
    score = self._everywhere(functools.partial(dpo.answer_logprobs, token_nll))
    params = self._reference()
    for count, batch in self._batches(rows):
      yield {"reference": jax.device_get(score(params, batch))[:count]}

  def _ask_teacher(self, rows: Rows) -> Iterator[dict[str, np.ndarray]]:
    """What divergence.Top holds, by its fields' names."""
    objective = self._asked.objective
    decoder = _teacher(self._asked, self._decoder)

    def likeliest(params, batch):
      states = _apply(decoder, "states", params, *_inputs(batch))
      return divergence.top(states, objective.top_k, objective.temperature)

    likeliest = self._everywhere(likeliest)
    params = self._load(objective.teacher, compatibility.TEACHER_KNOB)
    for count, batch in self._batches(rows):
      found = jax.device_get(likeliest(params, batch))
      yield {n: a[:count] for n, a in found._asdict().items()}

  def _everywhere(self, function):
    """Compiled so that every host has the whole result."""
    whole = jax.NamedSharding(self._devices, jax.P())
    return jax.jit(function, out_shardings=whole)

  def _batches(self, rows: Rows) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(rows in it, arrays [size, ...]) of whole batches.

    The last is filled with rows of zeros: padding, without any pair.
    """
    training = self._asked.training
    size = training.batch_size // training.accumulation
    for start in range(0, len(rows), size):
      part = rows[start : start + size]
      length = len(part[0]["tokens"]) - 1
      separate = self._asked.data.separate_documents
      each = [
        packing.inputs(row, 0, length, separate) | row.get("extra", {})
        for row in part
      ]
      batch = {name: np.stack([one[name] for one in each]) for name in each[0]}
      more = size - len(part)
      yield (
        len(part),
        {
          name: np.pad(a, [(0, more), *[(0, 0)] * (a.ndim - 1)])
          for name, a in batch.items()
        },
      )


def _apply(decoder, method, params, *args):
  return decoder.apply({"params": params}, *args, method=method)


def _inputs(batch):
  return batch["tokens"], batch["positions"], batch["segments"]


def _teacher(asked: experiment.Experiment, decoder):
  config = checkpoint.read_config(
    asked.objective.teacher, compatibility.TEACHER_KNOB
  )
  return decoder.clone(config=config)


def _make(asked: experiment.Experiment, decoder, num_sources: int) -> Callable:
  objective = asked.objective
  # Of a conversation the answers alone are trained.
  sparse = asked.data.form != batches_lib.DOCUMENTS
  if isinstance(objective, reward.Reward):
    rewards = functools.partial(_apply, decoder, "rewards")
    return reward.make(objective, rewards)
  if isinstance(objective, dpo.DPO):
    token_nll = functools.partial(_apply, decoder, "token_nll")
    return dpo.make(objective, token_nll)
  if isinstance(objective, distill.Distill):
    student = functools.partial(_apply, decoder, "states")
    if objective.top_k:

      def teacher(frozen, batch):
        del frozen
        return divergence.Top(*(batch[n] for n in divergence.Top._fields))

    else:
      there = _teacher(asked, decoder)

      def teacher(frozen, batch):
        return _apply(there, "states", frozen["teacher"], *_inputs(batch))

    return distill.make(
      objective,
      student,
      teacher,
      functools.partial(divergence.loss_sum, sparse=sparse),
      num_sources,
    )

  def loss_sum(params, *args):
    z_loss = asked.training.z_loss
    return _apply(decoder, "loss_sum", params, *args, z_loss, sparse)

  return next_token.make(loss_sum, num_sources)


def _of_adapters(join: Callable, objective: Callable) -> Callable:
  """An objective of whole params as one of adapters beside a frozen base."""

  def joined(adapters, batch, frozen):
    return objective(join(frozen["base"], adapters), batch, frozen)

  return joined


def _tell(total) -> dict[str, np.ndarray]:
  """heldout_loss and heldout/NAME of an objective's sums."""
  loss, (count, sums) = total
  told = {"heldout_loss": loss / jnp.maximum(count, 1)}
  for name, value in step_lib.tell(sums).items():
    told[f"heldout/{name}"] = value
  return jax.device_get(told)


def _kept(file: pathlib.Path, digest: str, rows: int):
  if not file.is_file():
    return None
  try:
    with np.load(file) as kept:
      if str(kept["of"]) != digest:
        return None
      found = {name: kept[name] for name in kept.files if name != "of"}
  except (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    raise errors.BadFileError(
      f"{file}: not what a run keeps there ({error}); remove it, and it is"
      " computed again."
    ) from error
  return found if all(len(a) == rows for a in found.values()) else None


def _keep(file: pathlib.Path, digest: str, arrays) -> None:
  part = file.with_name(f".{file.name}.part.npz")
  np.savez(part, of=digest, **arrays)
  atomic.flush(part)
  part.replace(file)
