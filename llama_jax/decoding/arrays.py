"""Sequences as the arrays that programs.py takes: padded, and of few sizes.

B rows, S slots, X pages.
"""

import numpy as np

from llama_jax import errors
from llama_jax.decoding import pages as pages_lib
from llama_jax.decoding import programs, sampling
from llama_jax.decoding import request as request_lib
from llama_jax.decoding import scheduler as scheduler_lib

# Sizes of arrays are rounded up to few, since each is a program to compile:
# what costs time in proportion to powers of two, what does not to powers of
# four, and slots, over which all tokens look, to 4, 6, 8, 12, 16, 24 ... pages.
_FEWEST_PAGES, _FEWEST_TOKENS = 4, 32


def round_up(size: int, least: int = 1, factor: int = 2) -> int:
  """The first of least, least * factor, ... that holds size."""
  while least < size:
    least *= factor
  return least


def _width(pages: int) -> int:
  """Pages of a table that holds so many."""
  wide = round_up(pages, _FEWEST_PAGES)
  between = wide * 3 // 4
  return between if _FEWEST_PAGES < between >= pages else wide


# Fills a batch up.
IDLE = scheduler_lib.Sequence(
  number=-1,
  request_number=-1,
  request=request_lib.Request([0], 1, sampling.SamplingConfig()),
  sample=0,
  tokens=[0],
  completion=request_lib.Completion(),
  constraint=None,
)


def filled(sequences, size: int):
  return [*sequences, *[IDLE] * (size - len(sequences))]


def table(rows) -> np.ndarray:
  """Each row's pages, int32 [B, X], page 0 after them."""
  width = _width(max(len(one.pages) for one in rows))
  table_BX = np.full((len(rows), width), pages_lib.TRASH, np.int32)
  for row, one in zip(table_BX, rows, strict=True):
    row[: len(one.pages)] = one.pages
  return table_BX


def history(rows, count: int) -> np.ndarray:
  """Each row's tokens, int32 [B, S], with room for so many more."""
  longest = max(len(one.tokens) for one in rows) + count
  tokens_BS = np.zeros((len(rows), round_up(longest, 256)), np.int32)
  for row, one in zip(tokens_BS, rows, strict=True):
    row[: len(one.tokens)] = one.tokens
  return tokens_BS


def copied_slots(rows, page_size: int, room: int) -> int:
  """Slots of a copy of so many rows' pages, padded to whole programs."""
  width = _width(max(len(one.pages) for one in rows)) * page_size
  return round_up(len(rows)) * (width + -(-room // page_size) * page_size)


def knobs(rows):
  """The rows' knobs and what they ask of a program."""
  requests = [one.request for one in rows]
  return sampling.knobs(
    [one.sampling for one in requests],
    samples=[one.sample for one in rows],
    stop_ids=[tuple(one.stop_ids) for one in requests],
    least=[one.min_new_tokens for one in requests],
  )


def seen(rows, features, vocab_size: int):
  """What the rows have said, where penalties ask for it, else None."""
  if not features.penalties:
    return None
  requests = [one.request for one in rows]
  return sampling.seen(
    [one.prompt for one in requests],
    [one.tokens[len(one.request.prompt) :] for one in rows],
    vocab_size,
  )


def allowed(rows, vocab_size: int) -> np.ndarray | None:
  """What constraints allow: uint32 [B, V / 32], or None without any."""
  if all(one.constraint is None for one in rows):
    return None
  words = -(-vocab_size // 32)
  allowed_BW = np.full((len(rows), words), 2**32 - 1, np.uint32)
  for row, one in zip(allowed_BW, rows, strict=True):
    if one.constraint is not None:
      try:
        row[:] = one.constraint.mask()
      except errors.UserError as error:
        # It ends when its token comes, whichever that is.
        one.completion.error = str(error)
  return allowed_BW


def drawing(
  rows, count: int, page_size: int, with_table: bool
) -> programs.Rows:
  """What the rows go on with; with_table: their pages are told too."""
  token_B, length_B, drawn_B = np.asarray(
    [(one.tokens[-1], one.cached, one.drawn) for one in rows], np.int32
  ).T
  places_BC = length_B[:, None] + np.arange(count, dtype=np.int32)
  page_BC = np.full(places_BC.shape, pages_lib.TRASH, np.int32)
  for row, places, one in zip(
    page_BC, places_BC // page_size, rows, strict=True
  ):
    known = places < len(one.pages)
    row[known] = np.asarray(one.pages, np.int32)[places[known]]
  table_BX = table(rows) if with_table else np.zeros((len(rows), 0), np.int32)
  return programs.Rows(
    token_B, length_B, drawn_B, page_BC, places_BC % page_size, table_BX
  )


def pack(planned, page_size: int):
  """(programs.Packed, the sequences that will be read whole)."""
  size = round_up(sum(count for _, count in planned), _FEWEST_TOKENS)
  ids, positions, segments, after, page, offset = np.zeros((6, size), np.int32)
  pages: list[int] = []
  slots: list[np.ndarray] = []
  last, drawing, at = [], [], 0
  for index, (one, count) in enumerate(planned):
    span, begin = slice(at, at + count), one.cached
    places = np.arange(begin, begin + count)
    ids[span] = one.tokens[begin : begin + count]
    following = one.tokens[begin + 1 : begin + count + 1]
    after[at : at + len(following)] = following
    positions[span], segments[span] = places, index + 1
    page[span] = np.asarray(one.pages)[places // page_size]
    offset[span] = places % page_size
    before = one.pages[: -(-begin // page_size)]
    pages += before
    filled = np.arange(len(before) * page_size)
    # Slots that are not filled yet are nobody's.
    slots.append(np.stack([filled, np.where(filled < begin, index + 1, 0)]))
    at += count
    if count == one.unread:
      last.append(at - 1)
      drawing.append(one)
  width = round_up(len(pages), _FEWEST_PAGES) if pages else 0
  table_X = np.full(width, pages_lib.TRASH, np.int32)
  table_X[: len(pages)] = pages
  slot_positions, slot_segments = np.zeros((2, width * page_size), np.int32)
  if pages:
    found = np.concatenate(slots, axis=1)
    slot_positions[: found.shape[1]], slot_segments[: found.shape[1]] = found
  rows = round_up(len(drawing), factor=4)
  last_R, drawn_R = np.zeros((2, rows), np.int32)
  last_R[: len(last)] = last
  drawn_R[: len(drawing)] = [one.drawn for one in drawing]
  return (
    programs.Packed(
      ids,
      positions,
      segments,
      after,
      page,
      offset,
      table_X,
      slot_positions,
      slot_segments,
      last_R,
      drawn_R,
    ),
    drawing,
  )
