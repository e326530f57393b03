"""What a LoRA run keeps of its base, and the whole model that the two make.

  lora.json  in the run's folder: the fields of model.lora.LoRA; the base's
             reference and a digest, by which it is known again

The run's checkpoints hold the adapters alone. Who reads the folder as a model
gets the base's weights, in their own dtype, with alpha / rank * A @ B added to
rows as they are asked for, in float32: to the weights that the reference holds,
whatever lora.base_dtype the run rounded them to.

r rank, I in, O out.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax import checkpoint, errors
from llama_jax.checkpoint import atomic, names, weights
from llama_jax.model import config as config_lib
from llama_jax.model import lora as lora_lib

FILE = "lora.json"


@dataclasses.dataclass(frozen=True)
class Kept:
  """What lora.json says.

  Attributes:
    lora: of the run.
    base: the reference of the model that it began from.
    base_digest: see digest.
  """

  lora: lora_lib.LoRA
  base: str
  base_digest: str


def write(
  folder: pathlib.Path, lora: lora_lib.LoRA | None, base: str | None
) -> None:
  """Writes lora.json; or removes an earlier one, where there is no LoRA.

  Args:
    folder: the run's.
    lora: its section of the config.
    base: a reference that stays what it is (checkpoint.pin).
  """
  if lora is None or base is None:
    (folder / FILE).unlink(missing_ok=True)
    return
  config, source = checkpoint.open_tensors(base, "--config.init")
  fields = dataclasses.asdict(lora) | {
    "base": base,
    "base_digest": digest(config, source),
  }
  atomic.write_text(folder / FILE, json.dumps(fields, indent=2) + "\n")


def read(folder: pathlib.Path) -> Kept | None:
  """What a model's folder says of its base; None where it needs none."""
  file = folder / FILE
  if not file.exists():
    return None
  try:
    fields = json.loads(file.read_text(encoding="utf-8"))
    base, known = fields.pop("base"), fields.pop("base_digest")
    if not isinstance(base, str) or not isinstance(known, str):
      raise TypeError("base and base_digest must be texts")
    return Kept(lora_lib.LoRA(**fields), base, known)
  except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
    raise errors.BadFileError(
      f"{file}: not what a LoRA run keeps there ({error})."
    ) from error


def digest(config: config_lib.LlamaConfig, source: weights.Source) -> str:
  """Of a base: its norms, and of its embedding, its head and the projections
  of its first layer the first row.

  Little to read, and what any training moves, LoRA's too.
  """
  found = hashlib.sha256()
  for place in names.places(config, source.scheme):
    if len(place.shape) == 1:
      found.update(source.get(place.name).tobytes())
    elif not place.layer:  # None, or the first.
      found.update(source.rows(place.name, 0, 1).tobytes())
  return found.hexdigest()


def open_base(
  folder: pathlib.Path, kept: Kept
) -> tuple[config_lib.LlamaConfig, weights.Source]:
  """The base's configuration and weights, in the scheme they are kept in.

  Raises:
    BadFileError: it is gone, damaged, or not the one that the run began from.
  """
  file = folder / FILE
  try:
    config, source = checkpoint.open_tensors(kept.base, f"{file}: base")
    same = digest(config, source) == kept.base_digest
  except errors.UserError as error:
    raise errors.BadFileError(
      f"{error} Without its base this LoRA run is no model: bring the base"
      " back, or write where it is now in that file."
    ) from error
  if not same:
    raise errors.BadFileError(
      f"{file}: base={kept.base} holds other weights than those that this run"
      " began from; write where they are now in that file."
    )
  return config, source


def pairs(
  config: config_lib.LlamaConfig,
  lora: lora_lib.LoRA,
  adapters: Mapping[str, Any],
  file: str,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Hugging Face's name of a weight -> its A [r, I] and B [O, r], float32.

  Args:
    config: the model's configuration.
    lora: the run's.
    adapters: as model.lora.init gives them, unboxed.
    file: what messages call them.

  Raises:
    BadFileError: they are not those of the two.
  """
  leaves = {
    path: np.asarray(leaf, np.float32)
    for path, leaf in names.flatten(adapters).items()
  }
  found = {}
  for place in names.places(config, "hf"):
    module, _, kernel = place.row.path.rpartition("/")
    if kernel != "kernel" or module.split("/")[-1] not in lora.targets:
      continue
    rows, columns = place.shape
    wanted = {
      "lora_a": (config.num_layers, columns, lora.rank),
      "lora_b": (config.num_layers, lora.rank, rows),
    }
    for name, shape in wanted.items():
      leaf = leaves.get(f"{module}/{name}")
      if leaf is None or leaf.shape != shape:
        has = "is missing" if leaf is None else f"is {list(leaf.shape)}"
        raise errors.BadFileError(
          f"{file}: {module}/{name} {has}, but model.json and {FILE} make it"
          f" {list(shape)}."
        )
    found[place.name] = tuple(
      np.ascontiguousarray(leaves[f"{module}/{name}"][place.layer].T)
      for name in wanted
    )
  return found


def score(
  config: config_lib.LlamaConfig, adapters: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Hugging Face's name of a reward model's score -> it [1, D], float32.

  Empty for a language model.
  """
  if config.head != "scalar":
    return {}
  kernel = np.asarray(adapters["score"]["kernel"], np.float32)
  name = names.name_of(names.SCORE_PATH, "hf")
  return {name: np.ascontiguousarray(kernel.T)}


def merged(
  config: config_lib.LlamaConfig,
  folder: pathlib.Path,
  kept: Kept,
  adapters: Mapping[str, Any],
  file: str,
) -> weights.Source:
  """The weights of the whole model, under Hugging Face's names, unread.

  Args:
    config: the run's; its head and its RoPE may be others than the base's.
    folder: the run's.
    kept: its lora.json.
    adapters: as model.lora.init gives them, unboxed.
    file: what messages call it.
  """
  base_config, source = open_base(folder, kept)
  base = weights.as_scheme(base_config, source, "hf")
  beside = pairs(config, kept.lora, adapters, file)
  own = score(config, adapters)
  scale = kept.lora.alpha / kept.lora.rank
  tensors = {}
  for place in names.places(config, "hf"):
    held = base.tensors.get(place.name)
    if place.name in own:
      dtype = own[place.name].dtype
      held = weights.Tensor(place.shape, dtype, weights.stored_as(dtype))
    if place.name in beside and held is not None:
      held = dataclasses.replace(held, stored=weights.stored_as(held.dtype))
    if held is not None:
      tensors[place.name] = held

  def rows(name: str, start: int, stop: int) -> np.ndarray:
    if name in own:
      return own[name][start:stop]
    value = base.rows(name, start, stop)
    if name not in beside:
      return value
    a_rI, b_Or = beside[name]
    added = (b_Or[start:stop] * np.float32(scale)) @ a_rI
    return weights.cast(value + added, value.dtype, f"{file}: {name}")

  result = weights.Source(file, "hf", tensors, rows)
  weights.check(config, result)
  return result
