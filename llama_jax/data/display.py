"""Packed rows as people read them, before anybody trains on them."""

import random
import unicodedata
from collections.abc import Iterator

import numpy as np

from llama_jax import text as text_lib
from llama_jax.data import packing, prepared

# Of a document in a row, so many characters of its start and of its end.
_START, _END = 600, 200

_BOLD, _DIM, _CYAN, _YELLOW, _RESET = (
  f"\x1b[{code}m" for code in (1, 2, 36, 33, 0)
)


class Marks:
  """How kinds of text are set apart: by colour, or by signs."""

  def __init__(self, colours: bool):
    self._colours = colours

  def heading(self, text: str) -> str:
    return f"{_BOLD}{text}{_RESET}" if self._colours else f"=== {text}"

  def border(self, text: str) -> str:
    return f"{_YELLOW}{text}{_RESET}" if self._colours else f"--- {text}"

  def special(self, text: str) -> str:
    return f"{_CYAN}{text}{_RESET}" if self._colours else f"[{text}]"

  def masked(self, text: str) -> str:
    """Of text that no loss is taken on."""
    return f"{_DIM}{text}{_RESET}" if self._colours else f"({text})"

  @property
  def legend(self) -> str:
    return " ".join(
      (
        self.border("document"),
        self.special("special token"),
        self.masked("not in the loss"),
      )
    )


def lines(
  data: prepared.Prepared, rows: int, seed: int, colours: bool
) -> Iterator[str]:
  """Some rows of each source and of what is held out, drawn by the seed.

  Each document begins a line with its number in the source. Its first token
  of a row is in no loss: nothing before it that it could be told from, or, if
  it goes on from the row before, it was that row's last target.
  """
  tokenizer = text_lib.load_tokenizer(data.tokenizer)
  marks = Marks(colours)
  yield marks.legend
  for kind, sources in (("", data.sources), (", held out", data.heldout)):
    for name, source in sources.items():
      draws = random.Random(f"{seed} {name}{kind}")
      chosen = draws.sample(range(len(source)), min(rows, len(source)))
      for index in sorted(chosen):
        yield ""
        yield from _row(
          f"{name}{kind}: row {index} of {len(source)}",
          source[index],
          tokenizer,
          marks,
        )


def _row(
  title: str,
  row: dict[str, np.ndarray],
  tokenizer: text_lib.Tokenizer,
  marks: Marks,
) -> Iterator[str]:
  size = len(row["tokens"])
  padding = int(np.count_nonzero(row["segments"] == 0))
  inputs = packing.inputs(row, 0, size - 1, separate=True)
  # Whether each token is a target of the one before it.
  scored = np.r_[0.0, inputs["loss_mask"]]
  count = len(row["documents"])
  yield marks.heading(
    f"{title}: {size} tokens, {int(scored.sum())} in the loss, {count}"
    f" document{'s' if count > 1 else ''}, padding {padding}"
  )
  for number, document in enumerate(row["documents"].tolist(), start=1):
    where = row["segments"] == number
    yield marks.border(f"document {document}, {int(where.sum())} tokens")
    yield _document(row["tokens"][where], scored[where], tokenizer, marks)


def _document(
  tokens: np.ndarray,
  scored: np.ndarray,
  tokenizer: text_lib.Tokenizer,
  marks: Marks,
) -> str:
  special = {id: name for name, id in tokenizer.special_tokens.items()}
  shown: list[str] = []
  run: list[int] = []

  def flush(in_loss: bool) -> None:
    text = printable(tokenizer.decode(run)) if run else ""
    run.clear()
    if len(text) > _START + _END:
      left = len(text) - _START - _END
      text = f"{text[:_START]} ... {left:,} characters ... {text[-_END:]}"
    if text:
      shown.append(text if in_loss else marks.masked(text))

  before = True
  for token, counts in zip(tokens.tolist(), scored.tolist(), strict=True):
    in_loss = counts > 0
    if token in special:
      flush(before)
      name = marks.special(special[token])
      shown.append(name if in_loss else marks.masked(name))
    else:
      if in_loss != before:
        flush(before)
      run.append(token)
    before = in_loss
  flush(before)
  return "".join(shown)


def printable(text: str) -> str:
  """Text that cannot steer a terminal: control characters are spelt out."""
  return "".join(
    c
    if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf")
    else repr(c)[1:-1]
    for c in text
  )
