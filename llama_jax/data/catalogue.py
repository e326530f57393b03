"""Texts of a dataset that tensorflow-datasets has on this machine."""

import os
from collections.abc import Iterator

from llama_jax import errors
from llama_jax.data import records


class Records:
  """A split's examples, each a text or Bad, in order.

  Args:
    name: as tfds has it ("wiki40b/en"), or the folder of a dataset. It is
      read without TensorFlow, so it must be stored as array_record.
    field: the feature that is the text.
    limit: most bytes of a text.

  Attributes:
    position: examples that have been read.

  Raises:
    UserError: there is no such dataset, split or feature here.
  """

  def __init__(self, name: str, split: str, field: str, limit: int):
    import tensorflow_datasets as tfds

    self._field = field
    self._limit = limit
    self.position = 0
    try:
      builder = (
        tfds.builder_from_directory(name)
        if os.path.isdir(name)
        else tfds.builder(name, file_format="array_record")
      )
      known = list(builder.info.splits)
      if split in known:
        self._rows = builder.as_data_source(split)
    except (
      AttributeError,
      ImportError,
      OSError,
      ValueError,
      NotImplementedError,
      tfds.core.DatasetNotFoundError,
    ) as error:
      raise errors.UserError(
        f"{name} is no dataset of tensorflow-datasets that is here as"
        f" array_record ({str(error).strip().splitlines()[0]}); give the"
        " folder of one."
      ) from error
    if split not in known:
      raise errors.UserError(
        f"{name} has no split {split!r}; it has {', '.join(known) or 'none'}"
        " on this machine."
      )
    if field not in builder.info.features:
      raise errors.UserError(
        f"{name} has no feature {field!r}; it has"
        f" {', '.join(builder.info.features)}."
      )

  def __len__(self) -> int:
    return len(self._rows)

  def __iter__(self) -> Iterator[str | records.Bad]:
    for index in range(len(self._rows)):
      self.position = index + 1
      where = f"example {index}"
      try:
        text = self._rows[index][self._field]
      except (OSError, RuntimeError, ValueError, LookupError) as error:
        yield records.Bad(where, f"cannot be read ({error})")
        continue
      if not isinstance(text, bytes):
        yield records.Bad(where, f"{self._field} is no text")
      elif len(text) > self._limit:
        yield records.too_long(where, self._limit)
      else:
        try:
          yield text.decode()
        except UnicodeDecodeError as error:
          yield records.Bad(where, f"byte {error.start} is not UTF-8 text")
