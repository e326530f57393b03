"""Held-out loss of each domain, on packed rows as training sees them.

B batch, T tokens.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.data import packing
from llama_jax.model import decoder as decoder_lib

Pieces = Sequence[Mapping[str, np.ndarray]]


def cut(
  rows: Sequence[Mapping[str, np.ndarray]],
  count: int,
  length: int,
  separate: bool,
) -> list[dict[str, np.ndarray]]:
  """The first `count` rows as packing.inputs gives them, in equal pieces.

  Args:
    rows: as packing.pack makes them.
    count: how many; fewer where there are fewer.
    length: tokens of a piece; it divides the rows'.
    separate: whether documents are kept from seeing each other.
  """
  return [
    packing.inputs(row, start, length, separate)
    for row in (rows[index] for index in range(min(count, len(rows))))
    for start in range(0, len(row["tokens"]) - length, length)
  ]


@functools.partial(jax.jit, static_argnames="decoder")
def _loss_sum(params, batch, *, decoder):
  nll_BT = decoder.apply(
    {"params": params},
    batch["tokens"],
    batch["positions"],
    batch["segments"],
    batch["targets"],
    method="token_nll",
  )
  return jnp.sum(nll_BT * batch["loss_mask"])


def evaluate(
  decoder: decoder_lib.Decoder,
  params,
  domains: Mapping[str, Pieces],
  batch_size: int,
) -> Iterator[tuple[str, float | int]]:
  """Yields heldout_loss/DOMAIN and heldout_tokens/DOMAIN, then heldout_loss.

  Losses are nats per scored token; the last one is over all tokens. Under
  jax.set_mesh params may be sharded; every process gives the same pieces.

  Args:
    decoder: with scan=True.
    params: stacked.
    domains: of each, pieces of one length: arrays [T], see packing.inputs.
    batch_size: pieces at once, a multiple of the devices that share a batch.
      The last batch is filled up, so that one program serves all.
  """
  total, scored = 0.0, 0
  for name, pieces in domains.items():
    loss, count = 0.0, 0
    for start in range(0, len(pieces), batch_size):
      group = pieces[start : start + batch_size]
      batch = {
        key: _filled(np.stack([piece[key] for piece in group]), batch_size)
        for key in group[0]
      }
      loss += float(_loss_sum(params, batch, decoder=decoder))
      count += int(batch["loss_mask"].sum())
    total, scored = total + loss, scored + count
    yield f"heldout_loss/{name}", loss / count if count else float("nan")
    yield f"heldout_tokens/{name}", count
  if scored:
    yield "heldout_loss", total / scored


def _filled(rows_BT: np.ndarray, batch_size: int) -> np.ndarray:
  """Rows of zeros behind: padding that nothing sees and nothing scores."""
  return np.pad(rows_BT, ((0, batch_size - len(rows_BT)), (0, 0)))
