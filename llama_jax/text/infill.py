"""Infilling: ids for text whose middle is missing (arXiv:2207.14255).

Two orders, of prefix, suffix and middle, as Code Llama has them
(arXiv:2308.12950, 2.3, and codellama, generation.py):

  PSM  BOS PRE prefix SUF suffix MID middle EOT
  SPM  BOS PRE SUF suffix MID prefix+middle EOT

Prefix and middle of SPM are encoded as one text. The suffix, and the middle of
PSM, go on in a text, so SentencePiece's space before a text is kept from them;
the prefix keeps it. Other families own other tokens.
"""

import dataclasses

from llama_jax import errors
from llama_jax.text import tokenizer as tokenizer_lib

# No vocabulary joins it with what follows; the one that Code Llama takes.
_ANCHOR = "☺"


@dataclasses.dataclass(frozen=True)
class _Family:
  """The names of PRE, SUF and MID, and of EOT where it is not simply eos.

  suffix_first: whether its models were trained on SPM.
  """

  names: tuple[str, str, str]
  ends: tuple[str, ...] = ()
  suffix_first: bool = True


CODE_LLAMA = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
_FAMILIES = (
  _Family(CODE_LLAMA[:3], CODE_LLAMA[3:]),
  _Family(("<PRE>", "<SUF>", "<MID>"), ("<EOT>",)),
  _Family(  # StarCoder, SmolLM
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), ("<|endoftext|>",)
  ),
  _Family(  # Qwen2.5-Coder, CodeGemma
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<|endoftext|>", "<|file_separator|>"),
  ),
  # DeepSeek-Coder: begin, prefix, hole, suffix, end, middle. The bar is wide.
  _Family(
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), suffix_first=False
  ),
  _Family(("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"), suffix_first=False),
)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """ids: after them the model writes the middle. stop_ids: what ends it."""

  ids: list[int]
  stop_ids: tuple[int, ...]


class Infill:
  """The infilling format of a tokenizer.

  Attributes:
    stop_ids: the token that ends a middle; then what else ends a text.

  Raises:
    UserError: the tokenizer has no tokens for it.
  """

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
    known = tokenizer.special_tokens
    family = next((f for f in _FAMILIES if known.keys() >= set(f.names)), None)
    if family is None:
      raise errors.UserError(
        "this tokenizer has no tokens for infilling; take one that has"
        f" {', or '.join(' '.join(f.names) for f in _FAMILIES)}, such as that"
        " of Code Llama 7B, 13B or 70B."
      )
    ends = [known[name] for name in family.ends if name in known][:1]
    self.stop_ids = (*ends, *(i for i in tokenizer.stop_ids if i not in ends))
    if not self.stop_ids:
      raise errors.UserError(
        f"this tokenizer has {family.names[0]}, but no token that ends a text;"
        f" it needs {' or '.join((*family.ends, 'eos'))}."
      )
    self._tokenizer = tokenizer
    self._family = family
    self._prefix, self._suffix, self._middle = map(known.get, family.names)
    bos = tokenizer.add_bos and tokenizer.bos_id is not None
    self._bos = [tokenizer.bos_id] if bos else []
    # Whether a text that stands alone gets a space in front.
    bytes_of_x, _ = tokenizer.join_bytes(tokenizer.encode("x"), True)
    self._anchor = tokenizer.encode(_ANCHOR) if bytes_of_x != b"x" else []

  def prompt(
    self, prefix: str, suffix: str, suffix_first: bool = False
  ) -> Prompt:
    """What to give a model that is to write what stands between.

    suffix_first: the order SPM. What it writes goes on from the prefix, so a
      leading space counts: `Detokenizer(tokenizer, continues=True)`.
    """
    return Prompt(self._before(prefix, suffix, suffix_first), self.stop_ids)

  def document(
    self, prefix: str, middle: str, suffix: str, suffix_first: bool = False
  ) -> list[int]:
    """A document to train on, cut in three at letters: ids, the end included.

    Its ids are those of its prompt and of what the model is to write after
    it, but that in SPM prefix and middle are encoded as one text.
    """
    if suffix_first:
      ids = self._before(prefix + middle, suffix, True)
    else:
      ids = self._before(prefix, suffix, False) + self._going_on(middle)
    return [*ids, self.stop_ids[0]]

  def _before(self, prefix: str, suffix: str, suffix_first: bool) -> list[int]:
    start, end = self._tokenizer.encode(prefix), self._going_on(suffix)
    if not suffix_first:
      parts = [self._prefix, *start, self._suffix, *end, self._middle]
    elif self._family.suffix_first:
      parts = [self._prefix, self._suffix, *end, self._middle, *start]
    else:
      raise errors.UserError(
        "suffix_first=True, but this tokenizer's family is trained with the"
        " prefix first only; use suffix_first=False."
      )
    return self._bos + parts

  def _going_on(self, text: str) -> list[int]:
    """Ids of text that goes on in one: without a space in front."""
    size = len(self._anchor)
    if not size:
      return self._tokenizer.encode(text)
    ids = self._tokenizer.encode(_ANCHOR + text)
    if ids[:size] != self._anchor:
      raise errors.UserError(
        f"this tokenizer joins {_ANCHOR!r} with what follows, so it cannot"
        " encode a text without a space in front."
      )
    return ids[size:]


def split(text: str, one: int, two: int) -> tuple[str, str, str]:
  """Prefix, middle and suffix of a document, cut at two letters.

  one, two: from 0 to len(text), in any order; Code Llama draws both uniformly.
  """
  first, second = sorted((one, two))
  return text[:first], text[first:second], text[second:]
