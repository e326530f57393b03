"""Measures a checkpoint.

  python -m llama_jax.evaluate --ckpt=REF --tasks=perplexity \\
    --text=FILE.jsonl [--window=1024 --stride=1024 --[no]bos] [--out=FILE.json]
    [--parallel.tensor=2 --parallel.data=-1]
  python -m llama_jax.evaluate --ckpt=REWARD_MODEL --score=FILE.jsonl \
    --out=FILE.jsonl

perplexity writes mean_loss (nats per scored token), scored_tokens, tokens,
bytes, bytes_per_token and each document's losses. --score adds a reward to each
conversation, or to each of a row's completions (scoring.py).
"""

if __name__ == "__main__":
  from llama_jax import huge_pages

  huge_pages.ask("llama_jax.evaluate")

import json
import pathlib

from absl import flags

from llama_jax import errors, evals, shell


def _load(head: str = "words"):
  from llama_jax import llama as llama_lib
  from llama_jax.decoding import placement

  return llama_lib.load(
    _CKPT.value,
    dtype=_DTYPE.value,
    quantize=_QUANTIZE.value,
    knob="--ckpt",
    mesh=placement.make_mesh(**_PARALLEL()),
    head=head,
  )


def score() -> None:
  """--score: rows of a file with their rewards."""
  from llama_jax import scoring
  from llama_jax.decoding import placement

  if not _OUT.value or _QUANTIZE.value or _TEXT.value:
    raise errors.UserError(
      "--score=FILE needs --out=FILE, and takes neither --text nor --quantize."
    )
  llama = _load("scalar")
  out = pathlib.Path(_OUT.value).expanduser()
  with placement.on(llama.mesh):
    print(scoring.score(llama, pathlib.Path(_SCORE.value).expanduser(), out))


def main(argv) -> None:
  del argv
  if _SCORE.value is not None:
    score()
    return
  # Before the weights are read: what is cheap to refuse.
  unknown = [task for task in _TASKS.value if task not in evals.EVALS]
  if unknown or not _TASKS.value:
    raise errors.UserError(
      f"--tasks={','.join(_TASKS.value)}: unknown; use one or more of"
      f" {', '.join(evals.EVALS)}."
    )
  if not _TEXT.value:
    raise errors.UserError(
      "--text=FILE is needed: JSONL or text, .gz too, or a folder."
    )
  from llama_jax.checkpoint import atomic
  from llama_jax.data import sources
  from llama_jax.decoding import placement

  texts = sources.documents(_TEXT.value, knob="--text")
  llama = _load()
  if _QUANTIZE.value:
    llama.only_decode()
    decoder, params = llama.unrolled
    print(llama.describe_quantized())
  else:
    decoder, params = llama.decoder, llama.params
  tokenizer = llama.need_tokenizer()
  bos = tokenizer.add_bos if _BOS.value is None else _BOS.value
  settings = {"window": _WINDOW.value, "stride": _STRIDE.value, "bos": bos}
  result = {"ckpt": _CKPT.value, "tasks": _TASKS.value, "text": _TEXT.value}
  result |= settings | {"dtype": _DTYPE.value, "quantize": _QUANTIZE.value}
  with placement.on(llama.mesh):
    for task in _TASKS.value:
      for name, value in evals.EVALS[task](
        decoder, params, texts, tokenizer, **settings
      ):
        result[name] = value
        if name != "documents":
          shown = f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"
          print(f"{task}/{name:<16} {shown}")
  if _OUT.value:
    out = pathlib.Path(_OUT.value).expanduser()
    atomic.write_text(out, json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
  _CKPT = flags.DEFINE_string("ckpt", None, "orbax:DIR, hf:DIR or gguf:FILE.")
  _TASKS = flags.DEFINE_list("tasks", ["perplexity"], "What to measure.")
  _SCORE = flags.DEFINE_string("score", None, "JSONL to score by a reward.")
  _TEXT = flags.DEFINE_string("text", None, "JSONL, text, gz or a folder.")
  _WINDOW = flags.DEFINE_integer(
    "window", 1024, "Tokens that the model sees at once, BOS among them."
  )
  _STRIDE = flags.DEFINE_integer(
    "stride", 1024, "Tokens from one window's start to the next one's."
  )
  _BOS = flags.DEFINE_boolean(
    "bos", None, "Begin windows with BOS; unset does as the model is used to."
  )
  _OUT = flags.DEFINE_string("out", None, "JSON file to write.")
  _DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Compute dtype."
  )
  _QUANTIZE = flags.DEFINE_enum(
    "quantize", "", ["", "int8", "int4"], "Weights as they decode."
  )
  _PARALLEL = shell.define_parallel()
  shell.run(main)
