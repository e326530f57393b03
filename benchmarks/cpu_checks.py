"""What must hold before a CPU benchmark times anything: sides that agree."""

import pathlib
from collections.abc import Callable, Sequence

import cpu_side
import numpy as np

from llama_jax import errors

LOGITS_TOLERANCE = 1e-3


class Checks:
  """Compares sides.

  Attributes:
    lines: each check that was made, in words.
  """

  def __init__(self, folder: pathlib.Path, say: Callable[[str], None]):
    """folder: for passing files; say: takes a line of progress."""
    self.lines: list[str] = []
    self._file = folder / "logits.npy"
    self._say = say

  def expect(self, what: str, ok: bool, detail: str) -> None:
    """Notes a check; raises UserError where it fails."""
    line = f"{what}: {detail}"
    self.lines.append(line)
    self._say(f"check  {line}")
    if not ok:
      raise errors.UserError(
        f"the sides do not compute the same, so nothing is timed: {line}."
      )

  def logits(
    self, worker: cpu_side.Worker, ids: Sequence[Sequence[int]], **how
  ) -> np.ndarray:
    """Float32 [B, T, vocab] of a side."""
    worker.ask("logits", ids=ids, file=str(self._file), **how)
    return np.load(self._file)

  def same_logits(
    self,
    what: str,
    ids: Sequence[Sequence[int]],
    ours: cpu_side.Worker,
    other: cpu_side.Worker,
    tolerance: float = LOGITS_TOLERANCE,
    **how,
  ) -> None:
    """how: what the other side is told beside the ids."""
    pair = self.logits(ours, ids), self.logits(other, ids, **how)
    difference = float(np.abs(pair[0] - pair[1]).max())
    self.expect(
      f"{what}, {len(ids[0])} tokens",
      difference <= tolerance,
      f"largest difference {difference:.1e}, allowed {tolerance:.0e}",
    )

  def same_tokens(
    self,
    what: str,
    prompts: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    others: Sequence[Sequence[int]],
    judge: cpu_side.Worker,
  ) -> None:
    """Greedy tokens may part at a tie of the judge's logits, nowhere else."""
    lengths = [[len(row) for row in rows] for rows in (ours, others)]
    if lengths[0] != lengths[1]:
      self.expect(what, False, f"{lengths[0]} of ours, {lengths[1]} of theirs")
    gaps = []
    for prompt, a, b in zip(prompts, ours, others, strict=True):
      if a == b:
        continue
      at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
      logits = self.logits(judge, [[*prompt, *b[:at]]])[0, -1]
      gaps.append(abs(float(logits[a[at]] - logits[b[at]])))
    detail = "equal"
    if gaps:
      detail = (
        f"{len(gaps)} of {len(prompts)} rows part, where the two best are at"
        f" most {max(gaps):.1e} apart"
      )
    self.expect(what, max(gaps, default=0.0) <= 2 * LOGITS_TOLERANCE, detail)
