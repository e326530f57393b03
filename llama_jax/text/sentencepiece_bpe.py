"""SentencePiece BPE (Llama 1 and 2): tokenizer.model, or the same in GGUF.

A tokenizer is one ModelProto. Tokens that a folder adds beyond its pieces are
appended to a copy of it as CONTROL pieces, which no text can spell. Those that
are not special are cut out of a text before it gets there, as transformers
does, so that the text on either side starts anew.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import sentencepiece
from google.protobuf import message as protobuf
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from llama_jax import errors
from llama_jax.text import folder as folder_lib
from llama_jax.text import sentencepiece_gguf
from llama_jax.text import tokenizer as tokenizer_lib

_Piece = model_pb2.ModelProto.SentencePiece
_SPACE = "\u2581"
# Ids between two tokens that nothing names.
_MAX_GAP = 65_536
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# A name for an id that nothing names. It is no piece in use, so no text that
# spells it becomes that id.
_GAP = "<unused {}>"
# Code Llama's infilling tokens, and what ends a turn of its 70B. In its own
# tokenizer.model they are common pieces, which a user's text would spell.
_CODE_LLAMA = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "<step>")


class SentencePieceBpe(tokenizer_lib.Tokenizer):
  """A ModelProto at work.

  content: the bytes of a tokenizer.model, written back unchanged by `save`.
  """

  def __init__(self, content: bytes, settings: folder_lib.Settings):
    self._content = content
    self._config = dict(settings.config)
    self._settings = settings
    proto = model_pb2.ModelProto()
    proto.ParseFromString(content)
    _check(proto)
    original = len(proto.pieces)
    named = _names(proto, settings.conventions.named)
    _extend(proto, settings)
    ids = {piece.piece: id for id, piece in enumerate(proto.pieces)}
    stops = set(settings.conventions.stop_ids)
    for text in {*settings.added, *named.values(), *_CODE_LLAMA}:
      if text in ids:
        _make_special(proto.pieces[ids[text]])
    self._plain = tokenizer_lib.PlainTokens(
      {
        text: id
        for text, id in settings.plain.items()
        if id >= original and id not in stops
      }
    )
    plain_ids = set(self._plain.ids.values())
    flags = settings.added
    specials = [
      tokenizer_lib.Special(
        piece.piece,
        id,
        lstrip=piece.piece in flags and flags[piece.piece].lstrip,
        rstrip=piece.piece in flags and flags[piece.piece].rstrip,
      )
      for id, piece in enumerate(proto.pieces)
      if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN) and id not in plain_ids
    ]
    self._proto = proto
    self._library = sentencepiece.SentencePieceProcessor()
    self._library.LoadFromSerializedProto(proto.SerializeToString())
    add_bos = settings.conventions.add_bos
    super().__init__(
      vocab_size=len(proto.pieces),
      specials=specials,
      conventions=tokenizer_lib.Conventions(
        named=named,
        add_bos="bos_token" in named if add_bos is None else add_bos,
        stop_ids=settings.conventions.stop_ids,
        chat_template=settings.conventions.chat_template,
      ),
      byte_errors=tokenizer_lib.EACH_BYTE,
    )

  def __getstate__(self) -> dict[str, Any]:
    """For other processes; the library's class of the model has no name."""
    return {**self.__dict__, "_proto": self._proto.SerializeToString()}

  def __setstate__(self, state: dict[str, Any]) -> None:
    proto = model_pb2.ModelProto.FromString(state["_proto"])
    self.__dict__.update(state, _proto=proto)

  def save(self, folder) -> None:
    """Writes tokenizer.model, tokenizer_config.json, generation_config.json,
    and a tokenizer.json for transformers: its own conversion of a
    tokenizer.model (5.23) merges runs of spaces in another order."""
    flags = self._settings.added
    decoder = {
      str(id): _entry(text, True, flags.get(text))
      for text, id in self.special_tokens.items()
    }
    decoder.update(
      {
        str(id): _entry(piece.piece.replace(_SPACE, " "), False, None)
        for id, piece in enumerate(self._proto.pieces)
        if piece.type == _Piece.USER_DEFINED or piece.piece in self._plain.ids
      }
    )
    config = {**self._config, "added_tokens_decoder": decoder}
    vocabulary = {folder_lib.SENTENCEPIECE: self._content}
    normalizer = self._proto.normalizer_spec
    if (
      self._proto.trainer_spec.model_type == model_pb2.TrainerSpec.BPE
      and not normalizer.precompiled_charsmap
      and not normalizer.remove_extra_whitespaces
    ):
      config["tokenizer_class"] = "PreTrainedTokenizerFast"
      vocabulary[folder_lib.TOKENIZER_JSON] = self._as_json(decoder)
    else:
      # "legacy" is transformers' word for a space after every special token,
      # which is what SentencePiece, and so Meta's code, does.
      config.setdefault("tokenizer_class", "LlamaTokenizer")
      config["legacy"] = True
    folder_lib.write(folder, self, vocabulary, config)

  def gguf_metadata(self) -> dict[str, Any]:
    return sentencepiece_gguf.write(self._proto, self._plain.ids, self)

  def model_file(self) -> bytes:
    return self._content

  def _as_json(self, added: Mapping[str, Any]) -> bytes:
    """The same vocabulary in the words of the `tokenizers` library."""
    vocab = {piece.piece: id for id, piece in enumerate(self._proto.pieces)}
    ranked = []
    joinable = {
      piece.piece: piece.score
      for piece in self._proto.pieces
      if piece.type == _Piece.NORMAL
    }
    for text, score in joinable.items():
      for cut in range(1, len(text)):
        left, right = text[:cut], text[cut:]
        if left in joinable and right in joinable:
          ranked.append((-score, vocab[left], vocab[right], left, right))
    space = {"pattern": {"String": _SPACE}, "content": " "}
    prefix, strip = [], []
    if self._proto.normalizer_spec.add_dummy_prefix:
      prefix = [{"type": "Prepend", "prepend": _SPACE}]
      strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    unk = self.named_tokens.get("unk_token")
    bos = self.named_tokens.get("bos_token")
    spec = {
      "version": "1.0",
      "truncation": None,
      "padding": None,
      "added_tokens": [{"id": int(id), **e} for id, e in added.items()],
      "normalizer": {
        "type": "Sequence",
        "normalizers": [
          *prefix,
          {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        ],
      },
      "pre_tokenizer": None,
      "post_processor": folder_lib.bos_processor(bos, self.bos_id)
      if self.add_bos and self.bos_id is not None
      else None,
      "decoder": {
        "type": "Sequence",
        "decoders": [
          {"type": "Replace", **space},
          {"type": "ByteFallback"},
          {"type": "Fuse"},
          *strip,
        ],
      },
      "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": self._proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [[left, right] for *_, left, right in sorted(ranked)],
      },
    }
    return json.dumps(spec, ensure_ascii=False).encode()

  def _encode_plain(self, texts: Sequence[str], first: bool) -> list[list[int]]:
    del first  # as in Meta's code, text after a special token starts anew
    return self._plain.encode_around(texts, self._encode_apart)

  def _encode_apart(self, texts: Sequence[str]) -> list[list[int]]:
    if len(texts) == 1:  # spares the threads
      return [self._library.encode(texts[0])]
    return self._library.encode(list(texts))

  def _pieces(self) -> tuple[list[bytes], frozenset[int]]:
    pieces, spaced = [], set()
    normalizer = self._proto.normalizer_spec
    strips = normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
    for id, piece in enumerate(self._proto.pieces):
      data = b""
      if piece.type == _Piece.BYTE:
        data = bytes([int(piece.piece[3:5], 16)])
      elif piece.type == _Piece.UNKNOWN:
        data = self._proto.trainer_spec.unk_surface.encode()
      elif piece.piece in self._plain.ids:
        data = piece.piece.encode()
      elif piece.type != _Piece.CONTROL:
        data = piece.piece.replace(_SPACE, " ").encode()
        if strips and data.startswith(b" "):
          spaced.add(id)
      pieces.append(data)
    return pieces, frozenset(spaced)


def from_model(
  content: bytes, name: str, settings: folder_lib.Settings
) -> SentencePieceBpe:
  """The tokenizer of a tokenizer.model and the files of its folder.

  Raises:
    BadFileError: the bytes are no SentencePiece model, or the folder's files
      contradict it.
  """
  try:
    return SentencePieceBpe(content, settings)
  except errors.UserError as error:
    raise type(error)(f"{name}: {error}") from None
  except (protobuf.DecodeError, RuntimeError, ValueError) as error:
    raise errors.BadFileError(
      f"{name} is no usable SentencePiece model ({error}); fetch it again."
    ) from error


def from_gguf_metadata(
  fields: Mapping[str, Any], name: str
) -> SentencePieceBpe:
  """The SentencePiece model in the metadata of a GGUF file.

  fields: key -> plain value; `name` of the file is for messages.

  Raises:
    BadFileError: a field is missing or contradicts another.
  """
  content, settings = sentencepiece_gguf.read(fields, name)
  return from_model(content, name, settings)


def _check(proto) -> None:
  """Refuses what the library would let through."""
  strings = [piece.piece for piece in proto.pieces]
  strings.append(proto.trainer_spec.unk_surface)
  # protobuf leaves a string that is not UTF-8 as bytes.
  if not all(isinstance(text, str) for text in strings):
    raise ValueError("a piece is not UTF-8")
  for piece in proto.pieces:
    if piece.type == _Piece.BYTE and not _BYTE.fullmatch(piece.piece):
      raise ValueError(f"the byte piece {piece.piece!r} names no byte")


def _names(proto, named: Mapping[str, str]) -> dict[str, str]:
  """Roles as the folder names them, else as the model does."""
  named = dict(named)
  trainer = proto.trainer_spec
  for role in ("bos", "eos", "unk", "pad"):
    id = getattr(trainer, f"{role}_id")
    if 0 <= id < len(proto.pieces):
      named.setdefault(f"{role}_token", proto.pieces[id].piece)
  return named


def _extend(proto, settings: folder_lib.Settings) -> None:
  """Appends the folder's tokens that lie beyond the pieces."""
  size = len(proto.pieces)
  added = {s.id: text for text, s in settings.added.items() if s.id >= 0}
  added.update({id: text for text, id in settings.plain.items()})
  for id, text in sorted(added.items()):
    if id < size:
      have = proto.pieces[id].piece
      if text not in (have, have.replace(_SPACE, " ")):
        raise errors.BadFileError(
          f"the folder adds {text!r} as id {id}, but that is {have!r}; its"
          " files belong to different tokenizers."
        )
      continue
    if id - len(proto.pieces) > _MAX_GAP:
      raise errors.BadFileError(
        f"the folder adds {text!r} as id {id}, more than {_MAX_GAP} beyond the"
        f" {len(proto.pieces)} before it; its files belong to different"
        " tokenizers."
      )
    for gap in range(len(proto.pieces), id):
      proto.pieces.add(piece=_GAP.format(gap), type=_Piece.UNUSED)
    proto.pieces.add(piece=text, type=_Piece.CONTROL)


def _make_special(piece) -> None:
  if piece.type not in (_Piece.UNKNOWN, _Piece.BYTE):
    piece.type = _Piece.CONTROL


def _entry(
  text: str, special: bool, flags: tokenizer_lib.Special | None
) -> dict[str, Any]:
  return {
    "content": text,
    "lstrip": bool(flags and flags.lstrip),
    "rstrip": bool(flags and flags.rstrip),
    "normalized": False,
    "single_word": False,
    "special": special,
  }
