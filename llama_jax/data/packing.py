"""Documents into rows of fixed length, every token used, none seen twice.

All documents lie end to end; row i predicts tokens i * T + 1 ... (i + 1) * T
of them. A long document runs over rows. Tokens of one row see only their own
document (segment ids), and each document's part of a row counts its positions
from 0.
"""

import numpy as np

PADDING = 0


class PackedRows:
  """A random-access source: len() rows, [i] one row as a dict of int32 [T].

  Keys: tokens, targets, positions, segments (0 is padding), loss_mask
  (float32; 0 where the next token is another document's).
  """

  def __init__(self, documents: list[list[int]], sequence_length: int):
    """documents: token ids of each document, its own BOS and EOS included."""
    self._length = sequence_length
    sizes = np.array([len(document) for document in documents], np.int64)
    self._ends = np.cumsum(sizes)
    self._tokens = (
      np.concatenate([np.asarray(d, np.int32) for d in documents])
      if documents
      else np.zeros(0, np.int32)
    )

  def __len__(self) -> int:
    # The last token is only ever a target.
    return -(-max(len(self._tokens) - 1, 0) // self._length)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    T = self._length
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f"row {index} of {len(self)}")
    start = index * T
    tokens = self._tokens[start : start + T + 1]
    # Which document each of these tokens belongs to.
    owner = np.searchsorted(
      self._ends, np.arange(start, start + len(tokens)), side="right"
    )
    used = len(tokens) - 1
    # A document's first token in the row opens a new segment.
    opens = np.r_[True, owner[1:used] != owner[: used - 1]]
    first = np.maximum.accumulate(np.where(opens, np.arange(used), 0))
    row = {
      "tokens": tokens[:used],
      "targets": tokens[1:],
      "positions": (np.arange(used) - first).astype(np.int32),
      "segments": np.cumsum(opens).astype(np.int32),
      "loss_mask": (owner[1:] == owner[:used]).astype(np.float32),
    }
    return {name: np.pad(a, (0, T - used)) for name, a in row.items()}
