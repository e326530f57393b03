"""Sources into one endless stream, each row of it found by its number alone.

Every source has its own order, shuffled anew each epoch and seeded by its name,
so that adding a source leaves the others' orders alone. Weights are shares of
rows, which are all of one length: shares of tokens. A mixture's stages are as
Llama 3's annealing has them (arXiv:2407.21783, 3.1.3).
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama_jax import errors

# Rows after which a stage's pattern of sources repeats: weights are kept to one
# in ten thousand, and no stretch of rows is far from them.
PERIOD = 10_000


class Draw(NamedTuple):
  """One row of the stream: of which source, which of its rows, which epoch."""

  source: int
  index: int
  epoch: int


class Mixture:
  """The stream.

  Attributes:
    names: of the sources, in order.
  """

  def __init__(
    self,
    sizes: Mapping[str, int],
    stages: Sequence[tuple[int, Mapping[str, float]]],
    seed: int,
  ):
    """Plans.

    Args:
      sizes: rows of each source.
      stages: (first row of the stream, weight of each source); a source that is
        not named has no share. Weights need not sum to 1; none at all means
        in proportion to sizes.
      seed: of the orders.
    """
    self.names = tuple(sizes)
    self._sizes = tuple(sizes.values())
    self._orders = [_order(size, seed, name) for name, size in sizes.items()]
    self._stages = []
    taken = np.zeros(len(sizes), np.int64)
    for number, (first, weights) in enumerate(stages):
      knob = f"data.later_mixtures[{number - 1}]" if number else "data.mixture"
      if number and first <= self._stages[-1].first:
        raise errors.ConfigError(
          f"{knob} begins no later than the mixture before it; order them by"
          " their from_tokens, a row apart or more."
        )
      if number:
        before = self._stages[-1]
        taken = taken + before.taken(first - before.first)
      counts = _counts(sizes, weights, knob)
      self._stages.append(_Stage(first, taken, counts))

  def draw(self, number: int) -> Draw:
    """Row `number` of the stream."""
    stage = next(s for s in reversed(self._stages) if s.first <= number)
    rounds, offset = divmod(number - stage.first, PERIOD)
    source = int(stage.source[offset])
    nth = int(
      stage.before[source] + rounds * stage.counts[source] + stage.rank[offset]
    )
    epoch = nth // self._sizes[source]
    return Draw(source, int(self._orders[source][nth]), epoch)

  def taken(self, number: int) -> dict[str, int]:
    """Rows of each source among the first `number` of the stream."""
    stage = next(s for s in reversed(self._stages) if s.first <= number)
    taken = stage.before + stage.taken(number - stage.first)
    return dict(zip(self.names, map(int, taken), strict=True))

  def epochs(self, number: int) -> dict[str, float]:
    """Passes over each source that the first `number` rows make."""
    taken = self.taken(number).values()
    return {
      name: count / size
      for name, count, size in zip(self.names, taken, self._sizes, strict=True)
    }


class _Stage:
  """A pattern of PERIOD rows that repeats.

  Attributes:
    first: row of the stream.
    before: rows of each source that earlier stages took.
    counts: rows of each source in a period.
    source, rank: of each row in a period, whose it is and the how-many-eth.
  """

  def __init__(self, first: int, before: np.ndarray, counts: np.ndarray):
    self.first, self.before, self.counts = first, before, counts
    # Each source's rows evenly over the period: the j-th at (j + 1/2) / count.
    whose = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([np.arange(count) for count in counts])
    order = np.lexsort((whose, (rank + 0.5) / counts[whose]))
    self.source, self.rank = whose[order], rank[order]

  def taken(self, rows: int) -> np.ndarray:
    """Rows of each source among the stage's first `rows`."""
    rounds, rest = divmod(rows, PERIOD)
    part = np.bincount(self.source[:rest], minlength=len(self.counts))
    return rounds * self.counts + part


def _order(size: int, seed: int, name: str) -> Any:
  """An endless shuffled sequence of row numbers, in O(1) memory."""
  import grain

  digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
  own = int.from_bytes(digest[:4], "big")
  return grain.MapDataset.range(size).seed(own).shuffle().repeat()


def _counts(
  sizes: Mapping[str, int], weights: Mapping[str, float], knob: str
) -> np.ndarray:
  """Rows of each source in a period, by largest remainders."""
  for name, weight in weights.items():
    if name not in sizes:
      raise errors.ConfigError(
        f"{knob}.{name} is no source of the data; there are {', '.join(sizes)}."
      )
    if not 0 <= weight < float("inf"):
      raise errors.ConfigError(
        f"{knob}.{name}={weight} must be a number, 0 or more."
      )
  given = weights or sizes
  shares = np.array([float(given.get(name, 0)) for name in sizes])
  if not shares.sum():
    raise errors.ConfigError(f"{knob}: all weights are 0; give one.")
  for name, share in zip(sizes, shares, strict=True):
    if share and not sizes[name]:
      raise errors.ConfigError(
        f"{knob}.{name}={share}, but that source has no row."
      )
  exact = shares / shares.sum() * PERIOD
  counts = np.floor(exact).astype(np.int64)
  rest = PERIOD - counts.sum()
  counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
  lost = [
    n for n, s, c in zip(sizes, shares, counts, strict=True) if s and not c
  ]
  if lost:
    raise errors.ConfigError(
      f"{knob}: the share of {', '.join(lost)} is below one row in"
      f" {PERIOD:,}; give it more, or 0."
    )
  return counts
