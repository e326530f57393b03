"""A SentencePiece model <-> tokenizer.ggml.* of a GGUF file."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as model_pb2

from llama_jax import errors
from llama_jax.text import folder as folder_lib
from llama_jax.text import gguf_fields
from llama_jax.text import tokenizer as tokenizer_lib

_PREFIX = gguf_fields.PREFIX
_NEVER_TRAINED = (
  gguf_fields.CONTROL,
  gguf_fields.USER_DEFINED,
  gguf_fields.UNUSED,
)


def read(
  fields: Mapping[str, Any], name: str
) -> tuple[bytes, folder_lib.Settings]:
  """A ModelProto, and what the fields say beside it.

  fields: key -> plain value; `name` of the file is for messages.

  Raises:
    BadFileError: a field is missing or contradicts another.
  """
  tokens, kinds = gguf_fields.read_tokens(fields, name)
  scores = fields.get(_PREFIX + "scores")
  if not scores or not fields.get(_PREFIX + "token_type"):
    raise errors.BadFileError(
      f"{name}: {_PREFIX}tokens, .scores and .token_type are needed."
    )
  if len(scores) != len(fields[_PREFIX + "tokens"]):
    raise errors.BadFileError(
      f"{name}: {len(fields[_PREFIX + 'tokens'])} tokens, but {len(scores)}"
      " scores; they must be as many."
    )
  settings = gguf_fields.read_settings(fields, tokens, name, add_bos=True)
  named = settings.conventions.named
  size, settings = _without_added(fields, tokens, kinds, settings)
  proto = model_pb2.ModelProto()
  for id in range(size):
    proto.pieces.add(piece=tokens[id], score=scores[id], type=kinds[id])
  ids = {token: id for id, token in enumerate(tokens[:size])}
  unk = named.get("unk_token", "<unk>")
  if gguf_fields.UNKNOWN not in kinds and unk in ids:
    proto.pieces[ids[unk]].type = gguf_fields.UNKNOWN
  trainer = proto.trainer_spec
  trainer.model_type = model_pb2.TrainerSpec.BPE
  trainer.vocab_size = size
  trainer.byte_fallback = gguf_fields.BYTE in kinds
  for role, default in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", -1)):
    text = named.get(f"{role}_token")
    setattr(trainer, f"{role}_id", ids.get(text, default))
    if text:
      setattr(trainer, f"{role}_piece", text)
  normalizer = proto.normalizer_spec
  normalizer.name = "identity"
  normalizer.add_dummy_prefix = bool(
    fields.get(_PREFIX + "add_space_prefix", True)
  )
  normalizer.remove_extra_whitespaces = bool(
    fields.get(_PREFIX + "remove_extra_whitespaces", False)
  )
  charsmap = fields.get(_PREFIX + "precompiled_charsmap")
  if charsmap:
    normalizer.precompiled_charsmap = bytes(b % 256 for b in charsmap)
  return proto.SerializeToString(), settings


def _without_added(
  fields: Mapping[str, Any],
  tokens: Sequence[str],
  kinds: Sequence[int],
  settings: folder_lib.Settings,
) -> tuple[int, folder_lib.Settings]:
  """How many tokens are pieces of the model, and settings that hold the others:
  the end from the first that was added after training and any text may spell.
  """
  listed = set(fields.get(_PREFIX + "added_tokens", ()))
  size = start = len(tokens)
  while start and kinds[start - 1] in _NEVER_TRAINED:
    start -= 1
    if kinds[start] == gguf_fields.USER_DEFINED and tokens[start] in listed:
      size = start
  ends = [(tokens[id], id) for id in range(size, len(tokens))]
  return size, dataclasses.replace(
    settings,
    added={
      text: tokenizer_lib.Special(text, id)
      for text, id in ends
      if kinds[id] == gguf_fields.CONTROL
    },
    plain={
      text: id for text, id in ends if kinds[id] == gguf_fields.USER_DEFINED
    },
  )


def write(
  proto: model_pb2.ModelProto,
  plain: Mapping[str, int],
  tokenizer: tokenizer_lib.Tokenizer,
) -> dict[str, Any]:
  """What `read` reads; see Tokenizer.gguf_metadata.

  proto: with every token of the folder among its pieces; those of `plain` any
    text may spell.

  Raises:
    UserError: it is no BPE model.
  """
  if proto.trainer_spec.model_type != model_pb2.TrainerSpec.BPE:
    raise errors.UserError(
      "GGUF cannot hold this tokenizer: it is a SentencePiece model, but not"
      " BPE. Keep it as tokenizer.model beside the weights (hf:)."
    )
  plain_ids = set(plain.values())
  normalizer = proto.normalizer_spec
  vocabulary = {
    "model": "llama",
    "pre": "default",
    "tokens": [piece.piece for piece in proto.pieces],
    "scores": [piece.score for piece in proto.pieces],
    "token_type": [
      gguf_fields.USER_DEFINED if id in plain_ids else piece.type
      for id, piece in enumerate(proto.pieces)
    ],
    "add_space_prefix": normalizer.add_dummy_prefix,
    "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
  }
  if plain:
    vocabulary["added_tokens"] = sorted(plain, key=plain.get)
  if normalizer.precompiled_charsmap:
    vocabulary["precompiled_charsmap"] = list(normalizer.precompiled_charsmap)
  return gguf_fields.write(tokenizer, vocabulary)
