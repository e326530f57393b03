"""Prefill and an on-device decode loop over a static cache. Ids in, ids out.

Compiled once per (batch, prompt bucket, cache bucket): prompts are padded on
the left to a bucket's length, so that all rows write the same cache slot.

B batch, T prompt bucket, S cache slots, C tokens decoded per call.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import errors
from llama_jax.decoding import sampling
from llama_jax.model import cache as cache_lib
from llama_jax.model import decoder as decoder_lib

PROMPT_BUCKET = 64
CACHE_BUCKET = 256
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
  """

  cache: cache_lib.Cache
  token_B: jax.Array
  position_B: jax.Array
  done_B: jax.Array
  drawn: jax.Array


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


def _is_stop(token_B, stop_ids: tuple[int, ...]):
  stops = jnp.asarray(stop_ids or (-1,), jnp.int32)
  return jnp.any(token_B[:, None] == stops[None], axis=-1)


def _draw(logits_BV, keys_B, drawn, done_B, last_B, settings):
  config, stop_ids = settings
  token_B = sampling.choose(logits_BV, keys_B, drawn, config)
  token_B = jnp.where(done_B, last_B, token_B)
  return token_B, done_B | _is_stop(token_B, stop_ids)


@functools.partial(jax.jit, static_argnames=("decoder", "slots", "settings"))
def prefill(
  params, ids_BT, positions_BT, segments_BT, keys_B, *, decoder, slots, settings
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
  token_B, done_B = _draw(
    logits_B1V[:, 0],
    keys_B,
    0,
    jnp.zeros((B,), bool),
    jnp.zeros((B,), jnp.int32),
    settings,
  )
  return Generation(
    cache=cache,
    token_B=token_B,
    position_B=positions_BT[:, -1] + 1,
    done_B=done_B,
    drawn=jnp.int32(1),
  )


@functools.partial(
  jax.jit,
  static_argnames=("decoder", "count", "settings"),
  donate_argnames=("generation",),
)
def decode(params, generation: Generation, keys_B, *, decoder, count, settings):
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
    token_B, done_B = _draw(
      logits_B1V[:, 0],
      keys_B,
      state.drawn,
      state.done_B,
      state.token_B,
      settings,
    )
    state = Generation(
      cache, token_B, state.position_B + 1, done_B, state.drawn + 1
    )
    return state, token_B

  generation, tokens_CB = jax.lax.scan(one, generation, None, length=count)
  return tokens_CB.T, generation


def check_length(prompt: int, new: int, context: int) -> None:
  """Refuses what the model's context cannot hold."""
  if new < 1:
    raise errors.UserError(f"--max_new_tokens={new} must be 1 or more.")
  if prompt == 0:
    raise errors.UserError(
      "The prompt is empty and the model has no BOS token to begin with;"
      " give a --prompt."
    )
  if prompt + new > context:
    room = context - prompt
    advice = (
      f"use --max_new_tokens={room} or less, or a shorter prompt"
      if room > 0
      else "shorten the prompt"
    )
    raise errors.UserError(
      f"The prompt has {prompt} tokens and --max_new_tokens={new}: together"
      f" more than the model's context of {context}; {advice}."
    )


def stream(
  decoder: decoder_lib.Decoder,
  params,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling_config: sampling.SamplingConfig,
  stop_ids: Sequence[int],
  tokens_per_call: int = TOKENS_PER_CALL,
) -> Iterator[list[list[int]]]:
  """Yields, call by call, each row's new tokens, its stop token the last.

  Args:
    decoder: with scan=False.
    params: unstacked (decoder.unstack).
    prompts: token ids, one list a row, none empty.
    max_new_tokens: at most this many a row.
    sampling_config: how tokens are chosen.
    stop_ids: a row ends with the first of these.
    tokens_per_call: how many are drawn on the device between two looks.
  """
  longest = max(len(prompt) for prompt in prompts)
  shortest = min(len(prompt) for prompt in prompts)
  context = decoder.config.context_length
  # The longest decides, unless there is an empty one to refuse.
  check_length(longest if shortest else 0, max_new_tokens, context)
  length = bucket(longest, PROMPT_BUCKET)
  # The loop may run past the last token wanted, up to the end of its call.
  slots = bucket(length + max_new_tokens + tokens_per_call, CACHE_BUCKET)
  keys_B = sampling.keys(sampling_config, len(prompts))
  # The seed is in the keys: one program serves every seed.
  settings = (dataclasses.replace(sampling_config, seed=0), tuple(stop_ids))
  generation = prefill(
    params,
    *left_pad(prompts, length),
    keys_B,
    decoder=decoder,
    slots=slots,
    settings=settings,
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
    tokens, generation = decode(
      params,
      generation,
      keys_B,
      decoder=decoder,
      count=tokens_per_call,
      settings=settings,
    )
    tokens_BC = np.asarray(tokens)


def generate(decoder, params, prompts, **settings) -> list[list[int]]:
  """All of stream at once: each row's new tokens, its stop token the last."""
  rows: list[list[int]] = [[] for _ in prompts]
  for new in stream(decoder, params, prompts, **settings):
    for row, tokens in zip(rows, new, strict=True):
      row += tokens
  return rows
