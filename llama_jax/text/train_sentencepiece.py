"""Trains a SentencePiece BPE the Llama way.

The settings are those in Llama 2's own tokenizer.model (trainer_spec): BPE,
digits split, bytes for what has no piece, no normalisation, white space kept,
ids 0 unk, 1 bos, 2 eos, no pad, 99.995 % of the letters covered, sentences of
4,192 bytes at the most. A sentence is a line, as there, so no piece holds a
line end.
"""

import collections
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from llama_jax import errors

MAX_SENTENCE_BYTES = 4192
# SentencePiece drops a whole sentence for a NUL, or for the letter that it
# marks unknown ones with; cut there, it loses no more than that letter.
_ENDS = re.compile("[\n\0\u2585]")


def sentences(text: str) -> Iterator[str]:
  """A document cut at its line ends, and a line that is too long at a space
  (which SentencePiece puts back in front of the rest) or, failing that, at a
  letter."""
  for line in _ENDS.split(text):
    while len(line) * 4 > MAX_SENTENCE_BYTES:  # no letter has more bytes
      head = line[:MAX_SENTENCE_BYTES].encode()
      if len(head) <= MAX_SENTENCE_BYTES and len(line) <= MAX_SENTENCE_BYTES:
        break
      head = head[:MAX_SENTENCE_BYTES].decode(errors="ignore")
      cut = head.rfind(" ")
      yield head[:cut] if cut > 0 else head
      line = line[cut + 1 if cut > 0 else len(head) :]
    if line:
      yield line


def train(
  lines: Iterable[str],
  vocab_size: int,
  special: Sequence[str] = (),
  *,
  at_most: bool = False,
) -> bytes:
  """The tokenizer.model of a text.

  lines: what `sentences` gives; read once, and held in memory by the library.
  vocab_size: with the 256 bytes and the three special pieces.
  special: pieces that no text spells, such as those for infilling; the first
    ids after eos.
  at_most: any text will do: one that is too small gives fewer pieces, and of
    one with too many letters the rarest are spelt in bytes.

  Raises:
    UserError: the text is too small or has too many letters for vocab_size.
    Whatever reading the lines raises.
  """
  failed = []
  model = io.BytesIO()
  if at_most:
    lines = _frequent(list(lines), (vocab_size - 259 - len(special)) // 2)
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_guarded(lines, failed),
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab_size,
      max_sentence_length=MAX_SENTENCE_BYTES,
      character_coverage=1.0 if at_most else 0.99995,
      hard_vocab_limit=not at_most,
      control_symbols=list(special),
      byte_fallback=True,
      split_digits=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      unk_id=0,
      bos_id=1,
      eos_id=2,
      pad_id=-1,
      num_threads=os.cpu_count() or 1,
      minloglevel=3,  # what it has to say comes with the exception
    )
  except RuntimeError as error:
    if failed:
      raise failed[0] from None
    reason = str(error).rpartition("] ")[2].strip()
    if "sentences_.empty" in str(error):
      reason = "There is no text."
    raise errors.UserError(
      f"vocab_size={vocab_size} cannot be trained on this text: {reason}"
    ) from error
  return model.getvalue()


def _guarded(lines: Iterable[str], failed: list) -> Iterator[str]:
  """The library turns an exception into a text of its own."""
  try:
    yield from lines
  except Exception as error:
    failed.append(error)
    raise


def _frequent(lines: list[str], most: int) -> Iterator[str]:
  """The lines, cut at all but the most frequent letters."""
  counts = collections.Counter(itertools.chain.from_iterable(lines))
  kept = {letter for letter, _ in counts.most_common(max(most, 1))}
  for line in lines:
    for is_kept, letters in itertools.groupby(line, kept.__contains__):
      if is_kept:
        yield "".join(letters)
