"""Ids -> text while they are being generated."""

import codecs
from collections.abc import Iterable, Sequence

from llama_jax import errors
from llama_jax.text import tokenizer as tokenizer_lib


class Detokenizer:
  """Turns ids into text that is safe to print as soon as it can be.

  All that `push` and `flush` return, joined, equals
  `tokenizer.decode(all_ids)`, cut off before the first stop string. Of several
  the one that is complete first counts; of two that end together the longer.
  Held back is what may yet change: the three bytes at the most of an unfinished
  UTF-8 character, and the longest end of the text that a stop string starts
  with. Each id costs the same.

  continues: the ids go on from a prompt, so a leading space is text.
  skip_special: as in `decode`.
  stop_strings: texts that end the whole; none of them is returned.

  Attributes:
    stopped: the stop string that was met; whatever is pushed after it is
      dropped. None before, and after `flush`.
  """

  stopped: str | None

  def __init__(
    self,
    tokenizer: tokenizer_lib.Tokenizer,
    continues: bool = False,
    skip_special: bool = True,
    stop_strings: Sequence[str] = (),
  ):
    check_stop_strings(stop_strings)
    self._tokenizer = tokenizer
    self._continues = continues
    self._skip_special = skip_special
    # Of those that end together, the longest is found first.
    self._stops = sorted(stop_strings, key=len, reverse=True)
    self._reset()

  def push(self, id: int) -> str:
    """The text that became certain with this id."""
    return self.push_many((id,))

  def push_many(self, ids: Iterable[int]) -> str:
    """`push` of each, joined."""
    data, self._started = self._tokenizer.join_bytes(
      ids, self._started, self._skip_special
    )
    return self._pass_on(self._decoder.decode(data))

  def flush(self) -> str:
    """What was held back (U+FFFD if it never became a character). After it
    the detokenizer is as new."""
    rest = self._pass_on(self._decoder.decode(b"", final=True))
    if self.stopped is None:
      rest += self._held
    self._reset()
    return rest

  def _pass_on(self, new: str) -> str:
    """Of the text held back and new, what no stop string can take away."""
    if not self._stops:
      return new
    if self.stopped is not None:
      return ""
    text = self._held + new
    found = [(text.find(stop), stop) for stop in self._stops]
    # The first minimum: the longest of those that end there.
    start, stop = min(
      ((at, stop) for at, stop in found if at >= 0),
      key=lambda one: one[0] + len(one[1]),
      default=(-1, None),
    )
    if stop is not None:
      self.stopped = stop
      return text[:start]
    longest = min(len(text), len(self._stops[0]) - 1)
    keep = next(
      (
        size
        for size in range(longest, 0, -1)
        if any(stop.startswith(text[-size:]) for stop in self._stops)
      ),
      0,
    )
    passed, self._held = text[: len(text) - keep], text[len(text) - keep :]
    return passed

  def _reset(self) -> None:
    self.stopped = None
    self._held = ""
    self._started = self._continues
    self._decoder = codecs.getincrementaldecoder("utf-8")(
      self._tokenizer.byte_errors
    )


def check_stop_strings(stop_strings: Sequence[str]) -> None:
  """Refuses what would never stop a text, or at once.

  Raises:
    UserError: not a list of texts, or one of them is empty.
  """
  if isinstance(stop_strings, str) or not all(
    isinstance(stop, str) and stop for stop in stop_strings
  ):
    raise errors.UserError(
      f"stop={stop_strings!r} must be a list of texts, none of them empty, as"
      ' in ["\\n\\n"].'
    )
