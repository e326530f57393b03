"""Cuts a smaller model out of a larger one, by what its parts do on some text.

  python -m llama_jax.prune --ckpt=REF --dst=orbax:DIR --text=FILE.jsonl \\
    [--size=llama3.2-3b] [--num_layers --num_heads --num_kv_heads --mlp_dim
     --embed_dim] [--rows=64 --row_length=512]

The size is a preset's, or the checkpoint's own with some numbers smaller.
model/prune.py says how importance is measured. What comes out has to be trained
before it is good: configs/finetune/llama32_distill.py, with the larger model as
its teacher.
"""

import dataclasses

from absl import flags

from llama_jax import errors, shell

_SMALLER = ("num_layers", "num_heads", "num_kv_heads", "mlp_dim", "embed_dim")


def _target(config):
  """The config to reach, as the flags say it."""
  from llama_jax.model import prune, sizes

  given = {n: _NUMBERS[n].value for n in _SMALLER if _NUMBERS[n].value}
  if bool(_SIZE.value) == bool(given):
    raise errors.UserError(
      "give --size=NAME, or the numbers that are to be smaller, such as"
      f" --num_layers={config.num_layers // 2}."
    )
  if _SIZE.value:
    target = sizes.get(_SIZE.value)
  else:
    target = dataclasses.replace(config, **given)
  prune.check(config, target)
  return target


def _batches(texts, tokenizer):
  """Calibration: packed rows of some text, four at a time."""
  import numpy as np

  from llama_jax.data import documents, packing

  encoder = documents.Encoder(tokenizer, _ROW_LENGTH.value)
  rows = packing.pack(
    (encoder.document(text, index) for index, text in enumerate(texts)),
    _ROW_LENGTH.value,
  )
  length, found = _ROW_LENGTH.value, []
  for row in rows:
    found.append(packing.inputs(row, 0, length, True))
    if len(found) == _ROWS.value:
      break
  for start in range(0, len(found), 4):
    part = found[start : start + 4]
    yield {name: np.stack([one[name] for one in part]) for name in part[0]}


def main(argv) -> None:
  del argv
  for name, given in (("ckpt", _CKPT), ("dst", _DST), ("text", _TEXT)):
    if not given.value:
      raise errors.UserError(f"--{name} is needed; see --help.")
  import jax

  from llama_jax import checkpoint
  from llama_jax import llama as llama_lib
  from llama_jax.checkpoint import building, weights
  from llama_jax.data import sources
  from llama_jax.model import decoder as decoder_lib
  from llama_jax.model import prune

  _, module, path = checkpoint.writer(_DST.value)
  target = _target(checkpoint.read_config(_CKPT.value, "--ckpt"))
  texts = sources.documents(_TEXT.value, knob="--text")
  llama = llama_lib.load(_CKPT.value, knob="--ckpt")
  importances = prune.measure(
    llama.decoder, llama.params, _batches(texts, llama.need_tokenizer())
  )
  params = prune.prune(llama.config, llama.params, importances, target)
  source = weights.from_params(target, jax.device_get(params), "hf")
  with building.building(path) as site:
    module.write_into(site, target, source, llama.tokenizer)
  before, after = map(decoder_lib.count_parameters, (llama.config, target))
  print(f"done: {_DST.value}, {after:,} of {before:,} parameters")


if __name__ == "__main__":
  _CKPT = flags.DEFINE_string("ckpt", None, "What to prune; any reference.")
  _DST = flags.DEFINE_string("dst", None, "orbax:DIR or hf:DIR to write.")
  _TEXT = flags.DEFINE_string("text", None, "What importance is measured on.")
  _SIZE = flags.DEFINE_string("size", None, "A preset's name.")
  _NUMBERS = {
    name: flags.DEFINE_integer(name, None, "Instead of the checkpoint's.", 1)
    for name in _SMALLER
  }
  _ROWS = flags.DEFINE_integer("rows", 64, "Rows of text, at most.", 1)
  _ROW_LENGTH = flags.DEFINE_integer("row_length", 512, "Tokens of each.", 2)
  shell.run(main)
