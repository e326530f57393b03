"""Measures of a model: name -> function that yields (name, value).

  eval(decoder, params, texts, tokenizer, *, window, stride, bos, rows)
    -> Iterator[(name, value)]

Numbers are for a table; what else is yielded is for a file.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_jax import errors
from llama_jax.data import sources
from llama_jax.evals import heldout as heldout_lib
from llama_jax.evals import perplexity
from llama_jax.evals import settings as settings_lib

EVALS: dict[str, Callable] = {"perplexity": perplexity.evaluate}


def make(
  config: settings_lib.EvaluationConfig,
  decoder,
  tokenizer,
  heldout: Mapping[str, Sequence[Mapping[str, Any]]],
  devices,
  *,
  sequence_length: int,
  separate: bool,
) -> Callable[[Any], dict[str, float]]:
  """(params) -> name -> value, for the loop to call under jax.set_mesh.

  Everything is read and checked here, before a run starts.

  Args:
    config: what to measure.
    decoder: the one that trains.
    tokenizer: its words.
    heldout: domain -> rows as packing.pack makes them.
    devices: the mesh.
    sequence_length, separate: how rows are cut for the model, see packing.
  """
  unknown = [task for task in config.tasks if task not in EVALS]
  if unknown:
    raise errors.ConfigError(
      f"evaluation.tasks={','.join(unknown)}: unknown; use one or more of"
      f" {', '.join(EVALS)}."
    )
  if config.tasks and config.window > decoder.config.context_length:
    raise errors.ConfigError(
      f"evaluation.window={config.window} is longer than the model's context"
      f" of {decoder.config.context_length}; use that or less."
    )
  texts, domains = {}, {}
  if config.every:
    texts = {
      name: sources.documents(paths, knob=_knob(name))
      for name, paths in config.texts.items()
    }
    domains = {
      name: heldout_lib.cut(rows, config.rows, sequence_length, separate)
      for name, rows in heldout.items()
    }
  # Whole rows for each device that shares a batch, at least as many as alone.
  shares = devices.shape["data"] * devices.shape["fsdp"]
  rows = -(-perplexity.ROWS // shares) * shares
  settings = {
    "window": config.window,
    "stride": config.window,
    "bos": tokenizer.add_bos and tokenizer.bos_id is not None,
    "rows": rows,
  }

  def evaluate(params) -> dict[str, float]:
    found = dict(heldout_lib.evaluate(decoder, params, domains, rows))
    for task in config.tasks:
      for name, documents in texts.items():
        prefix = f"{task}/{name}" if name else task
        for key, value in EVALS[task](
          decoder, params, documents, tokenizer, **settings
        ):
          if isinstance(value, (int, float)):
            found[f"{prefix}/{key}"] = value
    return found

  return evaluate


def _knob(name: str) -> str:
  return f"evaluation.text.{name}" if name else "evaluation.text"
