"""Conversations and preferences into rows: what finetuning reads.

A conversation becomes a document of which the model is to say the assistant's
tokens alone, the token that ends a turn among them. A preference becomes one of
as many sequences as it has answers, each with the prompt before it; of these
the last answer alone is trained. A source of conversations may hold plain texts
too ({"text"}), all of which is trained: what is rehearsed.

Llama 3 wrote the prompt once before all answers of a row (arXiv:2407.21783,
4.1.2), an approximation; here each answer has its own, so that a packed row
gives what the sequences give alone, and their order is no matter.

R tokens of a row, S segments of a row, P pairs of a row.
"""

import collections
import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax import cores, errors
from llama_jax.data import (
  batches,
  dialogs,
  documents,
  packing,
  processes,
  records,
  sources,
)
from llama_jax.text import chat, templates

# Reasons and places that a message quotes at most.
_NAMED = 3
# Rows that one process is given at a time, and of a source those that are read
# before there are others: rendering a chat takes milliseconds, beginning a
# process seconds.
_CHUNK, _ALONE = 256, 2048

Rows = list[dict[str, Any]]


@dataclasses.dataclass
class Counts:
  """What was met in one source.

  Attributes:
    kept, heldout: examples to train on, and held-out ones.
    tokens, trained: of those to train on: all, and what the model is to say.
    dropped: rows of data.drop_ratings.
    skipped: reason -> rows that cannot be used.
    named: the first few of these, for people.
  """

  kept: int = 0
  heldout: int = 0
  tokens: int = 0
  trained: int = 0
  dropped: int = 0
  skipped: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  named: list[str] = dataclasses.field(default_factory=list)

  def __str__(self) -> str:
    skipped = sum(self.skipped.values())
    reasons = "".join(
      f"; {count} x {reason}"
      for reason, count in self.skipped.most_common(_NAMED)
    )
    share = self.trained / max(self.tokens, 1)
    dropped = f" {self.dropped:,} dropped by rating," if self.dropped else ""
    return (
      f"{self.kept:,} to train on, {self.heldout:,} held out,{dropped}"
      f" {skipped:,} skipped{reasons}; the model is to say {share:.0%} of"
      f" {self.tokens:,} tokens"
    )


@dataclasses.dataclass(frozen=True)
class Example:
  """What a row says.

  Attributes:
    document: of index 0.
    asked: what the user said first; those of one prompt are held out together.
    preference: None of a conversation.
  """

  document: packing.Document
  asked: str
  preference: dialogs.Preference | None = None


@dataclasses.dataclass(frozen=True)
class Examples:
  """Rows by source; sources without held-out rows are not in heldout."""

  rows: dict[str, Rows]
  heldout: dict[str, Rows]
  counts: dict[str, Counts]


def read(
  config: batches.DataConfig,
  tokenizer,
  row_length: int,
  *,
  formatting: bool = True,
) -> Examples:
  """Reads and packs data.text, of the form that data.form says.

  Args:
    config: what is read.
    tokenizer: with a chat template.
    row_length: R; an example that is longer is skipped.
    formatting: whether the tokens that end an answer are trained; Llama 3's
      DPO leaves them out (arXiv:2407.21783, 4.1.4).

  Returns:
    Rows as packing.pack makes them. Those of preferences also have "extra",
    arrays that go along with the row: pairs int32 [P, 2], segments of the
    better and the other answer, 0 for none; ratings int32 [P], indices into
    dialogs.RATINGS, -1 for none; last int32 [S], where segment s + 1 ends;
    safe int32 [S], 1, 0 or -1 for not told.

  Raises:
    BadFileError: a source has no example that can be used, or more than
      data.max_skipped that cannot.
  """
  kind = {
    batches.CONVERSATIONS: Conversations,
    batches.PREFERENCES: Preferences,
  }[config.form](tokenizer, row_length, formatting)
  found: dict[bool, dict[str, Rows]] = {False: {}, True: {}}
  counts = {}
  # By the index of its document.
  preferences: list[dialogs.Preference | None] = []
  for name, paths in config.texts.items():
    counts[name], split = _read_source(config, kind, name, paths, preferences)
    for heldout, documents_ in split.items():
      rows = kind.pack(documents_, config.packed)
      if rows:
        found[heldout][name] = rows
  kind.finish(
    list(itertools.chain(*found[False].values(), *found[True].values())),
    preferences,
  )
  return Examples(found[False], found[True], counts)


def _read_source(config, kind, name, paths, preferences):
  """Counts, and the documents to train on and those held out."""
  knob = f"data.text.{name}" if len(config.texts) > 1 else "data.text"
  counts = Counts()
  split: dict[bool, list[packing.Document]] = {False: [], True: []}
  for where, example in _examples(kind, _objects(paths, knob)):
    if isinstance(example, str):
      counts.skipped[example] += 1
      if len(counts.named) < _NAMED:
        counts.named.append(f"{where}: {example}")
      continue
    if _is_dropped(example.preference, config.drop_ratings):
      counts.dropped += 1
      continue
    document = dataclasses.replace(example.document, index=len(preferences))
    preferences.append(example.preference)
    digest = documents.digest(example.asked.encode(errors="surrogatepass"))
    heldout = documents.is_held_out(digest, config.heldout)
    split[heldout].append(document)
    if heldout:
      counts.heldout += 1
    else:
      counts.kept += 1
      counts.tokens += len(document.ids)
      trained = document.trained
      counts.trained += len(document.ids) if trained is None else sum(trained)
  skipped = sum(counts.skipped.values())
  total = counts.kept + counts.heldout + counts.dropped + skipped
  if skipped > config.max_skipped * total or skipped == total:
    raise errors.BadFileError(
      f"{knob}: of {total} rows {skipped} cannot be used as {config.form}:"
      f" {'; '.join(counts.named)}. Mend them, or let a larger share be skipped"
      f" with --config.data.max_skipped (it is {config.max_skipped})."
    )
  if not counts.kept:
    raise errors.BadFileError(
      f"{knob}: of {total} rows none is left to train on: {counts.heldout} are"
      f" held out (--config.data.heldout={config.heldout}), {counts.dropped}"
      f" dropped by their rating (--config.data.drop_ratings), {skipped} cannot"
      " be used. Give more, or change these."
    )
  return counts, split


def _is_dropped(preference: dialogs.Preference | None, ratings) -> bool:
  rated = preference is not None and preference.rating >= 0
  return rated and dialogs.RATINGS[preference.rating] in ratings


def _objects(paths, knob) -> Iterator[tuple[str, Any]]:
  """(where it is, row) of each."""
  for path in sources.expand(paths, knob):
    for number, row in enumerate(records.Records(path, field=None), 1):
      bad = isinstance(row, records.Bad)
      place = row.where if bad and row.where else f"row {number}"
      yield f"{path}, {place}", row


def _examples(kind, rows) -> Iterator[tuple[str, Example | str]]:
  """(where it is, what it says or why it cannot be used) of rows, in order."""
  rows = iter(rows)
  yield from _convert(kind, itertools.islice(rows, _ALONE))
  workers = cores.usable()
  more = list(itertools.islice(rows, _CHUNK))
  if workers == 1 or len(more) < _CHUNK:
    yield from _convert(kind, itertools.chain(more, rows))
    return
  chunks = iter(lambda: list(itertools.islice(rows, _CHUNK)), [])
  with processes.Pool(
    workers,
    # Pickled once, not with every chunk: it holds the tokenizer.
    copy.copy,
    (kind,),
    "give it more, or fewer cores (taskset).",
  ) as pool:
    for converted in pool.map(_convert_all, itertools.chain([more], chunks)):
      yield from converted


def _convert(kind, rows) -> Iterator[tuple[str, Example | str]]:
  for where, row in rows:
    try:
      if isinstance(row, records.Bad):
        raise dialogs.Unusable(row.problem)
      yield where, kind.example(row)
    except (dialogs.Unusable, errors.UserError) as error:
      yield where, str(error).rstrip(".")


def _convert_all(kind, rows) -> list[tuple[str, Example | str]]:
  return list(_convert(kind, rows))


class _Kind:
  """How rows become examples, and these rows of tokens.

  Args:
    tokenizer: with a chat template.
    row_length: no example has more tokens.
    formatting: see `read`.
  """

  def __init__(self, tokenizer, row_length: int, formatting: bool):
    if tokenizer.chat_template is None:
      raise errors.ConfigError(
        "the tokenizer has no chat template; name one with"
        f" --config.data.chat_template, one of {', '.join(templates.TEMPLATES)}"
        " or a file."
      )
    self._tokenizer = tokenizer
    self._row_length = row_length
    self._special = (
      set() if formatting else {*tokenizer.special_tokens.values()}
    )

  def _render(self, talk: dialogs.Conversation) -> tuple[list[int], np.ndarray]:
    """Ids, and which of them are the assistant's."""
    rendered = chat.render(
      self._tokenizer,
      talk.messages,
      add_generation_prompt=False,
      find_assistant=True,
      **talk.variables,
    )
    return rendered.ids, np.array(rendered.assistant, bool)

  def answered(
    self, talk: dialogs.Conversation
  ) -> tuple[list[int], np.ndarray]:
    """Ids up to the end of the last answer, and which are that answer's.

    A reward model scores the last of them.
    """
    ids, assistant = self._render(talk)
    places = np.flatnonzero(assistant)
    if not len(places):
      raise dialogs.Unusable("the chat template leaves nothing of the answer")
    end = places[-1] + 1
    self._fit(ids[:end], self._row_length)
    # Earlier answers are apart from it by what the user said.
    others = np.flatnonzero(~assistant[:end])
    trained = np.arange(end) > (others[-1] if len(others) else -1)
    return ids[:end], trained

  def _fit(self, ids, longest: int) -> None:
    if len(ids) > longest:
      # Of one reason for all lengths the count says more.
      raise dialogs.Unusable(
        f"longer than a row of {self._row_length} tokens (data.sequence_length)"
      )

  def _document(self, ids, trained, parts=()) -> packing.Document:
    if self._special:
      trained = trained & ~np.isin(ids, list(self._special))
    if not trained.any():
      raise dialogs.Unusable("the chat template leaves nothing of the answer")
    return packing.Document(np.asarray(ids, np.int32), 0, True, trained, parts)


class Conversations(_Kind):
  """Conversations, and plain texts beside them."""

  def __init__(self, tokenizer, row_length, formatting):
    super().__init__(tokenizer, row_length, formatting)
    self._texts = documents.Encoder(tokenizer, row_length)

  def example(self, row: Mapping[str, Any]) -> Example:
    # A conversation may carry its rendered text along, as Alpaca's rows do.
    if isinstance(row.get("text"), str) and not dialogs.is_conversation(row):
      if not row["text"]:
        raise dialogs.Unusable("a text is empty")
      return Example(self._texts.document(row["text"], 0), row["text"])
    one = dialogs.conversation(row)
    ids, trained = self._render(one)
    self._fit(ids, self._row_length)
    return Example(self._document(ids, trained), _asked(one.messages))

  def pack(self, found: list[packing.Document], together: bool) -> Rows:
    return list(packing.pack(found, self._row_length, together))

  def finish(self, rows: Rows, preferences: Sequence[None]) -> None:
    del rows, preferences


class Preferences(_Kind):
  """Preferences; what their rows take along."""

  def example(self, row: Mapping[str, Any]) -> Example:
    one = dialogs.preference(row)
    answers = [
      self.answered(
        dialogs.Conversation(
          [*one.prompt, {"role": "assistant", "content": answer}]
        )
      )
      for answer in one.answers
    ]
    ids = [i for answer, _ in answers for i in answer]
    # Each token is an input: the last one's hidden state is what is scored.
    self._fit(ids, self._row_length - 1)
    if len({tuple(answer) for answer, _ in answers}) < len(answers):
      raise dialogs.Unusable("two answers are alike")
    document = self._document(
      ids,
      np.concatenate([trained for _, trained in answers]),
      tuple(len(answer) for answer, _ in answers),
    )
    return Example(document, _asked(one.prompt), one)

  def pack(self, found: list[packing.Document], together: bool) -> Rows:
    return [
      {
        name: array
        if name == "documents"
        else np.append(array, array.dtype.type(0))
        for name, array in row.items()
      }
      for row in packing.pack(found, self._row_length - 1, together)
    ]

  def finish(
    self, rows: Rows, preferences: Sequence[dialogs.Preference]
  ) -> None:
    """Adds what goes along, in arrays of the same size for all rows.

    preferences: by the index of their documents.
    """
    pairs = [_pairs(row, preferences) for row in rows]
    P = max(map(len, pairs), default=0)
    S = max((len(row["documents"]) for row in rows), default=0)
    for row, found in zip(rows, pairs, strict=True):
      extra = {
        "pairs": np.zeros((P, 2), np.int32),
        "ratings": np.full(P, -1, np.int32),
        "last": np.zeros(S, np.int32),
        "safe": np.full(S, -1, np.int32),
      }
      for number, (better, other, rating) in enumerate(found):
        extra["pairs"][number] = better, other
        extra["ratings"][number] = rating
      for segment, (index, group) in enumerate(_answers(row), 1):
        place = np.flatnonzero(row["segments"] == segment)[-1]
        extra["last"][segment - 1] = place
        extra["safe"][segment - 1] = preferences[index].safe[group]
      row["extra"] = extra


def _pairs(row, preferences) -> list[tuple[int, int, int]]:
  """(segment of the better, of the other, rating) of each two answers."""
  found = []
  segment = 1
  for index, group in itertools.groupby(map(int, row["documents"])):
    count = len(list(group))
    for better, other in itertools.combinations(range(count), 2):
      rated = better == count - 2
      rating = preferences[index].rating if rated else -1
      found.append((segment + better, segment + other, rating))
    segment += count
  return found


def _answers(row) -> Iterator[tuple[int, int]]:
  """(preference, number of the answer) of each segment of a row."""
  for index, group in itertools.groupby(map(int, row["documents"])):
    for number, _ in enumerate(group):
      yield index, number


def _asked(messages) -> str:
  """What the user said first: examples of one prompt are held out together."""
  for message in messages:
    if message["role"] == "user" and isinstance(message["content"], str):
      return message["content"]
  return str(messages[0].get("content"))
