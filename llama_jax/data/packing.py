"""Documents into rows of fixed length: nothing cut off, nothing twice.

A row is R + 1 tokens, of which each of the first R predicts the next:

  tokens, segments, positions  int32 [R + 1]
  documents                    int64 [number of segments]
  trained                      bool [R + 1], only where not all of it is true

Segments number the row's documents from 1 on (0 is padding), positions count
from 0 in each, documents[segment - 1] says which document it is. A document of
several parts, such as the answers to one prompt, has a segment for each.

Plain documents lie end to end, over as many rows as they need. A row whose
last document goes on is followed by one that begins with its last token again:
the last target of the one is the first input of the other, so every token of a
document but its first is a target exactly once. A document that must stay
whole waits until a row has room for it, and others go before it.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from llama_jax import errors

PADDING = 0
# Whole documents that may wait: with 128 of mixed lengths less than 1 % of
# the rows is padding, and they are a few MB.
WAITING = 128


@dataclasses.dataclass(frozen=True)
class Document:
  """Token ids of one document, its own BOS and EOS included.

  Attributes:
    index: its place in the input, which rows carry along.
    whole: it lies in one row; then it has no more tokens than a row has.
    trained: of a whole one, for each id, whether the model is to say it; None
      for all.
    parts: of a whole one, lengths of sequences that do not see each other;
      () for one.
  """

  ids: Sequence[int] | np.ndarray
  index: int
  whole: bool = False
  trained: Sequence[bool] | np.ndarray | None = None
  parts: tuple[int, ...] = ()


class _Row:
  """A row that is being filled."""

  def __init__(self, size: int):
    self.tokens = np.full(size, PADDING, np.int32)
    self.segments = np.zeros(size, np.int32)
    self.positions = np.zeros(size, np.int32)
    self.trained: np.ndarray | None = None
    self.documents: list[int] = []
    self.used = 0

  @property
  def room(self) -> int:
    return len(self.tokens) - self.used

  def add(self, ids: np.ndarray, index: int) -> None:
    where = slice(self.used, self.used + len(ids))
    self.documents.append(index)
    self.tokens[where] = ids
    self.segments[where] = len(self.documents)
    self.positions[where] = np.arange(len(ids))
    self.used += len(ids)

  def add_whole(self, document: Document) -> None:
    ids = np.asarray(document.ids, np.int32)
    if document.trained is not None:
      if self.trained is None:
        self.trained = np.ones(len(self.tokens), bool)
      where = slice(self.used, self.used + len(ids))
      self.trained[where] = document.trained
    ends = np.cumsum(document.parts)[:-1] if document.parts else []
    for part in np.split(ids, ends):
      self.add(part, document.index)

  def arrays(self) -> dict[str, np.ndarray]:
    arrays = {
      "tokens": self.tokens,
      "segments": self.segments,
      "positions": self.positions,
      "documents": np.array(self.documents, np.int64),
    }
    if self.trained is not None:
      arrays["trained"] = self.trained
    return arrays


def pack(
  documents: Iterable[Document], row_length: int, together: bool = True
) -> Iterator[dict[str, np.ndarray]]:
  """Rows of row_length + 1 tokens, as the module says.

  Whole documents go largest first into the room that is left; a plain one
  fills what they leave. Only where neither fits, and at the end, is padding.

  Args:
    documents: in any order.
    row_length: R.
    together: False gives every whole document a row of its own.

  Raises:
    ConfigError: row_length < 1, or a whole document has more tokens.
  """
  if row_length < 1:
    raise errors.ConfigError(f"row_length={row_length} must be 1 or more.")
  stream = iter(documents)
  waiting: list[tuple[int, int, Document]] = []  # sorted by size, then age
  plain: Document | None = None
  ended = False
  age = 0
  row = _Row(row_length + 1)
  while True:
    while not ended and plain is None and len(waiting) < WAITING:
      document = next(stream, None)
      if document is None:
        ended = True
      elif not len(document.ids):
        continue
      elif not document.whole:
        plain = document
      elif len(document.ids) > row_length:
        raise errors.ConfigError(
          f"document {document.index} must stay whole and has"
          f" {len(document.ids)} tokens, more than row_length={row_length}."
        )
      else:
        age += 1
        # The elder of two of a size counts as the larger.
        bisect.insort(waiting, (len(document.ids), -age, document))
    room = row.room if together or not row.used else 0
    if fits := bisect.bisect_right(waiting, (room, 1)):
      row.add_whole(waiting.pop(fits - 1)[2])
      if not together:
        yield row.arrays()
        row = _Row(row_length + 1)
    elif plain is not None:
      ids = np.asarray(plain.ids, np.int32)
      while len(ids) > row.room:
        ids, last = ids[row.room - 1 :], ids[: row.room]
        row.add(last, plain.index)
        yield row.arrays()
        row = _Row(row_length + 1)
      row.add(ids, plain.index)
      plain = None
    elif row.used:
      yield row.arrays()
      row = _Row(row_length + 1)
    elif ended and not waiting:
      return
    if row.used and not row.room:
      yield row.arrays()
      row = _Row(row_length + 1)


def inputs(
  row: dict[str, np.ndarray], start: int, length: int, separate: bool
) -> dict[str, np.ndarray]:
  """What a model is given of a row: tokens [start, start + length).

  Args:
    row: as `pack` makes them.
    start, length: start + length <= R.
    separate: documents do not see each other: segments are the row's,
      positions start at 0 in each document's part of the piece, and loss_mask
      is 0 where the next token is another document's. Otherwise all that is
      not padding is one segment.

  Returns:
    tokens, targets, positions, segments int32 and loss_mask float32, [length].
    loss_mask is 0 too where the next token is not trained.
  """
  if not 0 <= start <= start + length < len(row["tokens"]):
    raise ValueError(
      f"tokens {start} to {start + length} of a row of"
      f" {len(row['tokens']) - 1} and one more."
    )
  here = slice(start, start + length)
  after = slice(start + 1, start + length + 1)
  segments = row["segments"][here]
  next_segments = row["segments"][after]
  if separate:
    positions = row["positions"][here].copy()
    if length:
      # The piece may begin amid a document.
      positions[segments == segments[0]] -= positions[0]
    loss_mask = (segments == next_segments) & (segments > 0)
  else:
    loss_mask = next_segments > 0
    segments = np.minimum(segments, 1)
    positions = np.arange(length, dtype=np.int32) * segments
  if "trained" in row:
    loss_mask = loss_mask & row["trained"][after]
  return {
    "tokens": row["tokens"][here],
    "targets": row["tokens"][after],
    "positions": positions,
    "segments": segments,
    "loss_mask": loss_mask.astype(np.float32),
  }
