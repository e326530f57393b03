"""Text <-> ids: tokenizers of the LLaMA family, chats, streams of text."""

import base64
import binascii
import pathlib
from collections.abc import Mapping
from typing import Any

from llama_jax import errors
from llama_jax.text import files, gguf_header
from llama_jax.text import folder as folder_lib
from llama_jax.text.tokenizer import Tokenizer

__all__ = [
  "Tokenizer",
  "find_tokenizer",
  "from_gguf_metadata",
  "load_tokenizer",
]


def load_tokenizer(path) -> Tokenizer:
  """The tokenizer of a GGUF file, tokenizer.json, tokenizer.model or folder.

  A file is told by what it holds, whatever its name. Files beside it
  (tokenizer_config.json, generation_config.json...) are read too.

  Raises:
    BadFileError: nothing there, or not one of these, or damaged.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    found = find_tokenizer(path)
    if found is None:
      raise errors.BadFileError(
        f"{path} holds no tokenizer; expected {folder_lib.TOKENIZER_JSON} or"
        f" {folder_lib.SENTENCEPIECE}."
      )
    return found
  start = _start(path, len(gguf_header.MAGIC))
  if start == gguf_header.MAGIC:
    return from_gguf_metadata(gguf_header.read(path).metadata, str(path))
  content = _start(path, _MAX_BYTES + 1)
  if len(content) > _MAX_BYTES:
    raise errors.BadFileError(
      f"{path} is larger than any tokenizer; expected a GGUF file,"
      " tokenizer.json or tokenizer.model."
    )
  if content.lstrip()[:1] == b"{":
    from llama_jax.text import byte_bpe

    return byte_bpe.from_spec(content, str(path), path.parent)
  if content[:1] == _PIECE_TAG:
    from llama_jax.text import sentencepiece_bpe

    settings = folder_lib.read_settings(path.parent)
    return sentencepiece_bpe.from_model(content, str(path), settings)
  if _is_tiktoken(content):
    raise errors.BadFileError(
      f"{path} holds tiktoken ranks, which are not read yet; use the"
      " tokenizer.json of the same model."
    )
  raise errors.BadFileError(
    f"{path} is no tokenizer; expected a GGUF file, tokenizer.json or"
    " tokenizer.model (SentencePiece)."
  )


def find_tokenizer(folder) -> Tokenizer | None:
  """The tokenizer of a folder; None if it has no tokenizer files.

  Raises:
    BadFileError: it has one that is damaged.
  """
  folder = pathlib.Path(folder)
  model = folder / folder_lib.SENTENCEPIECE
  whole = folder / folder_lib.TOKENIZER_JSON
  # Where both are, tokenizer.json is a conversion of a SentencePiece model;
  # beside a tiktoken file it is the one to read.
  if model.exists() and (not whole.exists() or _start(model, 1) == _PIECE_TAG):
    return load_tokenizer(model)
  return load_tokenizer(whole) if whole.exists() else None


def from_gguf_metadata(
  fields: Mapping[str, Any], name: str = "GGUF file"
) -> Tokenizer:
  """The tokenizer in GGUF metadata: key -> plain Python value.

  Raises:
    BadFileError: the metadata has none, or contradicts itself.
    UserError: it is of a kind that is not known here.
  """
  kind = fields.get("tokenizer.ggml.model")
  try:
    if kind == "gpt2":
      from llama_jax.text import byte_bpe

      return byte_bpe.from_gguf_metadata(fields, name)
    if kind == "llama":
      from llama_jax.text import sentencepiece_bpe

      return sentencepiece_bpe.from_gguf_metadata(fields, name)
  except (AttributeError, TypeError, KeyError, ValueError) as error:
    if isinstance(error, errors.UserError):
      raise
    raise errors.BadFileError(
      f"{name}: its tokenizer.ggml fields are of the wrong type ({error})."
    ) from error
  if kind is None:
    raise errors.BadFileError(
      f"{name} has no tokenizer.ggml.model; name a tokenizer by itself."
    )
  raise errors.UserError(
    f"{name}: tokenizer.ggml.model={kind!r} is not known here; known are"
    " 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)."
  )


# The largest tokenizer.json known to us has some 35 MB; weights have more.
_MAX_BYTES = 256 * 2**20
_PIECE_TAG = b"\n"  # a ModelProto starts with its first piece


def _start(path: pathlib.Path, count: int) -> bytes:
  """The first bytes of a file, or all where there are fewer."""
  with files.opened(path) as file:
    return file.read(count)


def _is_tiktoken(content: bytes) -> bool:
  token, _, rank = content.split(b"\n", 1)[0].partition(b" ")
  try:
    return bool(base64.b64decode(token, validate=True)) and rank.isdigit()
  except binascii.Error:
    return False
