"""Llama 3's tokenizer: ranked byte strings and 256 special tokens, `tiktoken`.

The file has a token in base64 and its rank a line; how text is cut and which
tokens are special stands in Meta's code (llama-models 0.3.0,
llama3/tokenizer.py) and is repeated here. A folder's JSON files may name the
special tokens otherwise, as Hugging Face's do from the third reserved one on.
"""

import binascii
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tiktoken

from llama_jax import errors
from llama_jax.text import byte_level, byte_level_gguf
from llama_jax.text import folder as folder_lib
from llama_jax.text import tokenizer as tokenizer_lib

# By their place after the ranks; the rest are reserved. Llama 3.0 called 4, 5,
# 8, 10 and 11 reserved too and never used them.
_NAMED = {
  0: "<|begin_of_text|>",
  1: "<|end_of_text|>",
  4: "<|finetune_right_pad_id|>",
  5: "<|step_id|>",
  6: "<|start_header_id|>",
  7: "<|end_header_id|>",
  8: "<|eom_id|>",
  9: "<|eot_id|>",
  10: "<|python_tag|>",
  11: "<|image|>",
}
_NUM_SPECIAL = 256
_ROLES = {
  "bos_token": _NAMED[0],
  "eos_token": _NAMED[1],
  "pad_token": _NAMED[4],
}

# Meta cuts a text every so many characters, and each piece where white space
# or the lack of it lasts longer than so many; the cuts show in the ids.
_MAX_TEXT = 400_000
_MAX_RUN = 25_000
_SPACE = re.compile(r"\s")
_RUN = re.compile(r"\s+|\S+")

# Files of ranks whose way of cutting text is another; number of ranks -> name.
_OTHERS = {
  50_256: "GPT-2",
  50_257: "GPT-2",
  100_256: "cl100k_base",
  199_998: "o200k_base",
  200_000: "Llama 4",
}
_THREADS = 8  # as many as tiktoken takes by itself
_WORTH_THREADS = 20_000  # characters; below, starting them takes longer


class TiktokenBpe(tokenizer_lib.Tokenizer):
  """Ranks at work.

  ranks: token -> rank, as `parse` gives them.
  """

  def __init__(self, ranks: dict[bytes, int], settings: folder_lib.Settings):
    self._settings = settings
    self._ranks = ranks
    names = _names(len(self._ranks), settings)
    stops = set(settings.conventions.stop_ids)
    self._plain = tokenizer_lib.PlainTokens(
      {
        text: id
        for text, id in settings.plain.items()
        if id >= len(self._ranks) and id not in stops
      }
    )
    flags = settings.added
    specials = [
      tokenizer_lib.Special(
        text,
        id,
        lstrip=text in flags and flags[text].lstrip,
        rstrip=text in flags and flags[text].rstrip,
      )
      for id, text in names.items()
      if text not in self._plain.ids
    ]
    # It is told of no special token, so no text can spell one.
    self._library = tiktoken.Encoding(
      name="llama3",
      pat_str=byte_level.LLAMA3_PATTERN,
      mergeable_ranks=self._ranks,
      special_tokens={},
    )
    conventions = settings.conventions
    named = dict(conventions.named)
    if "bos_token" not in named and "eos_token" not in named:
      named = {**_ROLES, **named}
    super().__init__(
      vocab_size=max(names) + 1,
      specials=specials,
      conventions=tokenizer_lib.Conventions(
        named=named,
        add_bos=True if conventions.add_bos is None else conventions.add_bos,
        stop_ids=conventions.stop_ids,
        chat_template=conventions.chat_template,
      ),
      byte_errors="replace",
    )

  def save(self, folder) -> None:
    """Writes what transformers reads, and original/tokenizer.model: the ranks.

    In a folder of Meta's they are tokenizer.model as well.
    """
    added = self._added()
    decoder = {
      str(token["id"]): {k: v for k, v in token.items() if k != "id"}
      for token in added
    }
    vocabulary = {
      folder_lib.TOKENIZER_JSON: json.dumps(
        self._document(added), ensure_ascii=False
      ).encode(),
      folder_lib.RANKS: self.model_file(),
    }
    config = {
      **self._settings.config,
      "added_tokens_decoder": decoder,
      "tokenizer_class": "PreTrainedTokenizerFast",
    }
    folder_lib.write(folder, self, vocabulary, config)

  def gguf_metadata(self) -> dict[str, Any]:
    return byte_level_gguf.write(self._document(self._added()), self)

  def model_file(self) -> bytes:
    return byte_level.ranks_lines(self._ranks)

  def _encode_plain(self, texts: Sequence[str], first: bool) -> list[list[int]]:
    del first  # no space before the first word
    return self._plain.encode_around(texts, self._encode_ordinary)

  def _encode_ordinary(self, texts: Sequence[str]) -> list[list[int]]:
    cut = [list(_cut(text)) for text in texts]
    pieces = [piece for parts in cut for piece in parts]
    if len(texts) == 1 or sum(map(len, pieces)) < _WORTH_THREADS:
      encoded = [self._library.encode_ordinary(piece) for piece in pieces]
    else:
      encoded = self._library.encode_ordinary_batch(
        pieces, num_threads=_THREADS
      )
    if len(pieces) == len(texts):
      return encoded
    rest = iter(encoded)
    return [[id for _ in parts for id in next(rest)] for parts in cut]

  def _pieces(self) -> tuple[list[bytes], frozenset[int]]:
    pieces = [b""] * self.vocab_size
    for token, rank in self._ranks.items():
      pieces[rank] = token
    for text, id in self._plain.ids.items():
      pieces[id] = text.encode()
    return pieces, frozenset()

  def _added(self) -> list[dict[str, Any]]:
    """Special and plain tokens as a tokenizer.json lists them."""
    added = [
      byte_level.added_token(
        s.text, s.id, True, lstrip=s.lstrip, rstrip=s.rstrip
      )
      for s in self._specials.values()
    ]
    added += [
      byte_level.added_token(text, id, False)
      for text, id in self._plain.ids.items()
    ]
    return sorted(added, key=lambda token: token["id"])

  def _document(self, added: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same tokenizer as a tokenizer.json.

    tiktoken joins any two neighbours that make a token, lowest rank first: so
    each way of halving a token is a merge.
    """
    ranks = self._ranks
    letters = {token: byte_level.in_letters(token) for token in ranks}
    merges = []
    for token in letters:
      halves = [(token[:n], token[n:]) for n in range(1, len(token))]
      found = [h for h in halves if h[0] in ranks and h[1] in ranks]
      found.sort(key=lambda h: (ranks[h[0]], ranks[h[1]]))
      merges += [(letters[left], letters[right]) for left, right in found]
    bos = self.named_tokens.get("bos_token")
    return byte_level.document(
      byte_level.LLAMA3,
      {text: ranks[token] for token, text in letters.items()},
      merges,
      added,
      folder_lib.bos_processor(bos, self.bos_id)
      if self.add_bos and self.bos_id is not None
      else None,
    )


def from_ranks(
  content: bytes, name: str, settings: folder_lib.Settings
) -> TiktokenBpe:
  """The tokenizer of a file of ranks and the files of its folder.

  Raises:
    BadFileError: it is damaged, or the folder's files contradict it.
    UserError: the ranks are those of another family.
  """
  try:
    return TiktokenBpe(_parse(content), settings)
  except errors.UserError as error:
    raise type(error)(f"{name}: {error}") from None


def from_document(
  ranks: dict[bytes, int],
  spec: Mapping[str, Any],
  settings: folder_lib.Settings,
) -> TiktokenBpe | None:
  """The tokenizer of ranks beside the tokenizer.json that was made of them;
  None if that says something else."""
  special = {token["content"] for token in spec["added_tokens"]}
  vocab = spec["model"]["vocab"]
  if (
    byte_level.cut_name(spec) != byte_level.LLAMA3
    or spec.get("normalizer")
    or any(token["id"] < len(ranks) for token in spec["added_tokens"])
    or {text: id for text, id in vocab.items() if text not in special}
    != {byte_level.in_letters(token): rank for token, rank in ranks.items()}
  ):
    return None
  return TiktokenBpe(ranks, settings)


def parse(content: bytes, name: str) -> dict[bytes, int]:
  """Token -> rank in the order of ranks, such that any text can be encoded.

  Raises:
    BadFileError: a line is no token, or ranks or tokens are missing or double.
    UserError: the ranks are those of another family.
  """
  try:
    return _parse(content)
  except errors.UserError as error:
    raise type(error)(f"{name}: {error}") from None


def _parse(content: bytes) -> dict[bytes, int]:
  ranks: dict[bytes, int] = {}
  lines = content.splitlines()
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    token, _, rank = line.partition(b" ")
    try:
      token = binascii.a2b_base64(token, strict_mode=True)
    except binascii.Error:
      token = b""
    # No more digits than the number of lines has.
    if not token or not rank.isdigit() or len(rank) > len(str(len(lines))):
      raise errors.BadFileError(
        f"line {number} is not a token in base64 and its rank. Fetch the file"
        " again."
      )
    if token in ranks:
      raise errors.BadFileError(f"line {number} holds a token that was before.")
    ranks[token] = int(rank)
  ranks = dict(sorted(ranks.items(), key=lambda entry: entry[1]))
  if list(ranks.values()) != list(range(len(ranks))):
    raise errors.BadFileError(
      f"the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1},"
      " each once; it is cut off or damaged. Fetch it again."
    )
  missing = [b for b in range(256) if bytes([b]) not in ranks]
  if missing:
    raise errors.BadFileError(
      f"it has no token for the byte {missing[0]}, so not every text could be"
      " encoded. Fetch it again."
    )
  if len(ranks) in _OTHERS:
    raise errors.UserError(
      f"its {len(ranks)} ranks are those of {_OTHERS[len(ranks)]}, which cuts"
      " text in another way than Llama 3 (128000 ranks); use the tokenizer.json"
      " of the same model."
    )
  return ranks


def _names(size: int, settings: folder_lib.Settings) -> dict[int, str]:
  """Text of each id beyond the ranks, the folder's word before Meta's."""
  given = {s.id: text for text, s in settings.added.items() if s.id >= 0}
  given.update({id: text for text, id in settings.plain.items()})
  for id, text in given.items():
    if id < size:
      raise errors.BadFileError(
        f"the folder adds {text!r} as id {id}, but the ranks reach to"
        f" {size - 1}; its files belong to different tokenizers."
      )
  taken = set(given.values())
  names = {}
  reserved = 0
  for place in range(_NUM_SPECIAL):
    name = _NAMED.get(place)
    if name is None:
      name = f"<|reserved_special_token_{reserved}|>"
      reserved += 1
    # A name that the folder gives to another id leaves this one without.
    names[size + place] = f"<|unused_{place}|>" if name in taken else name
  return dict(sorted({**names, **given}.items()))


def _cut(text: str) -> Iterator[str]:
  """The pieces that Meta's code hands to tiktoken one by one."""
  for start in range(0, max(len(text), 1), _MAX_TEXT):
    piece = text[start : start + _MAX_TEXT]
    begin = 0
    if _may_have_long_run(piece):
      for run in _RUN.finditer(piece):
        for end in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
          yield piece[begin:end]
          begin = end
    yield piece[begin:]


def _may_have_long_run(text: str) -> bool:
  """A run of more than _MAX_RUN covers a whole block of half as many."""
  block = _MAX_RUN // 2
  if len(text) <= _MAX_RUN:
    return False
  for start in range(0, len(text) - block + 1, block):
    space = _SPACE.search(text, start, start + block)
    if space is None or text[start : start + block].isspace():
      return True
  return False
