"""Which sequences the next call works on, and whose pages they are.

Oldest first: who came first is admitted first, and where pages run out the
youngest gives back all of its own, to be computed again when there is room. So
the oldest always goes on, and with it all.
"""

import bisect
import dataclasses
from collections.abc import Callable

from llama_jax.decoding import pages as pages_lib
from llama_jax.decoding import request as request_lib


@dataclasses.dataclass(eq=False)
class Sequence:
  """One answer to a request, waiting or running.

  Attributes:
    number: by arrival.
    request_number: as Progress.request.
    request, sample: as there.
    tokens: the prompt and the answer so far.
    pages: in the order of the tokens; empty while it waits.
    cached: tokens of which the pages hold keys and values; all but the last
      one, unless the prompt is still being read.
    completion: what the caller gets.
    constraint: its own.
  """

  number: int
  request_number: int
  request: request_lib.Request
  sample: int
  tokens: list[int]
  completion: request_lib.Completion
  constraint: request_lib.Constraint | None
  pages: list[int] = dataclasses.field(default_factory=list)
  cached: int = 0

  @property
  def drawn(self) -> int:
    return len(self.tokens) - len(self.request.prompt)

  @property
  def left(self) -> int:
    """Tokens it may still draw."""
    return self.request.max_new_tokens - self.drawn

  @property
  def unread(self) -> int:
    """Tokens to read before the next one can be drawn; 1 while decoding."""
    return len(self.tokens) - self.cached


@dataclasses.dataclass(frozen=True)
class Plan:
  """Work for one step.

  Attributes:
    prefill: (sequence, how many of its unread tokens are read).
    decode: those that draw `count` tokens each.
  """

  prefill: list[tuple[Sequence, int]]
  decode: list[Sequence]
  count: int


@dataclasses.dataclass
class Counts:
  """What has happened: sequences preempted, prompt tokens found in pages."""

  preempted: int = 0
  shared_tokens: int = 0


class Scheduler:
  """Sequences in, plans out. It owns the pages' account.

  Args:
    pages: all of them.
    max_batch, chunk, tokens_per_call: as engine.EngineConfig.
    fits: whether so many sequences can be drawn from at once.
  """

  def __init__(
    self,
    pages: pages_lib.Pages,
    *,
    max_batch: int,
    chunk: int,
    tokens_per_call: int,
    fits: Callable[[list[Sequence]], bool],
  ):
    self.pages = pages
    self.counts = Counts()
    self._max_batch, self._chunk = max_batch, chunk
    self._tokens_per_call, self._fits = tokens_per_call, fits
    # Both by number.
    self.waiting: list[Sequence] = []
    self.running: list[Sequence] = []

  def add(self, sequence: Sequence) -> None:
    bisect.insort(self.waiting, sequence, key=lambda one: one.number)

  def remove(self, sequence: Sequence) -> None:
    """Ends a sequence wherever it is; its pages are back at once."""
    if sequence in self.waiting:
      self.waiting.remove(sequence)
    else:
      self.running.remove(sequence)
      self._give_back(sequence)

  def plan(self) -> Plan:
    decode, count = self._plan_decoding()
    prefill = self._plan_prefill()
    return Plan(prefill, decode, count)

  def read(self, sequence: Sequence, count: int) -> None:
    """Notes that so many more tokens of a sequence are in its pages."""
    before = sequence.cached // self.pages.page_size
    sequence.cached += count
    if sequence.cached // self.pages.page_size > before:
      self.pages.name(
        sequence.tokens[: sequence.cached], sequence.pages, ready=True
      )

  def _plan_decoding(self):
    ready = [one for one in self.running if one.unread == 1]
    # A constraint looks at each token before the next.
    count = self._tokens_per_call
    if any(one.constraint is not None for one in ready):
      count = 1
    kept = []
    for sequence in ready:
      # The last token drawn is never cached.
      tokens = sequence.cached + min(count, sequence.left)
      while sequence in self.running:
        missing = self.pages.needed(tokens) - len(sequence.pages)
        taken = self.pages.take(max(missing, 0))
        if taken is not None:
          sequence.pages += taken
          kept.append(sequence)
          break
        self._preempt(self.running[-1])
    kept = [one for one in kept if one in self.running]
    # The youngest keep their pages and wait; one alone always goes on.
    while len(kept) > 1 and not self._fits(kept):
      kept.pop()
    return kept, count

  def _plan_prefill(self):
    room = self._chunk
    planned = []
    for sequence in self.running:
      if sequence.unread > 1 and room:
        count = min(sequence.unread, room)
        planned.append((sequence, count))
        room -= count
    for sequence in list(self.waiting):
      if not room or len(self.running) == self._max_batch:
        break
      tokens = sequence.tokens
      found = pages_lib.Found((), False)
      if sequence.request.prompt_logprobs is None:
        found = self.pages.find(tokens)
      if found.pending:
        # What it begins with is on its way; it keeps its place.
        continue
      self.pages.hold(found.pages)
      need = self.pages.needed(len(tokens)) - len(found.pages)
      # A page to spare for each that runs, lest it be preempted at once.
      spare = len(self.running)
      taken = None
      if need + spare <= self.pages.available:
        taken = self.pages.take(need)
      if taken is None:
        self.pages.release(found.pages)
        break
      self.waiting.remove(sequence)
      bisect.insort(self.running, sequence, key=lambda one: one.number)
      sequence.pages = [*found.pages, *taken]
      sequence.cached = len(found.pages) * self.pages.page_size
      self.counts.shared_tokens += sequence.cached
      self.pages.name(tokens, sequence.pages, ready=False)
      if sequence.unread > 1:
        count = min(sequence.unread, room)
        planned.append((sequence, count))
        room -= count
    return planned

  def _preempt(self, sequence):
    self.counts.preempted += 1
    self.running.remove(sequence)
    self._give_back(sequence)
    self.add(sequence)

  def _give_back(self, sequence):
    self.pages.release(sequence.pages)
    sequence.pages, sequence.cached = [], 0
