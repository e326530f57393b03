"""Pages counted and named right through any life of any requests.

The engine itself, with a device that is played: a page holds the ids that were
written to it, and the next token is a hash of all ids before it as the pages
tell them. So a page that is given away too soon, shared wrongly or lost shows
in an answer, and every answer is known beforehand.
"""

import zlib

import hypothesis
import hypothesis.stateful
import hypothesis.strategies as st
import numpy as np
import pytest

from llama_jax.decoding import engine as engine_lib
from llama_jax.decoding import pages as pages_lib
from llama_jax.decoding import programs, sampling
from llama_jax.decoding import request as request_lib
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes

NANO = sizes.get("nano")
PAGE, COUNT = 4, 12
STOP_ID = 7
# Prompts that begin alike and part at any place.
SYSTEM = [1, 2, 3, 1, 2, 3, 1, 2, 3]


def follow(ids) -> int:
  return zlib.crc32(bytes(ids)) % 50


def answer(prompt, new) -> list[int]:
  ids = list(prompt)
  for _ in range(new):
    ids.append(follow(ids))
    if ids[-1] == STOP_ID:
      break
  return ids[len(prompt) :]


class Device:
  """What the functions of programs.py do, on pages of plain ids."""

  def __init__(self):
    self.held = np.full((COUNT + 1, PAGE), 255, np.uint8)

  def read(self, params, pools, packed, *rest, **static):
    before = self.held[packed.table_X].reshape(-1)
    drawn = np.zeros(len(packed.last_R), np.int32)
    for row, last in enumerate(packed.last_R):
      segment = packed.segments_T[last]
      ids = before[packed.slot_segments_S == segment].tolist()
      mine = np.flatnonzero(packed.segments_T[: last + 1] == segment)
      assert packed.positions_T[mine].tolist() == list(
        range(len(ids), len(ids) + len(mine))
      )
      drawn[row] = follow(ids + packed.ids_T[mine].tolist())
    self.held[packed.page_T, packed.offset_T] = packed.ids_T
    return drawn, None, None, pools

  def gather(self, pools, table_BX, length_B, *, room):
    return [
      self.held[pages].reshape(-1)[:length].tolist()
      for pages, length in zip(table_BX, length_B, strict=True)
    ]

  def draw(self, params, pools, cache, rows, *rest, **static):
    drawn = np.zeros(rows.page_BC.shape, np.int32)
    in_place = cache is None
    if in_place:
      cache = self.gather(pools, rows.table_BX, rows.length_B, room=0)
    for row, ids in enumerate(cache):
      token = rows.token_B[row]
      for step, page in enumerate(rows.page_BC[row]):
        ids.append(token)
        self.held[page, rows.offset_BC[row, step]] = token
        token = drawn[row, step] = follow(ids)
    return drawn, None, pools, None if in_place else cache


class Life(hypothesis.stateful.RuleBasedStateMachine):
  """Requests come, are decoded, cancelled and preempted, in any order."""

  def __init__(self):
    super().__init__()
    self.engine = engine_lib.Engine(
      decoder_lib.Decoder(NANO, scan=False),
      None,
      engine_lib.EngineConfig(
        cache_tokens=PAGE * COUNT,
        page_size=PAGE,
        max_batch=4,
        chunk=7,
        tokens_per_call=3,
      ),
    )
    device = Device()
    self.patch = pytest.MonkeyPatch()
    self.patch.setattr(programs, "read", device.read)
    self.patch.setattr(programs, "gather", device.gather)
    self.patch.setattr(programs, "draw", device.draw)
    self.asked: dict[int, request_lib.Request] = {}
    self.cancelled: set[tuple[int, int]] = set()
    self.ended: dict[tuple[int, int], request_lib.Completion] = {}

  def teardown(self):
    self.patch.undo()

  @hypothesis.stateful.rule(
    shared=st.integers(0, len(SYSTEM)),
    own=st.lists(st.integers(0, 9), max_size=12),
    new=st.integers(1, 20),
    samples=st.integers(1, 3),
  )
  def submit(self, shared, own, new, samples):
    prompt = (SYSTEM[:shared] + own) or [0]
    request = request_lib.Request(
      prompt,
      new,
      sampling.SamplingConfig(),
      samples=samples,
      stop_ids=(STOP_ID,),
    )
    self.asked[self.engine.submit(request)] = request

  @hypothesis.stateful.rule()
  def send(self):
    """What comes now, comes while the device works on a step."""
    self.engine.start()

  @hypothesis.stateful.rule(times=st.integers(1, 4))
  def step(self, times):
    for _ in range(times):
      for progress in self.engine.step():
        if progress.completion.finish_reason:
          key = (progress.request, progress.sample)
          assert key not in self.ended
          self.ended[key] = progress.completion

  @hypothesis.stateful.precondition(lambda self: self.asked)
  @hypothesis.stateful.rule(data=st.data())
  def cancel(self, data):
    number = data.draw(st.sampled_from(sorted(self.asked)))
    samples = self.asked[number].samples
    sample = data.draw(st.sampled_from([None, *range(samples)]))
    self.engine.cancel(number, sample)
    for one in range(samples) if sample is None else (sample,):
      if (number, one) not in self.ended:
        self.cancelled.add((number, one))

  @hypothesis.stateful.invariant()
  def every_page_is_where_it_should_be(self):
    pages, scheduler = self.engine.pages, self.engine._scheduler
    holders = [0] * (COUNT + 1)
    for sequence in scheduler.running:
      assert len(sequence.pages) <= COUNT
      for page in sequence.pages:
        holders[page] += 1
    assert pages._holders == holders
    assert pages.held == sum(map(bool, holders))
    assert holders[pages_lib.TRASH] == 0
    apart = [*pages._free, *pages._idle, *np.flatnonzero(holders)]
    assert sorted(apart) == list(range(1, COUNT + 1))
    assert all(not one.pages for one in scheduler.waiting)
    assert len(scheduler.running) <= 4

  @hypothesis.stateful.rule()
  def finish(self):
    """All that was asked is answered, right, and every page is back."""
    for _ in range(500):
      if not self.engine.busy:
        break
      self.step(1)
    assert not self.engine.busy
    assert self.engine.pages.held == 0
    for number, request in self.asked.items():
      want = answer(request.prompt, request.max_new_tokens)
      for sample in range(request.samples):
        found = self.ended[number, sample]
        if (number, sample) in self.cancelled:
          assert found.finish_reason == request_lib.CANCELLED
          assert found.tokens == want[: len(found.tokens)]
        else:
          assert found.tokens == want
          stopped = want[-1] == STOP_ID
          assert found.finish_reason == ("stop" if stopped else "length")


TestLife = Life.TestCase
TestLife.settings = hypothesis.settings(
  max_examples=60,
  stateful_step_count=30,
  deadline=None,
  derandomize=True,
  suppress_health_check=list(hypothesis.HealthCheck),
)


def chain(pages, ids, ready=True):
  """Pages that a sequence of these ids holds, named."""
  taken = pages.take(pages.needed(len(ids)))
  pages.name(ids, taken, ready)
  return taken


def test_a_prompt_finds_its_beginning():
  pages = pages_lib.Pages(8, 4)
  ids = list(range(11))
  held = chain(pages, ids)
  # Whole pages, never the prompt's last token.
  assert pages.find(ids).pages == tuple(held[:2])
  assert pages.find([*ids, 99, 98]).pages == tuple(held[:2])
  assert pages.find(ids[:8]).pages == tuple(held[:1])
  assert pages.find([9, *ids[1:]]).pages == ()
  # The same tokens after another beginning are another page.
  assert pages.find([9, 9, 9, 9, *ids[4:]]).pages == ()


def test_what_is_being_computed_is_waited_for():
  pages = pages_lib.Pages(8, 4)
  ids = list(range(9))
  held = chain(pages, ids, ready=False)
  assert pages.find(ids) == pages_lib.Found((), True)
  pages.name(ids[:4], held, ready=True)
  assert pages.find(ids) == pages_lib.Found((held[0],), True)
  # Given up before it was done: nobody waits for it any more.
  pages.release(held)
  assert pages.find(ids) == pages_lib.Found((held[0],), False)
  assert pages.available == 8


def test_idle_pages_go_last_and_from_the_end():
  pages = pages_lib.Pages(4, 4)
  ids = list(range(13))
  pages.release(chain(pages, ids))
  assert (pages.available, pages.held) == (4, 0)
  # One was free; the next is the end of the chain, not its beginning.
  taken = pages.take(2)
  assert len(pages.find(ids).pages) == 2
  assert pages.take(3) is None
  assert pages.available == 2
  pages.release(taken)
  assert pages.available == 4
