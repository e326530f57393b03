"""Rows to batches in a shuffled order that the step number alone determines."""

import dataclasses

import numpy as np

from llama_jax import errors
from llama_jax.data import packing, sources


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is read.

  Attributes:
    text: a path or several: JSONL, text, gz, or folders of them.
    sequence_length: tokens in a row.
    seed: of the order of rows; every epoch has its own.
    tokenizer: a tokenizer's file or folder; "" takes that of init.
  """

  text: str | tuple[str, ...]
  sequence_length: int
  seed: int
  tokenizer: str

  def __post_init__(self):
    if self.sequence_length < 1:
      raise errors.ConfigError(
        f"data.sequence_length={self.sequence_length} must be 1 or more."
      )
    if not self.text:
      raise errors.ConfigError(
        "data.text is empty; give --config.data.text=FILE_OR_FOLDER."
      )


def load_rows(config: DataConfig, tokenizer) -> packing.PackedRows:
  """Reads, tokenizes and packs; each document ends with EOS if there is one."""
  texts = sources.documents(config.text)
  bos = tokenizer.add_bos and tokenizer.bos_id is not None
  ids = tokenizer.encode_batch(texts, bos=bos, eos=tokenizer.eos_id is not None)
  return packing.PackedRows(ids, config.sequence_length)


class Batches:
  """Batch number n of an endless shuffled stream; the position is n."""

  def __init__(self, rows, batch_size: int, seed: int):
    import grain

    if len(rows) < batch_size:
      raise errors.ConfigError(
        f"data.text makes {len(rows)} rows, fewer than"
        f" training.batch_size={batch_size}; give more text, or a smaller"
        " training.batch_size or data.sequence_length."
      )
    self._dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    self._batch_size = batch_size

  def get(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """Rows of global batch `step`, each array [rows, T]."""
    first = step * self._batch_size
    wanted = range(first, first + self._batch_size)[rows]
    loaded = [self._dataset[index] for index in wanted]
    return {name: np.stack([r[name] for r in loaded]) for name in loaded[0]}
