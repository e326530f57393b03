"""What of an experiment goes together; refused early, by the knob to change.

`check` looks at the config alone, `check_model` at the model too, both before
anything is read or compiled; `check_second` at a reference or teacher.
"""

import pathlib

from llama_jax import checkpoint, errors, experiment
from llama_jax.checkpoint import proof, steps
from llama_jax.data import batches as batches_lib
from llama_jax.data import ramp as ramp_lib
from llama_jax.model import config as config_lib
from llama_jax.objectives import distill, dpo, next_token, reward
from llama_jax.parallel import mesh

TEACHER_KNOB = "--config.objective.teacher"


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
  if isinstance(objective, dpo.DPO) and asked.model.vocab_size:
    raise errors.ConfigError(
      f"model.vocab_size={asked.model.vocab_size} adds words that DPO's"
      " reference, config.init, does not have; leave it 0."
    )
  plain = isinstance(objective, next_token.NextToken)
  if asked.training.z_loss and not plain:
    raise errors.ConfigError(
      f"training.z_loss={asked.training.z_loss} is next-token prediction's, and"
      f" this objective ({name}) has none; use 0."
    )
  if getattr(objective, "top_k", 0) and (data.prepared or asked.training.ramp):
    raise errors.ConfigError(
      f"objective.top_k={objective.top_k} stores what the teacher says of whole"
      " rows of data.text; with data.prepared or training.ramp use"
      " objective.top_k=0, a live teacher."
    )
  if asked.lora and not asked.init:
    raise errors.ConfigError(
      "lora trains beside a model: give --config.init=REF."
    )
  if asked.lora and asked.model.vocab_size:
    raise errors.ConfigError(
      f"model.vocab_size={asked.model.vocab_size} adds words, and lora trains"
      " no embedding; leave it 0."
    )
  if (
    asked.lora
    and asked.lora.base_dtype == "int8"
    and asked.model.dtype == "float8"
  ):
    raise errors.ConfigError(
      "lora.base_dtype=int8 is not multiplied in float8; use"
      " model.dtype=bfloat16, or lora.base_dtype=bfloat16."
    )
  if asked.training.epochs and data.prepared:
    raise errors.ConfigError(
      "training.epochs counts passes over data.text; with data.prepared give"
      " training.steps."
    )


def check_model(
  asked: experiment.Experiment,
  config: config_lib.LlamaConfig,
  tokenizer,
  ramp: ramp_lib.Ramp,
  num_devices: int,
) -> None:
  """Refuses, before any compile, what cannot work together."""
  parallel = asked.parallel.resolve(num_devices)
  for stage in ramp.stages:
    rows = stage.batch_size // stage.accumulation
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
    if stage.sequence_length > config.context_length:
      raise errors.ConfigError(
        f"data.sequence_length={stage.sequence_length} is longer than the"
        f" model's context of {config.context_length}; use that or less."
      )
  if tokenizer.vocab_size > config.vocab_size:
    raise errors.ConfigError(
      f"the tokenizer has {tokenizer.vocab_size} words and the model"
      f" {config.vocab_size}; give the model's own with"
      " --config.data.tokenizer=PATH."
    )


def check_second(
  asked: experiment.Experiment,
  folder: pathlib.Path,
  config,
  tokenizer,
  row_length: int,
) -> None:
  """Refuses a second model that is not the run's, or does not fit its own.

  Args:
    asked: the experiment.
    folder: the run's; what it went on from so far is in its config.json.
    config, tokenizer: of the model that is trained.
    row_length: tokens that both models read at once.
  """
  objective = asked.objective
  # Beside adapters the base is the reference, and the run's folder names it.
  is_reference = getattr(objective, "reference", "") and not asked.lora
  if is_reference and steps.list_steps(folder / "checkpoints"):
    was = experiment.read_described(folder).init
    if was != asked.init:
      raise errors.ConfigError(
        f"--config.init={asked.init} is the reference of this objective, and"
        f" the run in {folder} has {was}; leave it as it was, or begin anew in"
        " another --workdir."
      )
  if not isinstance(objective, distill.Distill):
    return
  given = f"{TEACHER_KNOB}={objective.teacher}"
  there = checkpoint.read_config(objective.teacher, TEACHER_KNOB)
  if there.head != "words":
    raise errors.ConfigError(
      f"{given} is a reward model, which says no words; give a language model."
    )
  theirs = checkpoint.read_tokenizer(objective.teacher, TEACHER_KNOB)
  alike = theirs is None or proof.same_vocabulary(theirs, tokenizer)
  if not alike or there.vocab_size != config.vocab_size:
    raise errors.ConfigError(
      f"{given} has another vocabulary ({there.vocab_size:,} words) than the"
      f" student ({config.vocab_size:,}), so what it says of a word means"
      " another; give a teacher with the student's tokenizer."
    )
  if row_length > there.context_length:
    raise errors.ConfigError(
      f"{given} has a context of {there.context_length:,} tokens, but a row has"
      f" {row_length:,}; use --config.data.sequence_length="
      f"{there.context_length} or less."
    )
  if objective.top_k > there.vocab_size:
    raise errors.ConfigError(
      f"objective.top_k={objective.top_k} is more than the {there.vocab_size:,}"
      " words that the teacher has; use less."
    )
