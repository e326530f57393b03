"""Text <-> ids: tokenizers of the LLaMA family, chats, streams of text."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from llama_jax import errors
from llama_jax.text import byte_level, files, gguf_header, llama2c
from llama_jax.text import folder as folder_lib
from llama_jax.text.tokenizer import Tokenizer

__all__ = [
  "Tokenizer",
  "find_tokenizer",
  "from_gguf_metadata",
  "load_tokenizer",
]


def load_tokenizer(path) -> Tokenizer:
  """The tokenizer of a file or of a model folder.

  A file is told by what it holds, whatever its name: GGUF, tokenizer.json,
  SentencePiece's or Llama 3's tokenizer.model, llama2.c's tokenizer.bin. Files
  beside it (tokenizer_config.json, generation_config.json...) are read too.

  Raises:
    BadFileError: nothing there, or not one of these, or damaged.
    UserError: it is of a kind that is not known here.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    found = find_tokenizer(path)
    if found is None:
      raise errors.BadFileError(
        f"{path} holds no tokenizer; expected one of {', '.join(_NAMES)}."
      )
    return found
  content = _read(path)
  if content[: len(gguf_header.MAGIC)] == gguf_header.MAGIC:
    return from_gguf_metadata(gguf_header.read(path).metadata, str(path))
  if content.lstrip()[:1] == b"{":
    from llama_jax.text import byte_bpe

    return byte_bpe.from_spec(content, str(path), path.parent)
  if content[:1] == _PIECE_TAG:
    from llama_jax.text import sentencepiece_bpe

    settings = folder_lib.read_settings(path.parent)
    return sentencepiece_bpe.from_model(content, str(path), settings)
  if byte_level.is_ranks(content):
    from llama_jax.text import tiktoken_bpe

    settings = folder_lib.read_settings(path.parent)
    return tiktoken_bpe.from_ranks(content, str(path), settings)
  if llama2c.is_vocabulary(content):
    return from_gguf_metadata(llama2c.metadata(content), str(path))
  raise errors.BadFileError(
    f"{path} is no tokenizer; expected a GGUF file, tokenizer.json,"
    " tokenizer.model (SentencePiece or Llama 3's) or llama2.c's tokenizer.bin."
  )


def find_tokenizer(folder) -> Tokenizer | None:
  """The tokenizer of a folder; None if it has no tokenizer files.

  Raises:
    BadFileError: it has one that is damaged.
  """
  folder = pathlib.Path(folder)
  whole = folder / folder_lib.TOKENIZER_JSON
  models = [
    folder / name
    for name in (folder_lib.SENTENCEPIECE, folder_lib.RANKS)
    if (folder / name).exists()
  ]
  if not whole.exists():
    others = (*models, folder / folder_lib.LLAMA2C)
    return next((load_tokenizer(p) for p in others if p.exists()), None)
  # Where both are, tokenizer.json is a conversion of a SentencePiece model; of
  # ranks too, unless tokens were added to them since.
  for model in models:
    start = _start(model, 1024)
    if start[:1] == _PIECE_TAG:
      return load_tokenizer(model)
    if byte_level.is_ranks(start):
      from llama_jax.text import byte_bpe, tiktoken_bpe

      ranks = tiktoken_bpe.parse(_read(model), str(model))
      return byte_bpe.from_spec(_read(whole), str(whole), folder, ranks)
  return load_tokenizer(whole)


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
  except _WRONG_TYPES as error:
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


# What Python raises where a value is of another type or size than it should.
_WRONG_TYPES = (
  ArithmeticError,
  AttributeError,
  LookupError,
  TypeError,
  ValueError,
)
_NAMES = (
  folder_lib.TOKENIZER_JSON,
  folder_lib.SENTENCEPIECE,
  folder_lib.RANKS,
  folder_lib.LLAMA2C,
)
# The largest tokenizer.json known to us has some 35 MB; weights have more.
_MAX_BYTES = 64 * 2**20
_PIECE_TAG = b"\n"  # a ModelProto starts with its first piece


def _start(path: pathlib.Path, count: int) -> bytes:
  """The first bytes of a file, or all where there are fewer."""
  with files.opened(path) as file:
    return file.read(count)


def _read(path: pathlib.Path) -> bytes:
  """What a file holds; of a GGUF file the first bytes only."""
  start = _start(path, len(gguf_header.MAGIC))
  if start == gguf_header.MAGIC:
    return start
  with files.opened(path) as file:
    if os.fstat(file.fileno()).st_size > _MAX_BYTES:
      raise errors.BadFileError(
        f"{path} is larger than any tokenizer; expected a GGUF file,"
        " tokenizer.json or tokenizer.model."
      )
    return file.read()
