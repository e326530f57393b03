"""Letters that stand for others while a template runs.

A mask does two things with the private-use letters that neither the template
nor the messages hold. It hides the special tokens that a message spells, so
that those which the rendered text spells are all the template's own. And it
marks a string's start and end, so that the string can be found in what the
template made.
"""

import functools
import itertools
import re
from collections.abc import Mapping
from typing import Any

from llama_jax import errors
from llama_jax.text import tokenizer as tokenizer_lib

_PRIVATE_USE = range(0xE000, 0xF900)
# White space that hardly any text holds, and that str.strip takes all the same.
_RARE_SPACES = [chr(c) for c in (*range(0x2000, 0x200B), *range(0x1C, 0x20))]


class Mask:
  """Letters for one chat: its tokenizer and all values that go in.

  Attributes:
    marks: two letters, for the start and for the end of a string.
  """

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer, *values: Any):
    specials = tuple(tokenizer.special_tokens)
    letters, in_specials = _letters(specials)
    used = in_specials.union(tokenizer.chat_template, *_strings(values))
    free = list(
      itertools.islice(
        (c for c in map(chr, _PRIVATE_USE) if c not in used), len(letters) + 2
      )
    )
    if len(free) < len(letters) + 2:
      raise errors.UserError(
        "the messages use too many private-use characters (U+E000 to U+F8FF)."
      )
    self.marks = (free[0], free[1])
    self._letters = dict(zip(letters, free[2:], strict=False))
    self._removal = {
      ord(masked): letter for letter, masked in self._letters.items()
    }
    self._patterns = _patterns(specials) if specials else None
    # White space -> what stands for it at the ends of a marked string.
    self._spaces = dict(
      zip(
        sorted(c for c in used if c.isspace()),
        [c for c in _RARE_SPACES if c not in used],
        strict=False,
      )
    )

  def hide(self, value: Any) -> Any:
    """A copy in which no string spells a special token; keys of dictionaries
    too.

    Nor does one spell it together with what the template puts next to it:
    also hidden are the end of a special token at a string's start, and the
    start of one at its end.
    """
    if isinstance(value, str):
      return self._hide(value)
    if isinstance(value, Mapping):
      return {self.hide(k): self.hide(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
      return [self.hide(v) for v in value]
    return value

  def show(self, text: str) -> str:
    """The text with nothing hidden; as long as before."""
    return text.translate(self._removal)

  def mark(self, text: str, spaces: bool) -> str:
    """The text with marks inside its white space, so that a template which
    trims it still does.

    spaces: the white space outside the marks becomes other white space, by
      which `find` tells that the template left it there.
    """
    core = text.strip()
    at = text.index(core)
    before, after = text[:at], text[at + len(core) :]
    if spaces:
      before, after = (
        "".join(self._spaces.get(letter, letter) for letter in end)
        for end in (before, after)
      )
    return before + self.marks[0] + core + self.marks[1] + after

  def find(self, marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without its marks, and where in it each marked string lies.

    A mark without its partner gives no place.
    """
    start, end = self.marks
    inside = f"[^{start}{end}]*"
    space = f"[{''.join(self._spaces.values())}]*" if self._spaces else ""
    places = []
    for match in re.finditer(f"{space}{start}{inside}{end}{space}", marked):
      # Two marks go for each place before and for this one.
      at = match.start() - 2 * len(places)
      places.append((at, at + len(match.group()) - 2))
    back = {ord(rare): usual for usual, rare in self._spaces.items()}
    text = marked.translate(back | dict.fromkeys(map(ord, self.marks)))
    return text, places

  def _hide(self, text: str) -> str:
    if self._patterns is None:
      return text
    inside, head, tail = self._patterns
    text = inside.sub(lambda match: self._letters[match.group()], text)
    # A template may trim, so white space at either end does not count.
    start = len(text) - len(text.lstrip())
    for match in (tail.match(text, start), head.search(text)):
      if match:
        at = match.start()
        letter = self._letters.get(text[at], text[at])  # may be hidden already
        text = text[:at] + letter + text[at + 1 :]
    return text


@functools.lru_cache(maxsize=8)
def _letters(specials: tuple[str, ...]) -> tuple[list[str], frozenset[str]]:
  """The letters that may have to be hidden, and all that there are."""
  firsts = sorted({s[0] for s in specials})
  ends = {s[i] for s in specials for i in range(1, len(s))}
  return [*firsts, *sorted(ends.difference(firsts))], frozenset().union(
    *specials
  )


@functools.lru_cache(maxsize=8)
def _patterns(specials: tuple[str, ...]):
  """Patterns of: the first letter of a special token, wherever one starts; the
  start of one at a string's end; the end of one, for a string's start."""

  def either(texts) -> str:
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))

  # Left as it is at an end: white space, which templates trim.
  heads = {s[:i] for s in specials for i in range(1, len(s))}
  tails = {s[i:] for s in specials for i in range(1, len(s))}
  heads, tails = ({t for t in e if not t.isspace()} for e in (heads, tails))
  return (
    re.compile(
      f"{tokenizer_lib.first_letters(specials)}(?={either(specials)}).",
      re.DOTALL,
    ),
    re.compile(rf"(?:{either(heads)})(?=\s*\Z)" if heads else r"(?!)"),
    re.compile(either(tails) or r"(?!)"),
  )


def _strings(value: Any):
  """Every string in a nest of lists and dictionaries."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, Mapping):
    for key, item in value.items():
      yield from _strings(key)
      yield from _strings(item)
  elif isinstance(value, list | tuple):
    for item in value:
      yield from _strings(item)
