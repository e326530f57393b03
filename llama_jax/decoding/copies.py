"""Copies of rows' pages, for decoding where no kernel reads pages in place.

A copy is made when rows begin to draw, takes what they draw (which goes to
their pages too), and serves until other rows come or it is full.
"""

from typing import Any

import numpy as np

from llama_jax.decoding import arrays, programs
from llama_jax.decoding import pages as pages_lib
from llama_jax.decoding import scheduler as scheduler_lib

# Tokens a row that a new copy has room for, at least.
_ROOM = 64


class Copies:
  """The copy that is held, and whether a new one would fit.

  Args:
    pages: whose pages they are.
    copied: of the model and of the draft, whether pages have to be copied.
    count: tokens that a row draws in a call.

  Attributes:
    rows: whose pages are copied, with all that was drawn since.
    caches: of the model and of the draft; None where pages are read in place,
      by a kernel, or copied layer by layer and token by token, as there is no
      memory for more.
  """

  def __init__(self, pages: pages_lib.Pages, copied: list[bool], count: int):
    self._pages, self._copied = pages, copied
    self._room = max(_ROOM, count)
    self._forget()

  def _forget(self) -> None:
    self.rows: list[scheduler_lib.Sequence] = []
    self.caches: tuple[Any, ...] = ()
    self._left = 0

  def fits(self, rows) -> bool:
    """Whether these rows' pages can be copied, if they need to be."""
    if not self._copied[0]:
      return True
    slots = arrays.copied_slots(rows, self._pages.page_size, self._room)
    return slots <= self._pages.count * self._pages.page_size

  def take(self, sequences, count: int, pools) -> None:
    """Makes `rows` the rows in which these sequences draw so many tokens."""
    kept = self._kept(sequences, count)
    if kept is not None:
      self.rows = kept
      return
    rows = arrays.filled(sequences, arrays.round_up(len(sequences)))
    # The old one's memory first.
    self._forget()
    fits = self.fits(rows)
    table_BX = arrays.table(rows)
    lengths = np.asarray([one.cached for one in rows], np.int32)
    self.rows = rows
    self.caches = tuple(
      programs.gather(pool, table_BX, lengths, room=self._room)
      if fits and copied
      else None
      for pool, copied in zip(pools, self._copied, strict=True)
    )
    # There is nothing to keep where nothing was copied.
    self._left = self._room if self.caches[0] is not None else 0

  def _kept(self, sequences, count: int):
    """The rows for these sequences, or None where a new copy is better."""
    active = set(sequences)
    if self._left < count or not active <= set(self.rows):
      return None
    if arrays.round_up(len(sequences)) < len(self.rows):
      return None
    return [one if one in active else arrays.IDLE for one in self.rows]

  def drawn(self, caches, count: int, all_read: bool) -> None:
    """What the caches became by so many tokens; all_read: the draft's too."""
    self.caches = caches
    self._left = self._left - count if all_read else 0
