"""Continues a prompt, talks, fills the hole in a file, or answers a file.

  python -m llama_jax.generate --ckpt=REF --prompt=TEXT
  python -m llama_jax.generate --ckpt=REF --chat [--system=TEXT]
  python -m llama_jax.generate --ckpt=REF --infill=FILE [--hole="<FILL>"]
  python -m llama_jax.generate --ckpt=REF --prompts=FILE.jsonl
    --out=FILE.jsonl [--n=1] [--logprobs=K] [--json_schema=FILE | --regex=RE]
    [--max_batch --cache_tokens] [--guesses=G [--draft=REF]]
    [--temperature --top_p --top_k --min_p --max_new_tokens --seed --stop=TEXT
     --repetition_penalty --presence_penalty --frequency_penalty]
  and for all of them [--quantize=int8|int4] [--dtype=bfloat16]
    [--parallel.data=1 --parallel.fsdp=1 --parallel.tensor=1]

The text streams as it is decoded. In a chat, Ctrl-C stops an answer and /help
shows the commands. Infilling prints the whole file, and takes a model trained
for it. Rows of --prompts have `prompt` (a text) or `messages` (a chat); those
of --out keep their fields and add `completions`. Typed again it goes on where
it was stopped, and several processes share one file.
"""

if __name__ == "__main__":
  from llama_jax import huge_pages

  huge_pages.ask("llama_jax.generate")

import pathlib
import sys

from absl import flags

from llama_jax import errors, shell, terminal


def around_hole(path: str, hole: str) -> tuple[str, str]:
  """What stands before and behind the hole in a file."""
  from llama_jax.text import files

  with files.opened(path) as file:
    content = file.read()
  try:
    text = content.decode()
  except UnicodeDecodeError as error:
    raise errors.BadFileError(
      f"--infill={path} is not UTF-8: {error}."
    ) from error
  if not hole:
    raise errors.UserError("--hole is empty; name a mark, as in --hole=<FILL>.")
  if (count := text.count(hole)) != 1:
    raise errors.UserError(
      f"--infill={path} has the mark --hole={hole} {count} times; put it there"
      " once, where text is missing."
    )
  prefix, suffix = text.split(hole)
  return prefix, suffix


def fill(llama, prefix: str, suffix: str, settings) -> None:
  """Prints the whole text, what is missing as the model writes it."""
  from llama_jax.decoding import request
  from llama_jax.text import infill

  prompt = infill.Infill(llama.need_tokenizer()).prompt(prefix, suffix)
  pieces = llama.stream(
    prompt.ids, stop_ids=prompt.stop_ids, continues=True, **settings
  )
  new = prefix  # Not printed where the first step is refused.
  while True:
    try:
      new += next(pieces)
    except StopIteration as end:
      reason = end.value
      break
    print(new, end="", flush=True)
    new = ""
  print(new + suffix, end="", flush=True)
  if reason == request.LENGTH:
    print(
      f"note: --max_new_tokens={settings['max_new_tokens']} cut what fills the"
      " hole; give more.",
      file=sys.stderr,
    )


def _read(path: str | None) -> str:
  if path is None:
    return ""
  try:
    return pathlib.Path(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise errors.BadFileError(f"--json_schema={path}: {error}.") from error


def _load():
  from llama_jax import llama as llama_lib
  from llama_jax.decoding import placement

  llama = llama_lib.load(
    _CKPT.value,
    dtype=_DTYPE.value,
    quantize=_QUANTIZE.value,
    knob="--ckpt",
    mesh=placement.make_mesh(**_PARALLEL()),
  )
  llama.only_decode()
  if _QUANTIZE.value:
    print(llama.describe_quantized(), file=sys.stderr)
  return llama


def answer_file(sampling_config) -> None:
  """--prompts: what is refused is refused before any weights load."""
  from llama_jax import answers, batch
  from llama_jax import llama as llama_lib
  from llama_jax.decoding import engine as engine_lib

  rows = batch.read(pathlib.Path(_PROMPTS.value))
  settings = batch.Settings(
    samples=_N.value,
    sampling=sampling_config,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    min_new_tokens=_MIN_NEW_TOKENS.value,
    logprobs=_LOGPROBS.value,
    stop=tuple(_STOP.value),
    json_schema=_read(_JSON_SCHEMA.value),
    regex=_REGEX.value or "",
  )
  if (
    pathlib.Path(_OUT.value).resolve() == pathlib.Path(_PROMPTS.value).resolve()
  ):
    raise errors.UserError(
      f"--out={_OUT.value} is the file of the prompts; name another."
    )
  output = answers.Output(
    pathlib.Path(_OUT.value),
    len(rows),
    batch.identity(
      rows,
      settings,
      ckpt=_CKPT.value,
      dtype=_DTYPE.value,
      quantize=_QUANTIZE.value,
    ),
  )
  if output.whole:
    print(f"{_OUT.value} is there already, made so: nothing to do.")
    return
  output.check()
  config = engine_lib.EngineConfig(
    cache_tokens=_CACHE_TOKENS.value,
    max_batch=_MAX_BATCH.value,
    guesses=_GUESSES.value or (4 if _DRAFT.value else 0),
  )
  llama, draft = _load(), None
  if _DRAFT.value:
    draft = llama_lib.load(
      _DRAFT.value, dtype=_DTYPE.value, knob="--draft", mesh=llama.mesh
    )
    draft.only_decode()
  print(batch.run(llama, rows, output, settings, config, draft))


def main(argv) -> None:
  del argv
  modes = (_PROMPT, _INFILL, _PROMPTS)
  if [_CHAT.value, *(one.value is not None for one in modes)].count(True) != 1:
    raise errors.UserError(
      "give one of --prompt=TEXT, --chat, --infill=FILE or --prompts=FILE."
    )
  if (_PROMPTS.value is None) != (_OUT.value is None):
    raise errors.UserError("--prompts=FILE and --out=FILE belong together.")
  for flag, mode, there in (
    *((one, "--prompts", _PROMPTS.value is not None) for one in _OF_FILES),
    (_SYSTEM, "--chat", _CHAT.value),
    (_HOLE, "--infill", _INFILL.value is not None),
  ):
    if flag.present and not there:
      raise errors.UserError(
        f"--{flag.name}={flag.value} does nothing without {mode}; leave it out."
      )
  from llama_jax.decoding import sampling
  from llama_jax.text import stream

  stream.check_stop_strings(_STOP.value)
  if _INFILL.value is not None:
    around = around_hole(_INFILL.value, _HOLE.value)
  temperature = _TEMPERATURE.value
  if temperature is None:
    temperature = 0.7 if _CHAT.value else 0.0
  sampling_config = sampling.SamplingConfig(
    temperature=temperature,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    min_p=_MIN_P.value,
    repetition_penalty=_REPETITION_PENALTY.value,
    presence_penalty=_PRESENCE_PENALTY.value,
    frequency_penalty=_FREQUENCY_PENALTY.value,
    seed=_SEED.value,
  )
  if _PROMPTS.value is not None:
    answer_file(sampling_config)
    return
  settings = {
    "max_new_tokens": _MAX_NEW_TOKENS.value,
    "sampling_config": sampling_config,
    "stop": _STOP.value,
  }
  llama = _load()
  if _CHAT.value:
    terminal.chat(llama, settings, _SYSTEM.value)
  elif _INFILL.value is not None:
    fill(llama, *around, settings)
  else:
    terminal.speak(llama, llama.encode_prompt(_PROMPT.value), settings)


if __name__ == "__main__":
  _CKPT = flags.DEFINE_string("ckpt", None, "orbax:DIR, hf:DIR or gguf:FILE.")
  _PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
  _CHAT = flags.DEFINE_boolean("chat", False, "Talk on the terminal.")
  _INFILL = flags.DEFINE_string("infill", None, "A file with a hole to fill.")
  _HOLE = flags.DEFINE_string("hole", "<FILL>", "What marks the hole there.")
  _SYSTEM = flags.DEFINE_string("system", None, "The chat's system message.")
  _TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "0 is greedy. Unset: 0 for a prompt, 0.7 in a chat."
  )
  _TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep this much probability.")
  _TOP_K = flags.DEFINE_integer("top_k", 0, "Keep the k likeliest; 0 all.")
  _MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "At most.")
  _SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
  _PROMPTS = flags.DEFINE_string("prompts", None, "JSONL to answer.")
  _OUT = flags.DEFINE_string("out", None, "JSONL with the answers.")
  _N = flags.DEFINE_integer("n", 1, "Answers to each row of --prompts.")
  _LOGPROBS = flags.DEFINE_integer(
    "logprobs", None, "Of each token, and of so many of the likeliest."
  )
  _MIN_NEW_TOKENS = flags.DEFINE_integer(
    "min_new_tokens",
    0,
    "Before so many no stop token is drawn; --stop ends it all the same.",
  )
  _CACHE_TOKENS = flags.DEFINE_integer(
    "cache_tokens", 16384, "Tokens whose keys and values there is room for."
  )
  _GUESSES = flags.DEFINE_integer(
    "guesses", 0, "Tokens guessed a forward; answers stay as they are."
  )
  _DRAFT = flags.DEFINE_string(
    "draft", None, "A smaller model that guesses; without it text is looked up."
  )
  _MAX_BATCH = flags.DEFINE_integer("max_batch", 32, "Answers at once.")
  _JSON_SCHEMA = flags.DEFINE_string(
    "json_schema", None, "A file; each answer to --prompts is JSON of it."
  )
  _REGEX = flags.DEFINE_string(
    "regex", None, "Each answer to --prompts matches it."
  )
  _MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Keep words so many times as likely as the likeliest."
  )
  _REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "Divides the logits of words that were there."
  )
  _PRESENCE_PENALTY = flags.DEFINE_float(
    "presence_penalty", 0.0, "Taken once from words the answer has."
  )
  _FREQUENCY_PENALTY = flags.DEFINE_float(
    "frequency_penalty", 0.0, "Taken each time from words the answer has."
  )
  _STOP = flags.DEFINE_multi_string(
    "stop", [], "Text that ends the answer, as in $'\\n\\n'; repeatable."
  )
  _DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Compute dtype."
  )
  _QUANTIZE = flags.DEFINE_enum(
    "quantize", "", ["", "int8", "int4"], "Weights in so many bits."
  )
  # What only a file of prompts has.
  _OF_FILES = (
    _N,
    _LOGPROBS,
    _MIN_NEW_TOKENS,
    _CACHE_TOKENS,
    _GUESSES,
    _DRAFT,
    _MAX_BATCH,
    _JSON_SCHEMA,
    _REGEX,
  )
  _PARALLEL = shell.define_parallel()
  shell.run(main)
