"""Global batches that the step number alone determines, read ahead.

Where the data stands is the step: the same number gives the same batch for any
number of hosts and reading threads, after any interruption.
"""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax import errors
from llama_jax.data import dialogs, documents, packing, sources
from llama_jax.data import mixture as mixture_lib
from llama_jax.data import ramp as ramp_lib

# Steps read ahead of the one that trains.
AHEAD = 4
# What data.text holds.
DOCUMENTS = "documents"
CONVERSATIONS = "conversations"
PREFERENCES = "preferences"
FORMS = (DOCUMENTS, CONVERSATIONS, PREFERENCES)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is read.

  Attributes:
    text: a path or several, tokenized and packed at the start: JSONL, text, gz,
      or folders of them; with another form than documents also {source: paths},
      to be mixed. Or
    prepared: a folder that `prepare` wrote.
    mixture: source of the prepared folder -> its weight, or the same as text,
      "books:50,code:17"; empty for in proportion to their sizes.
    later_mixtures: pairs (from_tokens, mixture) that take over later on.
    separate_documents: those of a row do not see each other (Llama 3); False
      lets them, as in LLaMA 1 and 2.
    sequence_length: tokens in a row, at first (training.ramp).
    heldout: share of text's documents that are not trained on but evaluated.
    infill_rate: share of text's documents that are cut for infilling. What is
      prepared has both from its own config.
    workers: threads that read.
    seed: of the order of rows; every epoch has its own.
    tokenizer: a tokenizer's file or folder; "" takes that of init; "train"
      trains one on text, with the model's vocabulary. What is prepared has its
      own, and another is refused.
    form: one of FORMS; data/dialogs.py says what conversations and preferences
      look like.
    chat_template: of these, a name of text/templates.py or a file; "" takes
      the tokenizer's own.
    packed: several examples share a row without seeing each other; False gives
      each its own, filled with padding.
    max_skipped: the largest share of a source's rows that may be unusable.
    drop_ratings: of dialogs.RATINGS; preferences so rated are not trained on.
  """

  text: str | tuple[str, ...] | Mapping[str, str | tuple[str, ...]]
  prepared: str
  mixture: Mapping[str, float] | str
  later_mixtures: tuple[tuple[int, Mapping[str, float] | str], ...]
  separate_documents: bool
  sequence_length: int
  heldout: float
  infill_rate: float
  workers: int
  seed: int
  tokenizer: str
  form: str = DOCUMENTS
  chat_template: str = ""
  packed: bool = True
  max_skipped: float = 0.05
  drop_ratings: tuple[str, ...] = ()

  def __post_init__(self):
    if self.form not in FORMS:
      raise errors.ConfigError(
        f"data.form={self.form!r} is not known; use one of {', '.join(FORMS)}."
      )
    if not 0 <= self.max_skipped <= 1:
      raise errors.ConfigError(
        f"data.max_skipped={self.max_skipped} must lie between 0 and 1."
      )
    unknown = set(self.drop_ratings) - set(dialogs.RATINGS)
    if unknown or (self.drop_ratings and self.form != PREFERENCES):
      raise errors.ConfigError(
        f"data.drop_ratings={self.drop_ratings!r} must be a tuple of"
        f" {', '.join(dialogs.RATINGS)}, and is for data.form={PREFERENCES}."
      )
    if self.form == DOCUMENTS:
      for name in ("chat_template", "packed"):
        if getattr(self, name) != getattr(DataConfig, name):
          raise errors.ConfigError(
            f"data.{name}={getattr(self, name)!r} is for conversations and"
            " preferences; name one with data.form."
          )
    elif self.prepared or self.infill_rate:
      raise errors.ConfigError(
        f"data.form={self.form} is read from data.text, without"
        " data.prepared and data.infill_rate."
      )
    for name in ("sequence_length", "workers"):
      if getattr(self, name) < 1:
        raise errors.ConfigError(
          f"data.{name}={getattr(self, name)} must be 1 or more."
        )
    if not 0 <= self.infill_rate <= 1:
      raise errors.ConfigError(
        f"data.infill_rate={self.infill_rate} must lie between 0 and 1."
      )
    if not 0 <= self.heldout < 1:
      raise errors.ConfigError(
        f"data.heldout={self.heldout} must be 0 or more, and below 1."
      )
    if bool(self.text) == bool(self.prepared):
      raise errors.ConfigError(
        f"data.text={self.text!r} and data.prepared={self.prepared!r}: give"
        " one of them, --config.data.text=FILE_OR_FOLDER or"
        " --config.data.prepared=DIR."
      )
    named = hasattr(self.text, "items")
    if named and self.form == DOCUMENTS:
      raise errors.ConfigError(
        "data.text names several sources, which documents have in"
        " data.prepared alone; or set data.form."
      )
    if self.text and not named and (self.mixture or self.later_mixtures):
      raise errors.ConfigError(
        "data.mixture is for the sources of data.prepared; data.text is one"
        " source."
      )
    self.mixtures()  # refuses what is none

  @property
  def texts(self) -> dict[str, str | tuple[str, ...]]:
    """Paths of data.text by source; the only one is called text."""
    if hasattr(self.text, "items"):  # a ConfigDict is no Mapping
      return dict(self.text.items())
    return {"text": self.text}

  def mixtures(self) -> list[tuple[int, dict[str, float]]]:
    """(from_tokens, weights by source) of each; the first is from 0."""
    found = [(0, _weights(self.mixture, "data.mixture"))]
    for number, one in enumerate(self.later_mixtures):
      knob = f"data.later_mixtures[{number}]"
      try:
        tokens, weights = one
        tokens = int(tokens)
      except (TypeError, ValueError):
        tokens, weights = 0, None
      if tokens < 1:
        raise errors.ConfigError(
          f"{knob}={one!r} must be a pair: the number of tokens it begins at, 1"
          " or more, and a mixture."
        )
      found.append((tokens, _weights(weights, knob)))
    return found


def _weights(given, knob: str) -> dict[str, float]:
  """A mixture as a mapping, or as name:weight with commas between."""
  try:
    if isinstance(given, str):
      pairs = [one.split(":") for one in given.split(",") if one.strip()]
      weights = {name.strip(): float(weight) for name, weight in pairs}
      if len(weights) < len(pairs):
        raise ValueError("a source is named twice")
      return weights
    return {str(name): float(weight) for name, weight in given.items()}
  except (AttributeError, TypeError, ValueError) as error:
    raise errors.ConfigError(
      f"{knob}={given!r} is no mixture ({error}); give {{source: weight}}, or"
      " source:weight,source:weight."
    ) from error


def read_ahead(
  batches: "Batches",
  steps: range,
  rows: Callable[[int], slice],
  workers: int,
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of these steps in order, read by threads before they are asked.

  rows: step -> those of its batch that this host reads.
  """
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    pending: collections.deque[Any] = collections.deque()
    try:
      for step in steps:
        pending.append(pool.submit(batches.get, step, rows(step)))
        if len(pending) > AHEAD:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()
    finally:
      for future in pending:
        future.cancel()


class Batches:
  """Batch number n of an endless shuffled stream; the position is n.

  Attributes:
    mixture: which row of which source comes when.
    sizes: rows of each source.
  """

  def __init__(
    self,
    rows: Mapping[str, Sequence[dict[str, np.ndarray]]],
    config: DataConfig,
    ramp: ramp_lib.Ramp,
  ):
    """rows: of each source, in the length that ramp says."""
    self._rows = tuple(rows.values())
    self.sizes = {name: len(one) for name, one in rows.items()}
    self._separate = config.separate_documents
    self._ramp = ramp
    total = sum(map(len, self._rows))
    needed = max(ramp.at(0).rows, 1)
    if total < needed:
      first = ramp.stages[0]
      raise errors.ConfigError(
        f"the data makes {total} rows of {ramp.row_length} tokens, fewer than"
        f" the {needed} of training.batch_size={first.batch_size}; give more"
        " text, or a smaller training.batch_size or data.sequence_length."
      )
    self.mixture = mixture_lib.Mixture(
      self.sizes,
      [
        # Mixtures change at a whole row.
        (-(-tokens // ramp.row_length), weights)
        for tokens, weights in config.mixtures()
      ],
      config.seed,
    )

  def get(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """Sequences of global batch `step`: arrays [B, T], and sources [B]."""
    place = self._ramp.at(step)
    T = place.stage.sequence_length
    wanted = range(place.stage.batch_size)[rows]
    parts, whose, read = [], [], None
    for sequence in wanted:
      number, cut = divmod(sequence, place.cuts)
      if number != read:
        draw = self.mixture.draw(place.row + number)
        row, read = self._rows[draw.source][draw.index], number
      inputs = packing.inputs(row, cut * T, T, self._separate)
      parts.append(inputs | row.get("extra", {}))
      whose.append(draw.source)
    batch = {name: np.stack([p[name] for p in parts]) for name in parts[0]}
    return batch | {"sources": np.array(whose, np.int32)}

  def epochs(self, step: int) -> dict[str, float]:
    """Passes over each source before this step."""
    return self.mixture.epochs(self._ramp.at(step).row)

  def drawn(self, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Rows, each once, that the first `steps` batches are made of."""
    found = set()
    for number in range(self._ramp.at(steps).row):
      draw = self.mixture.draw(number)
      if (draw.source, draw.index) not in found:
        found.add((draw.source, draw.index))
        yield self._rows[draw.source][draw.index]
      if len(found) == sum(self.sizes.values()):
        return

  def documents(self, step: int) -> list[dict[str, Any]]:
    """What batch `step` is made of: source, row and documents of each row."""
    place = self._ramp.at(step)
    told = []
    for number in range(place.row, place.row + place.rows):
      draw = self.mixture.draw(number)
      row = self._rows[draw.source][draw.index]
      told.append(
        {
          "source": self.mixture.names[draw.source],
          "row": draw.index,
          "epoch": draw.epoch,
          "documents": [int(one) for one in row["documents"]],
        }
      )
    return told


def pack_text(
  config: DataConfig, tokenizer, row_length: int
) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
  """Rows of data.text to train on, and held-out ones; documents end in EOS."""
  encoder = documents.Encoder(
    tokenizer, row_length, config.infill_rate, config.seed
  )
  kept: dict[bool, list[packing.Document]] = {False: [], True: []}
  for index, text in enumerate(sources.documents(config.text)):
    digest = documents.digest(text.encode(errors="surrogatepass"))
    heldout = documents.is_held_out(digest, config.heldout)
    kept[heldout].append(encoder.document(text, index))
  return tuple(
    list(packing.pack(kept[heldout], row_length)) for heldout in (False, True)
  )
