"""The files beside a vocabulary in a Hugging Face folder.

They say which tokens are special, what begins and ends a text, and how a chat
is written. Both families read and write them here.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from llama_jax import errors
from llama_jax.text import files
from llama_jax.text import tokenizer as tokenizer_lib

CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
LLAMA2C = "tokenizer.bin"
# Where Meta's repositories on Hugging Face keep Llama 3's: llama.cpp's
# converter takes a tokenizer.model beside config.json for SentencePiece.
RANKS = "original/tokenizer.model"
_META = "params.json"  # only a folder for Meta's own code has it

# Files that would speak for another tokenizer if they stayed after a save.
_REPLACED = (
  TOKENIZER_JSON,
  SENTENCEPIECE,
  RANKS,
  "chat_template.jinja",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the folder says beside the vocabulary.

  added: token text -> its Special (the id may still be -1: by text alone).
  plain: token text -> id of added tokens that a user's text may spell.
  config: tokenizer_config.json as it was.
  """

  conventions: tokenizer_lib.Conventions
  added: Mapping[str, tokenizer_lib.Special]
  plain: Mapping[str, int]
  config: Mapping[str, Any]


def read_settings(folder: pathlib.Path) -> Settings:
  """Reads what is there; every file is optional.

  Raises:
    BadFileError: a file is there and cannot be read, or makes no sense.
  """
  try:
    return _settings(folder)
  except errors.UserError:
    raise
  except (AttributeError, LookupError, TypeError, ValueError) as error:
    raise errors.BadFileError(
      f"{CONFIG} or a file beside it in {folder} is malformed:"
      f" {type(error).__name__}: {error}."
    ) from error


def _settings(folder: pathlib.Path) -> Settings:
  config = _read_json(folder / CONFIG)
  old_map = _read_json(folder / "special_tokens_map.json")
  named, extra = {}, []
  for source in (old_map, config):
    for key, value in source.items():
      if key in ("additional_special_tokens", "extra_special_tokens"):
        found = value.values() if isinstance(value, dict) else value or ()
        extra += [_token_text(v) for v in found]
      elif key.endswith("_token") and _token_text(value):
        named[key] = _token_text(value)

  added, plain = {}, {}
  for text, id in _read_json(folder / "added_tokens.json").items():
    if not isinstance(id, int):
      raise TypeError(f"added_tokens.json gives {text!r} the id {id!r}")
    plain[text] = id
  for id, entry in (config.get("added_tokens_decoder") or {}).items():
    text = _token_text(entry)
    if text is None or not str(id).isdecimal():
      raise errors.BadFileError(
        f"{folder / CONFIG}: added_tokens_decoder[{id!r}] is no token."
      )
    if entry.get("special"):
      plain.pop(text, None)
      added[text] = tokenizer_lib.Special(
        text,
        int(id),
        lstrip=bool(entry.get("lstrip")),
        rstrip=bool(entry.get("rstrip")),
      )
    else:
      plain[text] = int(id)
  for text in [*named.values(), *extra]:
    if text and text not in added:
      added[text] = tokenizer_lib.Special(text, plain.pop(text, -1))

  stops = []
  for name in (GENERATION, "config.json"):
    value = _read_json(folder / name).get("eos_token_id")
    stops += value if isinstance(value, list) else [value]
  return Settings(
    conventions=tokenizer_lib.Conventions(
      named=named,
      add_bos=config.get("add_bos_token"),
      stop_ids=tuple(i for i in stops if isinstance(i, int)),
      chat_template=_chat_template(folder, config),
    ),
    added=added,
    plain=plain,
    config=config,
  )


def write(
  folder,
  tokenizer: tokenizer_lib.Tokenizer,
  vocabulary: Mapping[str, bytes],
  config: Mapping[str, Any],
) -> None:
  """Writes the vocabulary and what goes beside it, each file whole.

  vocabulary: file name -> content. A folder of Meta's gets its tokenizer.model
    too.
  config: what the family adds to tokenizer_config.json. The ids that end a
    turn go to generation_config.json, the rest of which stays.
  """
  folder = pathlib.Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    model = tokenizer.model_file() if (folder / _META).exists() else None
    if model is not None:
      vocabulary = {**vocabulary, SENTENCEPIECE: model}
    generation = _read_json(folder / GENERATION)
    generation.pop("eos_token_id", None)
    generation.update(special_ids(tokenizer))
    settings = {
      **config,
      **tokenizer.named_tokens,
      "add_bos_token": tokenizer.add_bos,
    }
    settings.pop("chat_template", None)
    if tokenizer.chat_template is not None:
      settings["chat_template"] = tokenizer.chat_template
    for name, content in vocabulary.items():
      (folder / name).parent.mkdir(exist_ok=True)
      files.write(folder / name, content)
    files.write_json(folder / CONFIG, settings)
    files.write_json(folder / GENERATION, generation)
    for stale in _REPLACED:
      if stale not in vocabulary:
        (folder / stale).unlink(missing_ok=True)
  except OSError as error:
    raise errors.UserError(
      f"cannot write a tokenizer to {folder}: {error.strerror}."
    ) from error


def special_ids(tokenizer: tokenizer_lib.Tokenizer) -> dict[str, Any]:
  """bos_token_id and eos_token_id, a list where several ids end a turn."""
  ids: dict[str, Any] = {}
  if tokenizer.bos_id is not None:
    ids["bos_token_id"] = tokenizer.bos_id
  stops = list(tokenizer.stop_ids)
  if stops:
    ids["eos_token_id"] = stops[0] if len(stops) == 1 else stops
  return ids


def bos_processor(bos: str, id: int) -> dict[str, Any]:
  """The post-processor of a tokenizer.json that puts bos before every text."""
  special = {"SpecialToken": {"id": bos, "type_id": 0}}
  first = {"Sequence": {"id": "A", "type_id": 0}}
  return {
    "type": "TemplateProcessing",
    "single": [special, first],
    "pair": [special, first, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
  }


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; {} if there is no such file."""
  return files.read_json(path) if path.exists() else {}


def _chat_template(folder: pathlib.Path, config: Mapping) -> str | None:
  path = folder / "chat_template.jinja"
  if path.exists():
    with files.opened(path) as file:
      return file.read(files.MAX_JSON_BYTES).decode()
  template = config.get("chat_template")
  if isinstance(template, list):  # several, by name
    by_name = {t.get("name"): t.get("template") for t in template}
    template = by_name.get("default")
  return template if isinstance(template, str) else None


def _token_text(value: Any) -> str | None:
  if isinstance(value, dict):
    value = value.get("content")
  return value if isinstance(value, str) else None
