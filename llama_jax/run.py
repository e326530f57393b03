"""A run put together: model, words, data, mesh and step of an experiment."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
import tempfile
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import (
  checkpoint,
  compatibility,
  errors,
  experiment,
  learning,
  text,
)
from llama_jax.checkpoint import adapters, names, proof, steps, store
from llama_jax.data import batches as batches_lib
from llama_jax.data import examples, sources
from llama_jax.data import prepared as prepared_lib
from llama_jax.data import ramp as ramp_lib
from llama_jax.decoding import placement
from llama_jax.model import config as config_lib
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import heads, sizes
from llama_jax.model import lora as lora_lib
from llama_jax.parallel import hosts, mesh
from llama_jax.text import folder as folder_lib
from llama_jax.text import (
  infill,
  sentencepiece_bpe,
  templates,
  train_sentencepiece,
)
from llama_jax.training import optimizer as optimizer_lib
from llama_jax.training import state as state_lib
from llama_jax.training import step as step_lib

# A tokenizer for a dry run is trained on no more text than this.
TOKENIZER_BYTES = 20_000_000


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
    heldout: domain -> rows that are not trained on.
    contents: source -> a digest of its rows.
    goal: what is minimised and measured.
    shapes, placed: of the state: ShapeDtypeStructs, and NamedShardings.
    base: reference of what adapters are trained beside; None without LoRA.
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
  contents: dict[str, str]
  goal: learning.Goal
  shapes: state_lib.TrainState
  placed: state_lib.TrainState
  base: str | None
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

  def prepare(self, folder: pathlib.Path) -> None:
    """Reads, or computes, what the objective needs beside the state."""
    base = None
    if self.base is not None:
      lora = self.asked.lora
      placed = placement.shardings(self.decoder.config, self.devices)
      base = jax.jit(
        functools.partial(lora_lib.freeze, lora=lora),
        out_shardings=lora_lib.shardings(placed, lora),
        donate_argnums=0,
      )(_load(self.asked, self.base, self.decoder, self.devices))
    drawn = self.batches.drawn(self.asked.training.steps)
    self.goal.prepare(folder, drawn, base)

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
      "seed": self.asked.data.seed,
      "sources": {
        name: {"rows_read": rows, "content": self.contents[name]}
        for name, rows in self.batches.mixture.taken(place.row).items()
      },
    }

  def save(self, checkpoints: steps.Checkpoints, state, step: int) -> None:
    """Starts to save a state and where its data stands."""
    rest = {"opt_state": state.opt_state, "guard": state.guard}
    # The data's position is the number of updates tried, skipped ones too.
    checkpoints.save(step, state.params, rest, self.position(step))

  def restore(self, checkpoints: steps.Checkpoints, step: int | None = None):
    """The state of a step (None: the newest), or None where there is none.

    Raises:
      ConfigError: the config would go on with other data than the run's.
    """
    target = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      self.shapes,
      self.placed,
    )
    rest = {"opt_state": target.opt_state, "guard": target.guard}
    found = checkpoints.restore(target.params, rest, step)
    if found is None:
      return None
    for what, was, now in _changes(found.meta, self.position(found.step)):
      raise errors.ConfigError(
        f"by step {found.step} this run had {what}={was}, but with this config"
        f" it would have had {now}: other data would follow. Keep"
        " training.batch_size, training.ramp, data.sequence_length,"
        " data.mixture and the data as they were (training.ramp and"
        " data.later_mixtures change them later on), or begin anew from its"
        " weights with"
        " --config.init=orbax:WORKDIR in another --workdir."
      )
    return state_lib.TrainState(
      step=jnp.int32(found.step), params=found.params, **found.rest
    )


def _changes(was: dict[str, Any], now: dict[str, Any]):
  """What of a position is another: (its name, what it was, what it is)."""
  # A source may join or go of which nothing has been read.
  nothing = {"rows_read": 0, "content": None}
  for name in sorted({*was["sources"], *now["sources"]}):
    before, after = (one["sources"].get(name, nothing) for one in (was, now))
    if before["rows_read"] or after["rows_read"]:
      for key, value in before.items():
        if value != after[key]:
          yield f"{key} of source {name}", value, after[key]
  for name in ("tokens", "row", "row_length", "seed"):
    if was[name] != now[name]:
      yield name, was[name], now[name]


def set_up(asked: experiment.Experiment, folder: pathlib.Path) -> Run:
  """Model, data and step of an experiment; nothing is written."""
  # The model and its words.
  prepared = None
  if asked.data.prepared:
    prepared = prepared_lib.read(asked.data.prepared)
  config, tokenizer = choose_model(asked, folder, prepared)
  devices = mesh.make(asked.parallel)
  dtype = asked.model.dtype
  decoder = decoder_lib.Decoder(
    config,
    dtype=hosts.fastest_dtype() if dtype == "auto" else dtype,
    attention=asked.model.attention,
    rematerialise=asked.model.rematerialise,
  )

  # The data: which rows step n reads follows from n alone.
  compatibility.check(asked)
  base = _base(asked, folder)
  ramp = experiment.make_ramp(asked, prepared and prepared.row_length)
  compatibility.check_model(asked, config, tokenizer, ramp, devices.size)
  compatibility.check_second(asked, folder, config, tokenizer, ramp.row_length)
  if prepared is not None:
    _check_infilling(asked.data, prepared)
    rows, heldout = prepared.sources, prepared.heldout
    contents = {
      name: _digest([json.dumps(prepared.report["sources"][name]).encode()])
      for name in rows
    }
  else:
    rows, heldout = _pack(asked, tokenizer, ramp.row_length)
    contents = {
      name: _digest(row["tokens"].tobytes() for row in packed)
      for name, packed in rows.items()
    }
    sizes = {name: len(packed) for name, packed in rows.items()}
    asked = learning.in_epochs(asked, sizes)
  batches = batches_lib.Batches(rows, asked.data, ramp)
  if asked.evaluation.every and not heldout and not asked.evaluation.tasks:
    print(
      f"note: evaluation.every={asked.evaluation.every} measures nothing: there"
      " are no held-out documents (data.heldout, or prepare's heldout) and no"
      " evaluation.tasks.",
      file=sys.stderr,
    )

  # The step.
  optimizer = optimizer_lib.make(asked.optimizer)
  init, join = functools.partial(decoder_lib.init, decoder), None
  first = _first_state
  if base is not None:
    init = functools.partial(lora_lib.init, config, asked.lora)
    join = functools.partial(lora_lib.join, lora=asked.lora)
    first = functools.partial(_first_adapters, base)
  shapes, placed = state_lib.shardings(init, optimizer, devices)
  goal = learning.Goal(
    asked, decoder, tokenizer, devices, rows, heldout, ramp.row_length, join
  )
  update = jax.jit(
    step_lib.make(
      goal.objective,
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
    contents=contents,
    goal=goal,
    shapes=shapes,
    placed=placed,
    base=base,
    first=functools.partial(first, asked, decoder, optimizer, devices, placed),
    update=update,
    rate=experiment.rates(asked, ramp),
  )


def _pack(asked: experiment.Experiment, tokenizer, row_length: int):
  """Rows of data.text by source, to train on and held out."""
  if asked.data.form == batches_lib.DOCUMENTS:
    packed, unseen = batches_lib.pack_text(asked.data, tokenizer, row_length)
    return {"text": packed}, {"text": unseen} if unseen else {}
  found = examples.read(
    asked.data,
    tokenizer,
    row_length,
    formatting=learning.formatting(asked),
  )
  for name, counts in found.counts.items():
    print(f"{name:<10} {counts}", flush=True)
  return found.rows, found.heldout


def _first_state(asked, decoder, optimizer, devices, placed):
  """State 0: params of init or fresh ones, in float32, on the mesh."""
  params = None
  key = jax.random.key(asked.training.seed)
  if asked.init:
    params = _load(asked, asked.init, decoder, devices)

  def make(params):
    if params is None:
      params = nn.unbox(decoder_lib.init(decoder, key))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    params = decoder_lib.grow_vocabulary(params, decoder.config.vocab_size)
    return state_lib.create(params, optimizer)

  return jax.jit(make, out_shardings=placed, donate_argnums=0)(params)


def _load(asked, reference: str, decoder, devices: jax.sharding.Mesh):
  """Params of a reference on the mesh, with the decoder's head."""
  config = checkpoint.read_config(reference, "--config.init")
  shardings = placement.shardings(config, devices)
  params = checkpoint.load(reference, "--config.init", shardings).params
  if decoder.config.head == "scalar":
    params = heads.to_scalar(params, jax.random.key(asked.training.seed))
  return params


def _first_adapters(base, asked, decoder, optimizer, devices, placed):
  """State 0 of a LoRA run; beside a reward model the score begins as its."""
  del devices
  key = jax.random.key(asked.training.seed)
  config, source = checkpoint.open_tensors(base, "--config.init")
  score = None
  if config.head == "scalar":
    score = source.get(names.name_of(names.SCORE_PATH, source.scheme)).T

  def make(score):
    adapters = nn.unbox(lora_lib.init(decoder.config, asked.lora, key))
    if score is not None:
      adapters["score"] = {"kernel": score.astype(jnp.float32)}
    return state_lib.create(adapters, optimizer)

  return jax.jit(make, out_shardings=placed)(score)


def _base(asked: experiment.Experiment, folder: pathlib.Path) -> str | None:
  """What a LoRA run trains beside: what it began with, or config.init now."""
  if not steps.list_steps(folder / "checkpoints"):
    return checkpoint.pin(asked.init, "--config.init") if asked.lora else None
  kept = adapters.read(folder)
  before = kept and kept.lora
  if before != asked.lora:
    raise errors.ConfigError(
      f"the config has lora={asked.lora}, but the run in {folder} has"
      f" {before}; leave it as it was, or begin anew from its weights with"
      f" --config.init=orbax:{folder} in another --workdir."
    )
  if kept is None:
    return None
  adapters.open_base(folder, kept)
  return kept.base


def choose_model(
  asked: experiment.Experiment,
  folder: pathlib.Path,
  prepared: prepared_lib.Prepared | None,
) -> tuple[config_lib.LlamaConfig, Any]:
  """The LlamaConfig and tokenizer: of the run so far, of init, or by name."""
  size, init = asked.model.size, asked.init
  if steps.list_steps(folder / "checkpoints"):
    if not (folder / "config.json").is_file():
      raise errors.UserError(
        f"--workdir={folder} holds a model that was converted, not a run; train"
        f" it with --config.init=orbax:{folder} in another --workdir."
      )
    saved = f"orbax:{folder}"
    config = store.read_model_config(folder)
    tokenizer = store.read_model_tokenizer(folder)
  elif init:
    saved = init
    config = checkpoint.read_config(init, "--config.init")
    tokenizer = checkpoint.read_tokenizer(init, "--config.init")
  elif size:
    saved, config, tokenizer = "", sizes.get(size), None
  else:
    raise errors.ConfigError(
      "there is no model: give --config.init=REF to go on from a checkpoint, or"
      f" --config.model.size, one of {', '.join(sizes.SIZES)}."
    )
  if init and config.head == "scalar" and learning.head(asked) != "scalar":
    raise errors.ConfigError(
      f"{saved} is a reward model, which says no words; give a language model,"
      " or objective.name=reward."
    )
  if size and sizes.get(size) != config:
    raise errors.ConfigError(
      f"--config.model.size={size} is not the size of {saved}; leave it empty."
    )
  changed = _changed(asked.model, config)
  if changed != config and saved != init:
    raise errors.ConfigError(
      "model.vocab_size, rope_theta and context_length change what"
      f" --config.init has; {saved or f'model.size={size}'} stays what it is:"
      " leave them 0."
    )
  tokenizer = _choose_tokenizer(
    asked.data, prepared, config, tokenizer, saved not in ("", init)
  )
  if template := asked.data.chat_template:
    templates.choose(tokenizer, template, "--config.data.chat_template")
  return dataclasses.replace(changed, head=learning.head(asked)), tokenizer


def _changed(
  model: experiment.ModelConfig, config: config_lib.LlamaConfig
) -> config_lib.LlamaConfig:
  names = ("vocab_size", "rope_theta", "context_length")
  wanted = {n: getattr(model, n) for n in names if getattr(model, n)}
  if wanted.get("vocab_size", config.vocab_size) < config.vocab_size:
    raise errors.ConfigError(
      f"model.vocab_size={model.vocab_size} is below the {config.vocab_size}"
      " that --config.init has; words can be added, not taken away."
    )
  return dataclasses.replace(config, **wanted)


def _check_infilling(data: batches_lib.DataConfig, prepared) -> None:
  made = prepared.report["config"]["infill_rate"]
  if data.infill_rate and data.infill_rate != made:
    raise errors.ConfigError(
      f"data.infill_rate={data.infill_rate}, but data.prepared={data.prepared}"
      f" was made with infill_rate={made}; prepare it again, or say that.",
    )


def _digest(parts) -> str:
  digest = hashlib.sha256()
  for part in parts:
    digest.update(part)
  return digest.hexdigest()[:16]


def _choose_tokenizer(
  data: batches_lib.DataConfig, prepared, config, saved, resumed
):
  """The prepared folder's; or the one that is named; or else the saved."""
  place = data.tokenizer
  if prepared is not None:
    made = text.load_tokenizer(prepared.tokenizer)
    if place not in ("", "train"):
      saved = text.load_tokenizer(place)
    if saved is not None and not proof.same_vocabulary(made, saved):
      raise errors.ConfigError(
        f"data.prepared={data.prepared} was made with another tokenizer than"
        " that of the model (of --config.data.tokenizer, --config.init or the"
        " run so far); prepare the text with the model's own."
      )
    return made
  if place and place != "train":
    named = text.load_tokenizer(place)
    if resumed and not proof.same_vocabulary(named, saved):
      raise errors.ConfigError(
        f"data.tokenizer={place} is another than that of the run so far; leave"
        " it as it was, or empty."
      )
    return named
  if saved is not None:
    return saved
  if place == "train":
    return _train_tokenizer(data, config.vocab_size)
  raise errors.ConfigError(
    "there is no tokenizer: give --config.data.tokenizer=PATH, or"
    " --config.data.tokenizer=train to train one on --config.data.text."
  )


def _train_tokenizer(data: batches_lib.DataConfig, vocab_size: int):
  """A SentencePiece of the model's vocabulary, for dry runs on any text."""
  print(f"tokenizer  training {vocab_size:,} pieces on {data.text}", flush=True)
  kept, size = [], 0
  for _, document in sources.stream(data.text):
    kept += train_sentencepiece.sentences(document)
    size += len(document.encode())
    if size > TOKENIZER_BYTES:
      break
  special = infill.CODE_LLAMA if data.infill_rate else ()
  model = train_sentencepiece.train(kept, vocab_size, special, at_most=True)
  # What a folder without any other file says.
  with tempfile.TemporaryDirectory() as empty:
    settings = folder_lib.read_settings(pathlib.Path(empty))
  return sentencepiece_bpe.from_model(model, str(data.text), settings)
