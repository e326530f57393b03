"""Continuous batching: requests of any length join and leave a running batch.

The engine holds the params and a pool of pages for keys and values that is
allocated once. `submit` takes a request, each `step` reads some prompts and
draws some tokens of all that run, `run` does whole lists. What is decided on
the host stands in scheduler.py, what runs on the device in programs.py.

Not for several threads at once.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llama_jax import errors, kernels
from llama_jax.decoding import (
  arrays,
  copies,
  placement,
  programs,
  sampling,
  speculation,
)
from llama_jax.decoding import pages as pages_lib
from llama_jax.decoding import request as request_lib
from llama_jax.decoding import scheduler as scheduler_lib
from llama_jax.kernels import paged
from llama_jax.model import decoder as decoder_lib


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """How much the engine does at once.

  Attributes:
    cache_tokens: tokens whose keys and values there is room for; rounded up to
      whole pages. Where no kernel reads pages in place, as much again for a
      copy of the rows that run, each as long as the longest.
    page_size: tokens of a page.
    max_batch: sequences that run at once.
    chunk: tokens that are read in a step, beside those that are drawn.
    tokens_per_call: tokens that a row draws between two looks of the host.
    cache_dtype: of keys and values; empty for the compute dtype.
    attention: a key of kernels.paged.KERNELS, or "auto".
    guesses: tokens that are guessed and then checked in one forward
      (speculation.py), 0 for none: by the engine's draft, or where it has none
      by what followed the same tokens before.
  """

  cache_tokens: int = 16384
  page_size: int = 64
  max_batch: int = 32
  chunk: int = 512
  tokens_per_call: int = 8
  cache_dtype: str = ""
  attention: str = paged.AUTO
  guesses: int = 0

  def __post_init__(self):
    for name, least in (
      ("cache_tokens", 1),
      ("page_size", 1),
      ("max_batch", 1),
      ("chunk", 1),
      ("tokens_per_call", 1),
      ("guesses", 0),
    ):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise errors.UserError(
          f"{name}={value!r} must be a whole number, {least} or more."
        )
    if self.cache_dtype not in ("", "float32", "bfloat16", "float16"):
      raise errors.UserError(
        f"cache_dtype={self.cache_dtype!r} is not known; use float32,"
        " bfloat16 or float16, or leave it empty for the compute dtype."
      )


def cache_bytes(config: EngineConfig, model, dtype: str) -> int:
  """The most bytes that keys and values take, page 0 and copies with them.

  model: a model.config.LlamaConfig; dtype: the compute dtype.
  """
  slots = (_page_count(config) + 1) * config.page_size
  if config.attention in (paged.AUTO, "gather"):
    slots += _page_count(config) * config.page_size
  numbers = 2 * model.num_layers * model.num_kv_heads * model.head_dim
  itemsize = jax.numpy.dtype(config.cache_dtype or dtype).itemsize
  return slots * numbers * itemsize


def _page_count(config: EngineConfig) -> int:
  return -(-config.cache_tokens // config.page_size)


class Engine:
  """Decodes many requests in one batch.

  Args:
    decoder: with scan=False.
    params: unstacked (unrolled.unstack).
    config: how much at once.
    mesh: that the params lie on (placement.place), or None for one device.
    draft: decoder and params of a smaller model of the same vocabulary.
  """

  def __init__(
    self,
    decoder: decoder_lib.Decoder,
    params: Any,
    config: EngineConfig,
    mesh: jax.sharding.Mesh | None = None,
    draft: tuple[decoder_lib.Decoder, Any] | None = None,
  ):
    self._decoder, self._config, self._mesh = decoder, config, mesh
    # The model, and the draft if there is one.
    self._decoders, self._params = zip(
      *((decoder, params), *([draft] if draft else [])), strict=True
    )
    for one in self._decoders:
      if one.config.vocab_size != decoder.config.vocab_size:
        raise errors.UserError(
          f"The draft has {one.config.vocab_size} words and the model"
          f" {decoder.config.vocab_size}; take one with the same tokenizer."
        )
    if draft and not config.guesses:
      raise errors.UserError("A draft needs guesses=1 or more.")
    self._words = decoder.config.vocab_size
    # Whole rounds of guesses, each with the draw after the last.
    together = config.guesses + 1
    count = -(-config.tokens_per_call // together) * together
    # First what may be too large for the memory.
    self._pools = tuple(self._make_pools(one) for one in self._decoders)
    self._pages = pages_lib.Pages(_page_count(config), config.page_size)
    self._copies = copies.Copies(
      self._pages, [pools[0].kernel == "gather" for pools in self._pools], count
    )
    self._scheduler = scheduler_lib.Scheduler(
      self._pages,
      max_batch=config.max_batch,
      chunk=config.chunk,
      tokens_per_call=count,
      fits=self._copies.fits,
    )
    # Rows that drew last, their knobs, what these ask of a program.
    self._drawing: tuple[list, Any, Any] = ([], None, None)
    # What waits for the calls of a step and hands their tokens out.
    self._under_way: list[Callable[[], list[request_lib.Progress]]] = []
    # Sequences that have not ended, by request.
    self._live: dict[int, list[scheduler_lib.Sequence]] = {}
    self._submitted = self._sequences = 0
    self._cancelled: list[request_lib.Progress] = []

  def _make_pools(self, decoder) -> programs.Pools:
    model, config = decoder.config, self._config
    dtype = config.cache_dtype or decoder.dtype
    heads, head_dim = model.num_kv_heads, model.head_dim
    kernel = paged.resolve(
      placement.kernel(config.attention, self._mesh),
      kernels.platform(),
      dtype=dtype,
      num_heads=model.num_heads,
      num_kv_heads=heads,
      head_dim=head_dim,
      page_size=config.page_size,
    )
    count, size = _page_count(config) + 1, config.page_size
    make = jax.jit(
      lambda: tuple(
        paged.empty(kernel, count, size, heads, head_dim, dtype)
        for _ in range(model.num_layers)
      ),
      out_shardings=placement.pool_sharding(kernel, self._mesh),
    )
    return make()

  @property
  def busy(self) -> bool:
    """Whether any request has not ended."""
    return bool(self._live or self._cancelled)

  @property
  def pages(self) -> pages_lib.Pages:
    return self._pages

  @property
  def counts(self) -> scheduler_lib.Counts:
    return self._scheduler.counts

  def check(self, request: request_lib.Request) -> None:
    """Raises UserError for a request that can never be answered."""
    model = self._decoder.config
    prompt, new = len(request.prompt), request.max_new_tokens
    request_lib.check_length(prompt, new, model.context_length)
    # Of the last token nothing is kept.
    needed = self._pages.needed(prompt + new - 1)
    if needed > self._pages.count:
      raise errors.UserError(
        f"A prompt of {prompt} tokens and {new} new ones need {needed} pages of"
        f" {self._config.page_size} tokens and there are {self._pages.count};"
        f" give cache_tokens={prompt + new} or more, or ask for less."
      )
    for name in ("logprobs", "prompt_logprobs"):
      top = getattr(request, name)
      if top is not None and top > model.vocab_size:
        raise errors.UserError(
          f"--{name}={top} must be {model.vocab_size} at most, the model's"
          " words."
        )
    highest = max(
      [*request.prompt, *(i for i, _ in request.sampling.logit_bias)]
    )
    if min(request.prompt) < 0 or highest >= model.vocab_size:
      raise errors.UserError(
        "A prompt or --logit_bias has a token id out of range; the model's"
        f" {model.vocab_size} words are 0 to {model.vocab_size - 1}."
      )

  def submit(self, request: request_lib.Request) -> int:
    """Queues a request; returns its number, by arrival from 0.

    Raises UserError for one that can never be answered.
    """
    self.check(request)
    number = self._submitted
    self._submitted += 1
    self._live[number] = []
    for sample in range(request.samples):
      constraint = request.constraint
      sequence = scheduler_lib.Sequence(
        number=self._sequences,
        request_number=number,
        request=request,
        sample=sample,
        tokens=list(request.prompt),
        completion=request_lib.Completion(),
        constraint=None if constraint is None else constraint.copy(),
      )
      self._sequences += 1
      self._live[number].append(sequence)
      self._scheduler.add(sequence)
    return number

  def cancel(self, number: int, sample: int | None = None) -> None:
    """Ends a request, or one answer of it; its pages are back at once.

    The next step tells of it. One that has ended already stays as it is.
    """
    for sequence in list(self._live.get(number, ())):
      if sample in (None, sequence.sample):
        self._cancelled.append(self._end(sequence, request_lib.CANCELLED))

  def step(self) -> list[request_lib.Progress]:
    """One call that reads and one that draws, as there is work."""
    self.start()
    return self.finish()

  def start(self) -> None:
    """Sends a step to the device, unless one is under way.

    Until `finish` the host has its hands free, for what the step before gave:
    the device does not wait.
    """
    if self._under_way:
      return
    plan = self._scheduler.plan()
    with placement.on(self._mesh):
      # Both are sent before either is waited for.
      if plan.prefill:
        self._under_way.append(self._read(plan.prefill))
      if plan.decode:
        self._under_way.append(self._draw(plan.decode, plan.count))

  def finish(self) -> list[request_lib.Progress]:
    """Waits for the step under way: what it, and cancelling, brought."""
    progress, self._cancelled = self._cancelled, []
    under_way, self._under_way = self._under_way, []
    for take in under_way:
      progress += take()
    return progress

  def run(
    self, requests: Sequence[request_lib.Request]
  ) -> list[list[request_lib.Completion]]:
    """All answers to all requests, in their order."""
    for request in requests:
      self.check(request)
    found = {
      self.submit(request): [None] * request.samples for request in requests
    }
    for progress in self._steps():
      if progress.request in found:
        found[progress.request][progress.sample] = progress.completion
    return list(found.values())

  def _steps(self) -> Iterator[request_lib.Progress]:
    while self.busy:
      yield from self.step()

  def _most(self, asked) -> int | None:
    """How many of the likeliest a program tells, so that all get theirs."""
    asked = [one for one in asked if one is not None]
    if not asked:
      return None
    most = arrays.round_up(max(asked)) if max(asked) else 0
    return min(most, self._words)

  def _read(self, planned):
    """Sends what is to be read: a function that waits and hands tokens out."""
    packed, drawing = arrays.pack(planned, self._config.page_size)
    rows = arrays.filled(drawing, len(packed.last_R))
    knobs, features = arrays.knobs(rows)
    seen = arrays.seen(rows, features, self._words)
    allowed = arrays.allowed(rows, self._words)
    top = self._most(one.request.logprobs for one in drawing)
    scored = self._most(one.request.prompt_logprobs for one, _ in planned)
    found = [
      programs.read(
        self._params[which],
        self._pools[which],
        packed,
        knobs,
        seen,
        allowed,
        decoder=decoder,
        features=features,
        # What a draft would say is not asked for.
        top=None if which else top,
        scored=None if which else scored,
      )
      for which, decoder in enumerate(self._decoders)
    ]
    self._pools = tuple(pools for *_, pools in found)
    return functools.partial(self._take_read, planned, rows, *found[0][:3])

  def _take_read(self, planned, rows, token_R, told, scores):
    scores = jax.device_get(scores)
    at = 0
    for sequence, count in planned:
      begin, at = at, at + count
      if sequence.completion.finish_reason:
        continue  # Cancelled meanwhile.
      if sequence.request.prompt_logprobs is not None:
        # Of what is read last the next token is not the prompt's.
        known = min(count, len(sequence.request.prompt) - 1 - sequence.cached)
        there = sequence.completion.prompt_logprobs
        # Some are there already where it was preempted.
        there += [
          _logprob(scores, (begin + i,), sequence.request.prompt_logprobs)
          for i in range(max(len(there) - sequence.cached, 0), known)
        ]
      self._scheduler.read(sequence, count)
    token_R1 = np.asarray(token_R)[:, None]
    return self._take(rows, token_R1, _column(told), token_R1 >= 0)

  def _draw(self, sequences, count: int):
    """Sends what is to be drawn: a function that waits and hands tokens out."""
    # Where a constraint looks at each token there is one a call.
    speculates = self._config.guesses > 0 and count > 1
    self._copies.take(sequences, count, self._pools)
    rows, caches = self._copies.rows, self._copies.caches
    if rows != self._drawing[0]:
      knobs, features = arrays.knobs(rows)
      # They stay on the device as long as the rows do.
      self._drawing = (rows, jax.device_put(knobs), features)
    _, knobs, features = self._drawing
    seen = arrays.seen(rows, features, self._words)
    top = self._most(one.request.logprobs for one in sequences)
    asked = arrays.drawing(
      rows,
      count,
      self._config.page_size,
      with_table=speculates or None in caches,
    )
    if speculates:
      C = self._config.guesses + 1
      *found, self._pools, caches = speculation.draw(
        self._params,
        self._pools,
        caches,
        asked,
        arrays.history(rows, count),
        knobs,
        seen,
        decoders=self._decoders,
        guesses=C - 1,
        rounds=count // C,
        features=features,
        top=top,
      )
      take = functools.partial(self._take_speculated, rows, *found)
    else:
      tokens_BC, told, pools, cache = programs.draw(
        self._params[0],
        self._pools[0],
        caches[0],
        asked,
        knobs,
        seen,
        arrays.allowed(rows, self._words),
        decoder=self._decoder,
        features=features,
        top=top,
      )
      self._pools = (pools, *self._pools[1:])
      caches = (cache, *caches[1:])
      take = functools.partial(self._take_drawn, rows, tokens_BC, told)
    # Where nothing is guessed, a draft has not read what was drawn.
    all_read = speculates or len(caches) == 1
    self._copies.drawn(caches, count, all_read)
    return take

  def _take_drawn(self, rows, tokens_BC, told):
    tokens_BC = np.asarray(tokens_BC)
    return self._take(rows, tokens_BC, jax.device_get(told), tokens_BC >= 0)

  def _take_speculated(self, rows, tokens_BRC, counts_BR, told):
    """Of each round only the tokens that count."""
    tokens_BRC, counts_BR, told = jax.device_get((tokens_BRC, counts_BR, told))
    B, R, C = tokens_BRC.shape
    valid_BRC = np.arange(C) < counts_BR[:, :, None]
    tokens_BC, valid_BC, told = jax.tree.map(
      lambda a: a.reshape(B, R * C, *a.shape[3:]),
      (tokens_BRC, valid_BRC, told),
    )
    return self._take(rows, tokens_BC, told, valid_BC)

  def _take(self, sequences, tokens_BC, told, valid_BC):
    """Gives each sequence its new tokens, up to what ends it."""
    progress = []
    for row, sequence in enumerate(sequences):
      if sequence is arrays.IDLE or sequence.completion.finish_reason:
        continue
      request, completion = sequence.request, sequence.completion
      new: list[int] = []
      for place in np.flatnonzero(valid_BC[row])[: sequence.left].tolist():
        if completion.error:
          break
        token = int(tokens_BC[row, place])
        new.append(token)
        if request.logprobs is not None:
          completion.logprobs.append(
            _logprob(told, (row, place), request.logprobs)
          )
        if token in request.stop_ids:
          completion.finish_reason = request_lib.STOP
          break
      completion.tokens += new
      if sequence.constraint is not None and not completion.finish_reason:
        self._constrain(sequence, new)
      if new:
        # The token before each is in a page now; after reading it was already.
        read = len(new) - 1 + sequence.unread
        sequence.tokens += new
        self._scheduler.read(sequence, read)
        if not sequence.left and not completion.finish_reason:
          completion.finish_reason = request_lib.LENGTH
      if completion.finish_reason:
        progress.append(self._end(sequence, completion.finish_reason, new))
      else:
        progress.append(_progress(sequence, new))
    return progress

  def _constrain(self, sequence, new):
    """Goes on with a constraint by what was drawn; may end the sequence."""
    completion = sequence.completion
    if not completion.error:
      try:
        sequence.constraint.accept(new)
      except errors.UserError as error:
        completion.error = str(error)
    if completion.error:
      completion.finish_reason = request_lib.ERROR
    elif sequence.constraint.done:
      completion.finish_reason = request_lib.STOP

  def _end(self, sequence, reason, new=()):
    sequence.completion.finish_reason = reason
    self._scheduler.remove(sequence)
    live = self._live[sequence.request_number]
    live.remove(sequence)
    if not live:
      del self._live[sequence.request_number]
    return _progress(sequence, new)


def _progress(sequence, new):
  return request_lib.Progress(
    sequence.request_number, sequence.sample, tuple(new), sequence.completion
  )


def _logprob(told: sampling.Logprobs, place, top: int) -> request_lib.Logprob:
  ids, values = told.top_ids_BE[place][:top], told.top_BE[place][:top]
  return request_lib.Logprob(
    float(told.chosen_B[place]),
    tuple(zip(ids.tolist(), values.tolist(), strict=True)),
  )


def _column(told):
  """[R, ...] -> [R, 1, ...] on the host."""
  return jax.tree.map(lambda a: np.asarray(a)[:, None], told)
