"""The work that both sides of the GPU training benchmark do: numbers alone.

Rows of tokens and text come from NumPy by seed, so that no file has to pass
between a process of JAX and one of torch; weights likewise (gpu_weights.py).
"""

import pathlib
import sysconfig

import numpy as np

OPTIMIZER = {
  "peak_lr": 1e-5,
  "b1": 0.9,
  "b2": 0.95,
  "eps": 1e-5,
  "weight_decay": 0.1,
  "clip_norm": 1.0,
}


def rows(
  vocab_size: int, count: int, length: int, mean_document: int, seed: int
) -> dict[str, np.ndarray]:
  """A batch of random tokens, each array [count, length].

  Args:
    vocab_size: ids are even over it.
    count: rows.
    length: tokens of a row; all of them are real.
    mean_document: of documents that do not see each other, their lengths
      exponential; 0 for one document a row.
    seed: of all.
  """
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, vocab_size, (count, length + 1), dtype=np.int32)
  segments = np.ones((count, length + 1), np.int32)
  positions = np.tile(np.arange(length + 1, dtype=np.int32), (count, 1))
  if mean_document:
    for row in range(count):
      start, number = 0, 0
      while start <= length:
        stop = start + 2 + int(rng.exponential(mean_document - 2))
        number += 1
        segments[row, start:stop] = number
        positions[row, start:stop] -= start
        start = stop
  return {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "positions": positions[:, :-1],
    "segments": segments[:, :-1],
    "loss_mask": (segments[:, 1:] == segments[:, :-1]).astype(np.float32),
    "sources": np.zeros(count, np.int32),
  }


def text(count: int) -> np.ndarray:
  """Bytes of real text as ids below 256: this Python's own sources."""
  folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
  found, total = [], 0
  for path in sorted(folder.rglob("*.py")):
    if "site-packages" in path.parts:
      continue
    found.append(np.frombuffer(path.read_bytes(), np.uint8))
    total += len(found[-1])
    if total >= count:
      break
  return np.resize(np.concatenate(found), count).astype(np.int32)
