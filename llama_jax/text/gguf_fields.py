"""What tokenizer.ggml.* says around a vocabulary, in Hugging Face's words."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax import errors
from llama_jax.text import folder as folder_lib
from llama_jax.text import tokenizer as tokenizer_lib

PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
# What is left of a stop set when eos, eot and eom have had their three.
_STOPS = "tokenizer.llama_jax.stop_token_ids"

# Kinds of tokens, numbered as SentencePiece does.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Key -> the role's name.
_ROLES = {
  "bos": "bos_token",
  "eos": "eos_token",
  "unknown": "unk_token",
  "padding": "pad_token",
}
# Names that llama.cpp's two further stop ids have in the models we know.
_EOT_NAMES = ("<|eot_id|>", "<|eot|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
_EOM_NAMES = ("<|eom_id|>", "<|eom|>")

# llama.cpp's converter fills the rows of an embedding that have no token so.
_PAD = "[PAD{}]"
_PAD_PATTERN = re.compile(r"\[PAD\d+\]")


def blank(size: int) -> list[str]:
  """Tokens for ids that stand for nothing; their kind is UNUSED."""
  return [_PAD.format(id) for id in range(size)]


def read_tokens(
  fields: Mapping[str, Any], name: str
) -> tuple[list[str], list[int]]:
  """Tokens and their kinds, without the padding at their end.

  Raises:
    BadFileError: one is missing, they differ in number or are of other types.
  """
  tokens = fields.get(PREFIX + "tokens")
  if not tokens:
    raise errors.BadFileError(f"{name}: {PREFIX}tokens is needed.")
  kinds = fields.get(PREFIX + "token_type") or [NORMAL] * len(tokens)
  if len(kinds) != len(tokens):
    raise errors.BadFileError(
      f"{name}: {len(tokens)} tokens, but {len(kinds)} token types; they must"
      " be as many."
    )
  if not all(isinstance(text, str) for text in tokens):
    raise errors.BadFileError(f"{name}: {PREFIX}tokens are not all strings.")
  # llama.cpp's 0 is "undefined".
  kinds = [kind or NORMAL for kind in kinds]
  size = len(tokens)
  while (
    size
    and kinds[size - 1] == UNUSED
    and _PAD_PATTERN.fullmatch(tokens[size - 1])
  ):
    size -= 1
  return tokens[:size], kinds[:size]


def read_settings(
  fields: Mapping[str, Any],
  tokens: Sequence[str],
  name: str,
  *,
  add_bos: bool,
) -> folder_lib.Settings:
  """Roles, stop ids and template; what folder.read_settings is to a folder.

  fields: key -> plain value; `name` of the file is for messages.
  add_bos: the family's habit, where the fields say nothing.

  Raises:
    BadFileError: an id lies outside the vocabulary.
  """

  def checked(key: str) -> int | None:
    id = fields.get(f"{PREFIX}{key}_token_id")
    if id is not None and not 0 <= id < len(tokens):
      raise errors.BadFileError(
        f"{name}: {PREFIX}{key}_token_id={id} is not below the {len(tokens)}"
        " tokens."
      )
    return id

  named = {
    role: tokens[id]
    for key, role in _ROLES.items()
    if (id := checked(key)) is not None
  }
  stops = (checked("eot"), checked("eom"), *fields.get(_STOPS, ()))
  template = fields.get(_TEMPLATE)
  return folder_lib.Settings(
    conventions=tokenizer_lib.Conventions(
      named=named,
      add_bos=bool(fields.get(PREFIX + "add_bos_token", add_bos)),
      stop_ids=tuple(id for id in stops if id is not None),
      chat_template=template if isinstance(template, str) else None,
    ),
    added={},
    plain={},
    config={},
  )


def write(
  tokenizer: tokenizer_lib.Tokenizer, vocabulary: Mapping[str, Any]
) -> dict[str, Any]:
  """The fields of a tokenizer.

  vocabulary: what the family says, keys without their prefix.
  """
  fields = {PREFIX + key: value for key, value in vocabulary.items()}
  for key, role in _ROLES.items():
    id = tokenizer.special_tokens.get(tokenizer.named_tokens.get(role))
    if id is not None:
      fields[f"{PREFIX}{key}_token_id"] = id
  fields.update(_further_stops(tokenizer))
  fields[PREFIX + "add_bos_token"] = tokenizer.add_bos
  fields[PREFIX + "add_eos_token"] = False
  if tokenizer.chat_template is not None:
    fields[_TEMPLATE] = tokenizer.chat_template
  return fields


def _further_stops(tokenizer: tokenizer_lib.Tokenizer) -> dict[str, Any]:
  """The stop ids that eos leaves, as far as their names do not say it."""
  text_of = {id: text for text, id in tokenizer.special_tokens.items()}
  rest = [id for id in tokenizer.stop_ids if id != tokenizer.eos_id]
  found = {}
  for key, names in (("eot", _EOT_NAMES), ("eom", _EOM_NAMES)):
    by_name = [id for id in rest if text_of.get(id) in names]
    if by_name:
      found[f"{PREFIX}{key}_token_id"] = by_name[0]
  unsaid = [id for id in rest if text_of.get(id) not in tokenizer_lib.END_NAMES]
  for key in ("eot", "eom"):
    if unsaid and f"{PREFIX}{key}_token_id" not in found:
      found[f"{PREFIX}{key}_token_id"] = unsaid.pop(0)
  if unsaid:
    found[_STOPS] = unsaid
  return found
