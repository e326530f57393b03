"""Whether what was written is the model that was read.

Settings, words and a forward; account.py compares the tensors themselves.

R rows of positions, T tokens, D embed, V vocab.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import account, names, proof, weights
from llama_jax.model import config as config_lib
from llama_jax.model import streamed

# Two float32 forwards that sum in another order differ by about 1e-4 on logits
# of size 40; a wrong RoPE layout differs by tens, and its loss by 2 nats.
MAX_LOGIT_DIFFERENCE = 1e-2
MAX_LOSS_DIFFERENCE = 1e-3
# Of rewards, by the largest: two forwards differ by 1e-6 to 3e-6 of it, a wrong
# RoPE layout by twice its size.
MAX_REWARD_DIFFERENCE = 1e-3

_MOST_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Side:
  """One end of a conversion; reference is what messages call it."""

  reference: str
  config: config_lib.LlamaConfig
  source: weights.Source
  tokenizer: Any


def check_settings(read: Side, written: Side) -> None:
  """Raises BadFileError unless configuration and tokenizer have travelled."""
  for field in dataclasses.fields(read.config):
    ours = getattr(read.config, field.name)
    theirs = getattr(written.config, field.name)
    if ours != theirs:
      raise _refused(
        written, f"model.{field.name}={ours} reads back as {theirs}"
      )
  one, other = read.tokenizer, written.tokenizer
  if one is None and other is None:
    return
  if one is None or other is None:
    raise _refused(written, "the tokenizer did not travel")
  for what in ("stop_ids", "chat_template", "add_bos", "bos_id"):
    ours, theirs = getattr(one, what), getattr(other, what)
    if ours != theirs:
      raise _refused(
        written, f"the tokenizer's {what} {ours!r} reads back as {theirs!r}"
      )
  if one.encode(proof.TEXT) != other.encode(proof.TEXT):
    raise _refused(written, "the tokenizer that was written gives other ids")


def _refused(side: Side, why: str) -> errors.BadFileError:
  return errors.BadFileError(f"{side.reference}: {why}; it was not written.")


def forward(
  read: Side,
  written: Side,
  *,
  rounded: bool,
  block_bytes: int,
  max_bytes: int,
) -> list[str]:
  """A forward in the source's own layout against ours on what was written.

  Where RoPE is scaled, also at positions spread over the whole context.

  Args:
    read: what was read.
    written: what was made of it.
    rounded: the values differ by a dtype. Then ours must equal the source
      rounded alike, and the difference to the source itself is shown.
    block_bytes: of weights to read at once.
    max_bytes: of weights in memory; our side needs a whole layer.

  Returns:
    the outcome in lines.

  Raises:
    BadFileError: they disagree.
  """
  config = read.config
  halves = weights.as_scheme(config, read.source, "hf")
  layer_bytes = sum(
    4 * math.prod(halves.tensors[place.name].shape)
    for place in names.places(config, "hf")
    if place.layer == 0
  )
  if 2 * layer_bytes > max_bytes:
    more = (2 * layer_bytes - max_bytes) / 1e9
    return [
      "forward  not done: a layer of this model needs"
      f" {more:.1f} more --max_host_gb; every tensor was compared"
    ]
  ids = built_in_ids(config, read.tokenizer)
  positions = [np.arange(len(ids))]
  if config.rope_scaling is not None:
    last = config.context_length - 1
    positions.append(np.linspace(0, last, len(ids)).astype(np.int64))
  ours = our_logits(
    config, written.source, ids, np.stack(positions), block_bytes
  )
  against = [("", read.source, True)]
  if rounded:
    kept = account.as_kept(config, read.source, written.source)
    against = [
      (" of the rounded weights", kept, True),
      (" of the source", read.source, False),
    ]
  lines = []
  for whose, source, exact in against:
    theirs = proof.reference_logits(config, source, ids, positions=positions)
    for row, where in enumerate(positions):
      outcome, alike = _compare(config, theirs[row], ours[row], ids)
      lines.append(
        f"forward  {len(ids)} tokens, positions to {where[-1]:,}: against a"
        f" second Llama{whose} {outcome}"
      )
      if exact and not alike:
        raise _refused(
          written,
          "our model does not compute what was read"
          f" ({lines[-1].removeprefix('forward  ')})",
        )
  return lines


def _compare(
  config: config_lib.LlamaConfig,
  theirs_TV: np.ndarray,
  ours_TV: np.ndarray,
  ids: Sequence[int],
) -> tuple[str, bool]:
  """How far two forwards are apart, in words, and whether that is little."""
  largest = float(np.abs(theirs_TV).max())
  if config.head == "scalar":
    worst = float(np.abs(theirs_TV - ours_TV).max())
    outcome = (
      f"largest reward difference {worst:.2e} (rewards up to {largest:.3g})"
    )
    return outcome, worst <= MAX_REWARD_DIFFERENCE * largest
  worst, their_loss, our_loss = proof.compare(theirs_TV, ours_TV, ids)
  apart = abs(their_loss - our_loss)
  outcome = (
    f"largest logit difference {worst:.2e} (logits up to {largest:.1f}), mean"
    f" loss {their_loss:.6f} there and {our_loss:.6f} here, difference"
    f" {apart:.1e} nats"
  )
  alike = worst <= MAX_LOGIT_DIFFERENCE * max(1.0, largest / 40)
  return outcome, alike and apart <= MAX_LOSS_DIFFERENCE


def built_in_ids(config: config_lib.LlamaConfig, tokenizer) -> list[int]:
  """proof.TEXT as ids that the model has; its bytes without a tokenizer."""
  if tokenizer is not None:
    ids = tokenizer.encode(proof.TEXT)
  else:
    ids = [byte % config.vocab_size for byte in proof.TEXT.encode()]
  return ids[: min(config.context_length, _MOST_TOKENS)]


def our_logits(
  config: config_lib.LlamaConfig,
  source: weights.Source,
  ids: Sequence[int],
  positions_RT: np.ndarray,
  block_bytes: int,
) -> np.ndarray:
  """Our own model on a source, a layer at a time: float32 [R, T, V], V = 1 of
  a reward model."""
  halves = weights.as_scheme(config, source, "hf")
  embed, last, norm = (
    names.name_of(path, "hf")
    for path in (
      names.EMBED_PATH,
      names.output_path(config),
      names.FINAL_NORM_PATH,
    )
  )
  table = {i: halves.rows(embed, i, i + 1)[0] for i in sorted(set(ids))}
  embedded_TD = np.stack([table[i] for i in ids]).astype(np.float32)
  places = list(names.places(config, "hf"))

  def layer(index: int) -> dict[str, Any]:
    leaves = {}
    for place in places:
      if place.layer == index:
        value = halves.get(place.name)
        path = place.row.path.removeprefix("layers/")
        if place.row.reshape != names.AS_IS:
          value = weights.transpose(value)
        leaves[path] = value
    return names.nest(leaves)

  def blocks() -> Iterator[np.ndarray]:
    for span in halves.spans([last], block_bytes):
      yield halves.rows(*span)

  return streamed.logits(
    config,
    np.stack([embedded_TD] * len(positions_RT)),
    positions_RT,
    layer,
    halves.get(norm),
    blocks(),
  )
