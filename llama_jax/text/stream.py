"""Ids -> text while they are being generated."""

import codecs
from collections.abc import Iterable

from llama_jax.text import tokenizer as tokenizer_lib


class Detokenizer:
  """Turns ids into text that is safe to print as soon as it can be.

  All that `push` and `flush` return, joined, equals
  `tokenizer.decode(all_ids)`. No more than the three bytes of an unfinished
  UTF-8 character are ever held back, and each id costs the same.

  continues: the ids go on from a prompt, so a leading space is text.
  skip_special: as in `decode`.
  """

  def __init__(
    self,
    tokenizer: tokenizer_lib.Tokenizer,
    continues: bool = False,
    skip_special: bool = True,
  ):
    self._tokenizer = tokenizer
    self._continues = continues
    self._skip_special = skip_special
    self._reset()

  def push(self, id: int) -> str:
    """The text that became certain with this id."""
    return self.push_many((id,))

  def push_many(self, ids: Iterable[int]) -> str:
    """`push` of each, joined."""
    data, self._started = self._tokenizer.join_bytes(
      ids, self._started, self._skip_special
    )
    return self._decoder.decode(data)

  def flush(self) -> str:
    """What was held back (U+FFFD if it never became a character). After it
    the detokenizer is as new."""
    rest = self._decoder.decode(b"", final=True)
    self._reset()
    return rest

  def _reset(self) -> None:
    self._started = self._continues
    self._decoder = codecs.getincrementaldecoder("utf-8")(
      self._tokenizer.byte_errors
    )
