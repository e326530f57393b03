"""Which pages of the key/value pool hold what: counts and names, no arrays.

A page is P slots of every layer's pool. It is free, held by one or more
sequences, or idle: held by none, but its tokens are known, so that a prompt
that begins alike can take it up again; idle pages go when free ones are gone,
the one that was left first before the others. Page 0 is nobody's: padding is
written there.

A full page is known by its tokens and the page before it, exactly and not by a
hash. While its keys and values are being computed it is pending: who wants the
same page waits for it instead of computing it too.
"""

import collections
import dataclasses
from collections.abc import Sequence

TRASH = 0


@dataclasses.dataclass(frozen=True)
class Found:
  """What is there already of a prompt.

  Attributes:
    pages: those that hold its beginning, not yet held by whoever asks.
    pending: the next one is being computed by another.
  """

  pages: tuple[int, ...]
  pending: bool


@dataclasses.dataclass
class _Name:
  # Of the page before it, by the number that its name got; -1 for a first.
  key: tuple[int, tuple[int, ...]]
  serial: int
  ready: bool


class Pages:
  """The pages 1 to count of a pool."""

  def __init__(self, count: int, page_size: int):
    self.count, self.page_size = count, page_size
    self._free = list(range(count, 0, -1))
    self._holders = [0] * (count + 1)
    self._names: dict[int, _Name] = {}
    self._known: dict[tuple, int] = {}
    self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()
    self._serials = 0

  @property
  def available(self) -> int:
    """Pages that `take` can give."""
    return len(self._free) + len(self._idle)

  @property
  def held(self) -> int:
    return self.count - self.available

  def needed(self, tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // self.page_size)

  def find(self, tokens: Sequence[int]) -> Found:
    """The longest known beginning of a prompt, in whole pages.

    Never all of the prompt: its last token is read again for its logits.
    """
    pages: list[int] = []
    serial = -1
    for index in range((len(tokens) - 1) // self.page_size):
      page = self._known.get((serial, self._slice(tokens, index)))
      if page is None:
        break
      name = self._names[page]
      if not name.ready:
        return Found(tuple(pages), True)
      pages.append(page)
      serial = name.serial
    return Found(tuple(pages), False)

  def hold(self, pages: Sequence[int]) -> None:
    """One more holder of pages that were found."""
    for page in pages:
      self._holders[page] += 1
      self._idle.pop(page, None)

  def take(self, count: int) -> list[int] | None:
    """Pages that nobody else holds, or None where there are not so many."""
    if count > self.available:
      return None
    taken = []
    for _ in range(count):
      if self._free:
        page = self._free.pop()
      else:
        page, _ = self._idle.popitem(last=False)
        self._forget(page)
      self._holders[page] = 1
      taken.append(page)
    return taken

  def name(
    self, tokens: Sequence[int], pages: Sequence[int], ready: bool
  ) -> None:
    """Says what a sequence's full pages hold, or soon will.

    tokens: whole pages of them, from the beginning; pages: at least as many.
    A page whose like is known already, or whose forerunner is not, stays
    without a name.
    """
    serial = -1
    for index in range(len(tokens) // self.page_size):
      key = (serial, self._slice(tokens, index))
      page = pages[index]
      name = self._names.get(page)
      if name is None:
        if key in self._known:
          return
        self._serials += 1
        name = _Name(key, self._serials, ready)
        self._names[page], self._known[key] = name, page
      elif name.key != key:
        return
      name.ready |= ready
      serial = name.serial

  def release(self, pages: Sequence[int]) -> None:
    """One holder less of each. The last of a sequence go idle first."""
    for page in reversed(pages):
      self._holders[page] -= 1
      if self._holders[page]:
        continue
      name = self._names.get(page)
      if name is not None and name.ready:
        self._idle[page] = None
      else:
        self._forget(page)
        self._free.append(page)

  def _slice(self, tokens, index):
    P = self.page_size
    return tuple(tokens[index * P : (index + 1) * P])

  def _forget(self, page):
    name = self._names.pop(page, None)
    if name is not None:
      del self._known[name.key]
