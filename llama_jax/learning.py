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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import checkpoint, errors, evals, experiment
from llama_jax.checkpoint import atomic
from llama_jax.data import batches as batches_lib
from llama_jax.data import packing
from llama_jax.objectives import dpo, next_token, reward
from llama_jax.training import step as step_lib

REFERENCE = "reference.npz"

Rows = Sequence[dict[str, Any]]


def check(asked: experiment.Experiment) -> None:
  """Refuses, before anything is read, what does not go together."""
  objective, data = asked.objective, asked.data
  pairs = isinstance(objective, dpo.DPO | reward.Reward)
  name = type(objective).__name__
  if pairs != (data.form == batches_lib.PREFERENCES):
    wanted = "preferences" if pairs else "documents or conversations"
    raise errors.ConfigError(
      f"data.form={data.form} does not go with this objective ({name}); use"
      f" {wanted}."
    )
  if pairs and asked.training.ramp:
    raise errors.ConfigError(
      "training.ramp cuts rows, and preferences are not cut; leave it empty."
    )
  if pairs and not asked.init:
    raise errors.ConfigError(
      f"this objective ({name}) begins from a model: give --config.init=REF."
    )
  if data.form != batches_lib.DOCUMENTS and not data.separate_documents:
    raise errors.ConfigError(
      f"data.separate_documents=False would let the {data.form} of a row see"
      " each other; use True."
    )
  if pairs and asked.evaluation.tasks and isinstance(objective, reward.Reward):
    raise errors.ConfigError(
      f"evaluation.tasks={','.join(asked.evaluation.tasks)} are for language"
      " models, and this trains a reward model; leave it empty."
    )
  if asked.training.epochs and data.prepared:
    raise errors.ConfigError(
      "training.epochs counts passes over data.text; with data.prepared give"
      " training.steps."
    )


def formatting(asked: experiment.Experiment) -> bool:
  """Whether the tokens around an answer are trained with it."""
  return not getattr(asked.objective, "mask_formatting", False)


def head(asked: experiment.Experiment) -> str:
  """The LlamaConfig.head of the model that the objective trains."""
  return "scalar" if isinstance(asked.objective, reward.Reward) else "words"


def in_epochs(asked: experiment.Experiment, rows: int) -> experiment.Experiment:
  """The same with training.steps, where training.epochs was given.

  rows: to train on.
  """
  training = asked.training
  if not training.epochs:
    return asked
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
  ):
    self._asked, self._decoder, self._devices = asked, decoder, devices
    self._rows, self._heldout = rows, heldout
    self.objective = _make(asked, decoder, len(rows))
    self.frozen: dict[str, Any] | None = None
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
      self._measure = jax.jit(
        self.objective, out_shardings=jax.NamedSharding(devices, jax.P())
      )

  def evaluate(self, params) -> dict[str, float]:
    """Measures by name, for the loop to call under jax.set_mesh."""
    found = self._tasks(params) if self._tasks else {}
    if self._measure is None:
      return found
    total = None
    for rows in self._heldout.values():
      for _, batch in self._batches(rows[: self._asked.evaluation.rows]):
        one = self._measure(params, batch, self.frozen)
        total = one if total is None else jax.tree.map(jnp.add, total, one)
    return found | (_tell(total) if total is not None else {})

  def prepare(
    self, folder: pathlib.Path, contents: Mapping[str, str], placed
  ) -> None:
    """What is needed of a reference: its params, or what it thinks of all rows.

    The latter is kept in the run's folder, so that a run that goes on needs
    the reference no more.

    Args:
      folder: the run's.
      contents: what tells the data from other data.
      placed: shardings of params.
    """
    wanted = getattr(self._asked.objective, "reference", None)
    if wanted == dpo.LIVE:
      self.frozen = {"reference": self._reference(placed)}
    if wanted != dpo.CACHED:
      return
    rows = [row for one in self._all().values() for row in one]
    about = json.dumps([self._asked.init, contents], sort_keys=True)
    digest = hashlib.sha256(about.encode()).hexdigest()
    found = _kept(folder / REFERENCE, digest, len(rows))
    if found is None:
      print(f"reference  scores {len(rows):,} rows", flush=True)
      params = self._reference(placed)
      found = np.concatenate(list(self._score(params, rows)))
      if jax.process_index() == 0:
        _keep(folder / REFERENCE, digest, found)
    for row, logprobs in zip(rows, found, strict=True):
      row["extra"]["reference"] = logprobs

  def _all(self) -> dict[str, Rows]:
    return {
      f"{kind}/{name}": rows
      for kind, sources in (("train", self._rows), ("heldout", self._heldout))
      for name, rows in sources.items()
    }

  def _reference(self, placed):
    """Params of config.init in the compute dtype, on the mesh."""
    params = checkpoint.load(self._asked.init, "--config.init", placed).params
    dtype = jnp.dtype(self._decoder.dtype)
    cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(dtype))
    return jax.jit(cast, out_shardings=placed, donate_argnums=0)(params)

  def _score(self, params, rows: Rows) -> Iterator[np.ndarray]:
    """Log-probabilities of the segments of rows, float32 [rows, S]."""
    token_nll = functools.partial(_apply, self._decoder, "token_nll")
    score = jax.jit(
      functools.partial(dpo.answer_logprobs, token_nll),
      out_shardings=jax.NamedSharding(self._devices, jax.P()),
    )
    for count, batch in self._batches(rows):
      yield jax.device_get(score(params, batch))[:count]

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
        packing.inputs(row, 0, length, separate) | row["extra"] for row in part
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


def _make(asked: experiment.Experiment, decoder, num_sources: int) -> Callable:
  objective = asked.objective
  if isinstance(objective, reward.Reward):
    rewards = functools.partial(_apply, decoder, "rewards")
    return reward.make(objective, rewards)
  if isinstance(objective, dpo.DPO):
    token_nll = functools.partial(_apply, decoder, "token_nll")
    return dpo.make(objective, token_nll)

  def loss_sum(params, *args):
    return _apply(decoder, "loss_sum", params, *args, asked.training.z_loss)

  return next_token.make(loss_sum, num_sources)


def _tell(total) -> dict[str, float]:
  """heldout_loss and heldout/NAME of an objective's sums; scalars alone."""
  loss, (count, sums) = total
  told = {"heldout_loss": loss / jnp.maximum(count, 1)}
  for name, value in step_lib.tell(sums).items():
    if not value.ndim:
      told[f"heldout/{name}"] = value
  return {name: float(value) for name, value in told.items()}


def _kept(file: pathlib.Path, digest: str, rows: int) -> np.ndarray | None:
  if not file.is_file():
    return None
  try:
    with np.load(file) as kept:
      right = str(kept["of"]) == digest and len(kept["logprobs"]) == rows
      return kept["logprobs"] if right else None
  except (OSError, ValueError, KeyError, EOFError) as error:
    raise errors.BadFileError(
      f"{file}: not what a run keeps there ({error}); remove it, and it is"
      " computed again."
    ) from error


def _keep(file: pathlib.Path, digest: str, logprobs: np.ndarray) -> None:
  part = file.with_name(f".{file.name}.part.npz")
  np.savez(part, of=digest, logprobs=logprobs)
  atomic.flush(part)
  part.replace(file)
