"""Prefill and an on-device decode loop over a static cache. Ids in, ids out.

Compiled once per (batch, prompt bucket, cache bucket): prompts are padded on
the left to a bucket's length, so that all rows write the same cache slot.

B batch, T prompt bucket, S cache slots, C tokens decoded per call.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.decoding import compiling, placement, request, sampling
from llama_jax.model import cache as cache_lib
from llama_jax.model import decoder as decoder_lib

PROMPT_BUCKET = 64
CACHE_BUCKET = 128
TOKENS_PER_CALL = 8


@flax.struct.dataclass
class Generation:
  """Where each row of a batch stands.

  Attributes:
    cache: keys and values of all tokens but the last one.
    token_B: the last token drawn, not yet in the cache.
    position_B: its position.
    done_B: true once a stop token was drawn; such a row repeats it.
    drawn: tokens drawn so far.
    seen: what the rows have said, where penalties ask for it.
  """

  cache: cache_lib.Cache
  token_B: jax.Array
  position_B: jax.Array
  done_B: jax.Array
  drawn: jax.Array
  seen: sampling.Seen | None


def bucket(length: int, size: int) -> int:
  """The least multiple of size that holds length."""
  return -(-length // size) * size


def left_pad(prompts: Sequence[Sequence[int]], length: int):
  """ids, positions and segments, int32 [B, length], prompts at the right."""
  ids_BT = np.zeros((len(prompts), length), np.int32)
  positions_BT, segments_BT = np.zeros_like(ids_BT), np.zeros_like(ids_BT)
  for row, prompt in enumerate(prompts):
    first = length - len(prompt)
    ids_BT[row, first:] = prompt
    positions_BT[row, first:] = np.arange(len(prompt))
    segments_BT[row, first:] = 1
  return ids_BT, positions_BT, segments_BT


def _draw(logits_BV, knobs, features, seen, drawn, done_B, last_B):
  """The next token of rows that are not done, and what that changes."""
  drawn_B = jnp.full(done_B.shape, drawn)
  token_B = sampling.choose(logits_BV, knobs, drawn_B, features, seen_=seen)
  token_B = jnp.where(done_B, last_B, token_B)
  if seen is not None:
    seen = seen.add(token_B)
  return token_B, done_B | sampling.is_stop(token_B, knobs), seen


@compiling.jit(static_argnames=("decoder", "slots", "features"))
def prefill(
  params,
  ids_BT,
  positions_BT,
  segments_BT,
  knobs,
  seen,
  *,
  decoder,
  slots,
  features,
):
  """Reads the prompts and draws each row's first token."""
  B = ids_BT.shape[0]
  cache = cache_lib.empty(decoder.config, B, slots, jnp.dtype(decoder.dtype))
  x_BTD, cache = decoder.apply(
    {"params": params},
    ids_BT,
    positions_BT,
    segments_BT,
    cache,
    method="hidden",
  )
  logits_B1V = decoder.apply({"params": params}, x_BTD[:, -1:], method="logits")
  token_B, done_B, seen = _draw(
    logits_B1V[:, 0],
    knobs,
    features,
    seen,
    0,
    jnp.zeros((B,), bool),
    jnp.zeros((B,), jnp.int32),
  )
  return Generation(
    cache=cache,
    token_B=token_B,
    position_B=positions_BT[:, -1] + 1,
    done_B=done_B,
    drawn=jnp.int32(1),
    seen=seen,
  )


@compiling.jit(
  static_argnames=("decoder", "count", "features"),
  donate_argnames=("generation",),
)
def decode(params, generation: Generation, knobs, *, decoder, count, features):
  """Draws `count` more tokens a row: (tokens int32 [B, count], generation).

  Rows that are done repeat their stop token.
  """
  B = generation.token_B.shape[0]
  ones_B1 = jnp.ones((B, 1), jnp.int32)

  def one(state: Generation, _):
    logits_B1V, cache = decoder.apply(
      {"params": params},
      state.token_B[:, None],
      state.position_B[:, None],
      ones_B1,
      state.cache,
    )
    token_B, done_B, seen = _draw(
      logits_B1V[:, 0],
      knobs,
      features,
      state.seen,
      state.drawn,
      state.done_B,
      state.token_B,
    )
    state = Generation(
      cache, token_B, state.position_B + 1, done_B, state.drawn + 1, seen
    )
    return state, token_B

  generation, tokens_CB = jax.lax.scan(one, generation, None, length=count)
  return tokens_CB.T, generation


def stream(
  decoder: decoder_lib.Decoder,
  params,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling_config: sampling.SamplingConfig,
  stop_ids: Sequence[int],
  tokens_per_call: int = TOKENS_PER_CALL,
  mesh: jax.sharding.Mesh | None = None,
) -> Iterator[list[list[int]]]:
  """Yields, call by call, each row's new tokens, its stop token the last.

  Args:
    decoder: with scan=False.
    params: unstacked (unrolled.unstack).
    prompts: token ids, one list a row, none empty.
    max_new_tokens: at most this many a row.
    sampling_config: how tokens are chosen.
    stop_ids: a row ends with the first of these.
    tokens_per_call: how many are drawn on the device between two looks.
    mesh: that params lie on, or None for one device.
  """
  longest = max(len(prompt) for prompt in prompts)
  shortest = min(len(prompt) for prompt in prompts)
  context = decoder.config.context_length
  # The longest decides, unless there is an empty one to refuse.
  request.check_length(longest if shortest else 0, max_new_tokens, context)
  length = bucket(longest, PROMPT_BUCKET)
  # The loop may run past the last token wanted, up to the end of its call.
  slots = bucket(length + max_new_tokens + tokens_per_call, CACHE_BUCKET)
  # Row i has the next seed but i; knobs are arrays: one program serves all.
  knobs, features = sampling.knobs(
    [
      dataclasses.replace(sampling_config, seed=sampling_config.seed + row)
      for row in range(len(prompts))
    ],
    stop_ids=[tuple(stop_ids)] * len(prompts),
  )
  seen = None
  if features.penalties:
    empty = [()] * len(prompts)
    seen = sampling.seen(prompts, empty, decoder.config.vocab_size)
  # Set for each call alone: whoever reads the stream must not find it set.
  with placement.on(mesh):
    generation = prefill(
      params,
      *left_pad(prompts, length),
      knobs,
      seen,
      decoder=decoder,
      slots=slots,
      features=features,
    )
  ended = [False] * len(prompts)
  stops = set(stop_ids)
  tokens_BC = np.asarray(generation.token_B)[:, None]
  left = max_new_tokens
  while True:
    rows: list[list[int]] = []
    for row, tokens in enumerate(tokens_BC[:, :left].tolist()):
      new: list[int] = []
      for token in tokens:
        if ended[row]:
          break
        new.append(token)
        ended[row] = token in stops
      rows.append(new)
    yield rows
    left -= tokens_BC.shape[1]
    if left <= 0 or all(ended):
      return
    with placement.on(mesh):
      tokens, generation = decode(
        params,
        generation,
        knobs,
        decoder=decoder,
        count=tokens_per_call,
        features=features,
      )
    tokens_BC = np.asarray(tokens)


def generate(decoder, params, prompts, **settings) -> list[list[int]]:
  """All of stream at once: each row's new tokens, its stop token the last."""
  rows: list[list[int]] = [[] for _ in prompts]
  for new in stream(decoder, params, prompts, **settings):
    for row, tokens in zip(rows, new, strict=True):
      row += tokens
  return rows
