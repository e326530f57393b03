"""What tokenizer.ggml.* says beside a vocabulary, in Hugging Face's words."""

from collections.abc import Mapping
from typing import Any

from llama_jax import errors
from llama_jax.text import folder as folder_lib
from llama_jax.text import tokenizer as tokenizer_lib

# Key -> the role's name.
_ROLES = {
  "bos": "bos_token",
  "eos": "eos_token",
  "unknown": "unk_token",
  "padding": "pad_token",
}


def read_settings(
  fields: Mapping[str, Any], name: str, *, add_bos: bool
) -> folder_lib.Settings:
  """Roles, stop ids and template; what folder.read_settings is to a folder.

  fields: key -> plain value; `name` of the file is for messages.
  add_bos: the family's habit, where the fields say nothing.

  Raises:
    BadFileError: an id lies outside the vocabulary.
  """
  tokens = fields["tokenizer.ggml.tokens"]

  def checked(key: str) -> int | None:
    id = fields.get(f"tokenizer.ggml.{key}_token_id")
    if id is not None and not 0 <= id < len(tokens):
      raise errors.BadFileError(
        f"{name}: tokenizer.ggml.{key}_token_id={id} is not below the"
        f" {len(tokens)} tokens."
      )
    return id

  named = {
    role: tokens[id]
    for key, role in _ROLES.items()
    if (id := checked(key)) is not None
  }
  stops = (checked("eot"), checked("eom"))
  return folder_lib.Settings(
    conventions=tokenizer_lib.Conventions(
      named=named,
      add_bos=bool(fields.get("tokenizer.ggml.add_bos_token", add_bos)),
      stop_ids=tuple(id for id in stops if id is not None),
      chat_template=fields.get("tokenizer.chat_template"),
    ),
    added={},
    plain={},
    config={},
  )
