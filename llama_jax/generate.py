"""Continues a prompt, or talks.

  python -m llama_jax.generate --ckpt=REF --prompt=TEXT
  python -m llama_jax.generate --ckpt=REF --chat
    [--temperature --top_p --top_k --max_new_tokens --seed --stop=TEXT ...]

The text streams as it is decoded. In a chat, Ctrl-C stops an answer, /reset
forgets the conversation, and Ctrl-D or /exit ends.
"""

import sys

from absl import flags

from llama_jax import errors, shell


def speak(llama, prompt: list[int], settings) -> str:
  """Prints an answer as it comes; returns it whole. Ctrl-C cuts it short."""
  parts = []
  try:
    for piece in llama.stream(prompt, **settings):
      parts.append(piece)
      print(piece, end="", flush=True)
  except KeyboardInterrupt:
    if not _CHAT.value:
      raise
    print(" [stopped]", end="")
  print(flush=True)
  return "".join(parts)


def chat(llama, settings) -> None:
  """A conversation on the terminal with the model's own template."""
  opening = []
  if _SYSTEM.value:
    opening.append({"role": "system", "content": _SYSTEM.value})
  # Refused before the first word where the model has no template.
  llama.encode_chat([*opening, {"role": "user", "content": "?"}])
  messages = list(opening)
  if sys.stdin.isatty():
    print("Ctrl-C stops an answer, /reset forgets, Ctrl-D or /exit ends.")
  while True:
    try:
      said = input("you> " if sys.stdin.isatty() else "").strip()
    except EOFError:
      return
    except KeyboardInterrupt:
      print()
      return
    if said == "/exit":
      return
    if said == "/reset":
      messages = list(opening)
      continue
    if not said:
      continue
    turn = [*messages, {"role": "user", "content": said}]
    try:
      prompt = llama.encode_chat(turn)
      room = llama.config.context_length - len(prompt)
      allowed = max(1, min(settings["max_new_tokens"], room))
      answer = speak(llama, prompt, settings | {"max_new_tokens": allowed})
    except errors.UserError as error:
      print(f"error: {error} (/reset begins anew)", file=sys.stderr)
      continue
    messages = [*turn, {"role": "assistant", "content": answer}]


def main(argv) -> None:
  del argv
  if _CHAT.value == (_PROMPT.value is not None):
    raise errors.UserError("give either --prompt=TEXT or --chat.")
  from llama_jax import llama as llama_lib
  from llama_jax.decoding import sampling
  from llama_jax.text import stream

  stream.check_stop_strings(_STOP.value)
  temperature = _TEMPERATURE.value
  if temperature is None:
    temperature = 0.7 if _CHAT.value else 0.0
  settings = {
    "max_new_tokens": _MAX_NEW_TOKENS.value,
    "sampling_config": sampling.SamplingConfig(
      temperature=temperature,
      top_k=_TOP_K.value,
      top_p=_TOP_P.value,
      seed=_SEED.value,
    ),
    "stop": _STOP.value,
  }
  llama = llama_lib.load(_CKPT.value, dtype=_DTYPE.value, knob="--ckpt")
  if _CHAT.value:
    chat(llama, settings)
  else:
    speak(llama, llama.encode_prompt(_PROMPT.value), settings)


if __name__ == "__main__":
  _CKPT = flags.DEFINE_string("ckpt", None, "orbax:DIR, hf:DIR or gguf:FILE.")
  _PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
  _CHAT = flags.DEFINE_boolean("chat", False, "Talk on the terminal.")
  _SYSTEM = flags.DEFINE_string("system", None, "The chat's system message.")
  _TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "0 is greedy. Unset: 0 for a prompt, 0.7 in a chat."
  )
  _TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep this much probability.")
  _TOP_K = flags.DEFINE_integer("top_k", 0, "Keep the k likeliest; 0 all.")
  _MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "At most.")
  _SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
  _STOP = flags.DEFINE_multi_string(
    "stop", [], "Text that ends the answer, as in $'\\n\\n'; repeatable."
  )
  _DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Compute dtype."
  )
  shell.run(main)
