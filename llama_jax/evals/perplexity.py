"""Mean loss of a model over documents, each scored apart from the others."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec

from llama_jax import errors
from llama_jax.model import decoder as decoder_lib

ROWS = 4


@dataclasses.dataclass(frozen=True)
class Window:
  """A stretch of one document that the model sees at once.

  Attributes:
    document: which.
    tokens: ids, BOS first where there is one.
    first_scored: index of the first token whose loss counts.
  """

  document: int
  tokens: list[int]
  first_scored: int


def windows(
  documents: Sequence[Sequence[int]],
  window: int,
  stride: int,
  bos_id: int | None,
) -> Iterator[Window]:
  """Cuts documents; every token is scored at most once.

  With bos_id each window begins with it, and it counts towards the window.
  Without, a window's first token has nothing before it and is not scored,
  except that with stride < window an earlier window scored it already.
  """
  room = window - (bos_id is not None)
  if room < 1 + (bos_id is None):
    raise errors.UserError(f"--window={window} must be 2 or more.")
  if not 1 <= stride <= window:
    raise errors.UserError(
      f"--stride={stride} must lie between 1 and --window={window}."
    )
  stride = min(stride, room)
  for index, tokens in enumerate(documents):
    start = scored_to = 0
    while start < len(tokens):
      stop = min(start + room, len(tokens))
      part = list(tokens[start:stop])
      first = max(scored_to - start, 0)
      if bos_id is None:
        first = max(first, 1)
      else:
        part, first = [bos_id, *part], first + 1
      yield Window(index, part, first)
      scored_to = stop
      if stop == len(tokens):
        break
      start += stride


def pack(cut: Sequence[Window], length: int) -> list[list[Window]]:
  """Groups windows into rows of at most `length` tokens, in order."""
  rows: list[list[Window]] = []
  free = 0
  for one in cut:
    if len(one.tokens) > free:
      rows.append([])
      free = length
    rows[-1].append(one)
    free -= len(one.tokens)
  return rows


@functools.partial(jax.jit, static_argnames=("decoder",))
def _token_nll(params, tokens, positions, segments, targets, *, decoder):
  nll_BT = decoder.apply(
    {"params": params},
    tokens,
    positions,
    segments,
    targets,
    method="token_nll",
  )
  if jax.sharding.get_abstract_mesh().empty:
    return nll_BT
  # Whole on every device, so that each process can read it.
  return jax.lax.with_sharding_constraint(nll_BT, PartitionSpec())


def losses(
  decoder: decoder_lib.Decoder,
  params,
  cut: Sequence[Window],
  length: int,
  count: int = ROWS,
) -> Iterator[tuple[Window, np.ndarray]]:
  """Each window with its scored tokens' losses in nats.

  count: rows at once, a multiple of the devices that share a batch.
  """
  rows = pack(cut, length)
  for start in range(0, len(rows), count):
    group = rows[start : start + count]
    tokens, positions, segments, targets = (
      np.zeros((count, length), np.int32) for _ in range(4)
    )
    places = []
    for row, members in enumerate(group):
      at = 0
      for number, one in enumerate(members, start=1):
        size = len(one.tokens)
        span = slice(at, at + size)
        tokens[row, span] = one.tokens
        positions[row, span] = np.arange(size)
        segments[row, span] = number
        targets[row, at : at + size - 1] = one.tokens[1:]
        # The loss of token i stands where token i - 1 was read.
        places.append((one, row, at + one.first_scored - 1, at + size - 1))
        at += size
    nll = np.asarray(
      _token_nll(params, tokens, positions, segments, targets, decoder=decoder)
    )
    for one, row, first, last in places:
      yield one, nll[row, first:last].astype(np.float64)


def evaluate(
  decoder: decoder_lib.Decoder,
  params,
  texts: Sequence[str],
  tokenizer,
  *,
  window: int,
  stride: int,
  bos: bool,
  rows: int = ROWS,
) -> Iterator[tuple[str, object]]:
  """Yields (name, value): the means over all documents, then each document.

  Args:
    decoder: with scan=True.
    params: stacked; sharded under jax.set_mesh.
    texts: the documents.
    tokenizer: theirs.
    window, stride: see windows.
    bos: begin each window with BOS.
    rows: see losses.
  """
  if bos and tokenizer.bos_id is None:
    raise errors.UserError("--bos: this tokenizer has no BOS; use --nobos.")
  if window > decoder.config.context_length:
    raise errors.UserError(
      f"--window={window} is longer than the model's context of"
      f" {decoder.config.context_length}; use that or less."
    )
  ids = tokenizer.encode_batch(list(texts))
  sums = np.zeros(len(ids))
  counts = np.zeros(len(ids), np.int64)
  cut = list(windows(ids, window, stride, tokenizer.bos_id if bos else None))
  for one, nll in losses(decoder, params, cut, window, rows):
    sums[one.document] += nll.sum()
    counts[one.document] += len(nll)
  if not counts.sum():
    raise errors.UserError("--text holds no token that can be scored.")
  sizes = [len(text.encode()) for text in texts]
  tokens = [len(one) for one in ids]
  mean = sums.sum() / counts.sum()
  yield "mean_loss", float(mean)
  yield "perplexity", float(np.exp(mean))
  yield "scored_tokens", int(counts.sum())
  yield "tokens", sum(tokens)
  yield "bytes", sum(sizes)
  yield "bytes_per_token", sum(sizes) / max(sum(tokens), 1)
  yield (
    "documents",
    [
      {
        "mean_loss": float(total / count) if count else None,
        "scored_tokens": int(count),
        "tokens": length,
        "bytes": size,
      }
      for total, count, length, size in zip(
        sums, counts, tokens, sizes, strict=True
      )
    ],
  )
