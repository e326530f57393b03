"""Evidence that a conversion lost nothing.

Two independent proofs: account() shows that the mapping of tensors is a
bijection, byte for byte, and reference_logits() is a second Llama, in NumPy,
on the source's own tensors with the source's own names and RoPE layout. It
shares nothing with the model or with names.TABLE but the configuration, so an
exchanged pair of names or a wrong permutation shows as a number.

Shapes: T tokens, D embed, N heads, K kv heads, G = N // K, H head dim,
V vocab.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import names
from llama_jax.model import config as config_lib

# About a hundred tokens of any Llama tokenizer, prose and code.
TEXT = """\
The lighthouse keeper counted the ships twice each evening, once with his eyes
and once with a pencil, because the two numbers did not always agree. On 14
March he wrote a small program to settle the matter:

def count_ships(lights, fog=0.25):
    seen = [light for light in lights if light.brightness > fog]
    return len(seen)  # a ship without a lamp is not a ship

It returned 7. He looked out of the window again and saw nothing but rain.
"""


@dataclasses.dataclass(frozen=True)
class _Layout:
  """Where a source keeps each weight, and which pairs its RoPE rotates."""

  embed: str
  block: str
  attention_norm: str
  query: str
  key: str
  value: str
  out: str
  mlp_norm: str
  gate: str
  up: str
  down: str
  norm: str
  head: str
  pairs: str


_LAYOUTS = {
  "hf": _Layout(
    embed="model.embed_tokens",
    block="model.layers.",
    attention_norm="input_layernorm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    norm="model.norm",
    head="lm_head",
    pairs="halves",
  ),
  "gguf": _Layout(
    embed="token_embd",
    block="blk.",
    attention_norm="attn_norm",
    query="attn_q",
    key="attn_k",
    value="attn_v",
    out="attn_output",
    mlp_norm="ffn_norm",
    gate="ffn_gate",
    up="ffn_up",
    down="ffn_down",
    norm="output_norm",
    head="output",
    pairs="interleaved",
  ),
}


class Vocabulary(Protocol):
  """The part of a tokenizer that check_vocabulary looks at."""

  vocab_size: int


def inverse_frequencies(config: config_lib.LlamaConfig) -> np.ndarray:
  """RoPE's angle per position for each pair of a head, float64 [H / 2].

  Llama 3.1's scaling as in arXiv:2407.21783 and RECIPES.md 1: by wavelength.
  """
  exponents = np.arange(0, config.head_dim, 2, dtype=np.float64)
  frequencies = config.rope_theta ** (-exponents / config.head_dim)
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies
  wavelengths = 2 * math.pi / frequencies
  smooth = scaling.original_context / wavelengths - scaling.low_freq_factor
  smooth /= scaling.high_freq_factor - scaling.low_freq_factor
  # At and below 0 only the slowed frequency is left, from 1 on only the plain.
  smooth = np.clip(smooth, 0.0, 1.0)
  return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def reference_logits(
  config: config_lib.LlamaConfig,
  tensors: Callable[[str], np.ndarray],
  ids: Sequence[int],
  layout: str,
  *,
  positions: Sequence[int] | None = None,
  dtype: np.typing.DTypeLike = np.float32,
) -> np.ndarray:
  """A plain causal Llama forward on a source's own tensors.

  Args:
    config: the model's configuration.
    tensors: name -> array in the source's names, such as names.Source.get.
    ids: T token ids.
    layout: "hf" or "gguf": names, and RoPE in halves or interleaved pairs.
    positions: T positions for RoPE, rising; 0, 1, ... by default. Spread ones
      reach past a scaled model's original context cheaply.
    dtype: of the arithmetic; norms, softmax and angles are float64.

  Returns:
    logits [T, V] of dtype.
  """
  where = _LAYOUTS[layout]
  ids = np.asarray(ids)
  num_tokens = len(ids)
  positions = np.arange(num_tokens) if positions is None else positions
  angles_TH = np.outer(positions, inverse_frequencies(config))
  cos_TH, sin_TH = np.cos(angles_TH), np.sin(angles_TH)
  causal_TT = np.tril(np.ones((num_tokens, num_tokens), bool))

  def weight(name: str) -> np.ndarray:
    return np.asarray(tensors(name + ".weight"))

  def norm(x_TD: np.ndarray, name: str) -> np.ndarray:
    wide = x_TD.astype(np.float64)
    scale = np.sqrt((wide * wide).mean(axis=1, keepdims=True) + config.norm_eps)
    return (wide / scale * weight(name).astype(np.float64)).astype(dtype)

  def linear(x_TD: np.ndarray, name: str) -> np.ndarray:
    return x_TD @ weight(name).astype(dtype).T

  def rotate(x_TQ: np.ndarray) -> np.ndarray:
    x_TNH = x_TQ.reshape(num_tokens, -1, config.head_dim)
    half = config.head_dim // 2
    if where.pairs == "halves":
      first, second = slice(None, half), slice(half, None)
    else:
      first, second = slice(0, None, 2), slice(1, None, 2)
    a, b = x_TNH[..., first], x_TNH[..., second]
    cos, sin = cos_TH[:, None, :], sin_TH[:, None, :]
    turned = np.empty_like(x_TNH)
    turned[..., first] = a * cos - b * sin
    turned[..., second] = a * sin + b * cos
    return turned

  embedding = weight(where.embed)
  x_TD = embedding[ids].astype(dtype)
  for layer in range(config.num_layers):
    block = f"{where.block}{layer}."
    h_TD = norm(x_TD, block + where.attention_norm)
    q_TNH = rotate(linear(h_TD, block + where.query))
    k_TKH = rotate(linear(h_TD, block + where.key))
    v_TKH = linear(h_TD, block + where.value).reshape(k_TKH.shape)
    heads = []
    for n in range(config.num_heads):
      group = n // config.num_groups
      scores_TT = (q_TNH[:, n] @ k_TKH[:, group].T).astype(np.float64)
      scores_TT /= math.sqrt(config.head_dim)
      scores_TT = np.where(causal_TT, scores_TT, -np.inf)
      scores_TT = np.exp(scores_TT - scores_TT.max(axis=1, keepdims=True))
      probs_TT = scores_TT / scores_TT.sum(axis=1, keepdims=True)
      heads.append(probs_TT.astype(dtype) @ v_TKH[:, group])
    x_TD = x_TD + linear(np.concatenate(heads, axis=1), block + where.out)
    h_TD = norm(x_TD, block + where.mlp_norm)
    gate_TF = linear(h_TD, block + where.gate).astype(np.float64)
    gate_TF = (gate_TF * 0.5 * (1 + np.tanh(gate_TF / 2))).astype(dtype)
    up_TF = linear(h_TD, block + where.up)
    x_TD = x_TD + linear(gate_TF * up_TF, block + where.down)

  x_TD = norm(x_TD, where.norm)
  head = embedding if config.tied_embeddings else weight(where.head)
  # In slices: a float32 copy of a whole bfloat16 head would double its memory.
  step = 16384
  logits = [
    x_TD @ head[start : start + step].astype(dtype).T
    for start in range(0, len(head), step)
  ]
  return np.concatenate(logits, axis=1)


def mean_loss(logits: np.ndarray, ids: Sequence[int]) -> float:
  """Mean negative log-likelihood of ids[1:] under logits[:-1], in nats."""
  logits_TV = np.asarray(logits, np.float64)[:-1]
  top = logits_TV.max(axis=1)
  log_sums = np.log(np.exp(logits_TV - top[:, None]).sum(axis=1)) + top
  targets = np.asarray(ids)[1:]
  return float((log_sums - logits_TV[np.arange(len(targets)), targets]).mean())


def compare(
  logits_a: np.ndarray, logits_b: np.ndarray, ids: Sequence[int]
) -> tuple[float, float, float]:
  """(largest absolute logit difference, mean loss of a, mean loss of b).

  Args:
    logits_a: [T, V].
    logits_b: [T, V].
    ids: the T token ids that both saw.
  """
  difference = np.asarray(logits_a, np.float64) - np.asarray(
    logits_b, np.float64
  )
  worst = float(np.abs(difference).max())
  return worst, mean_loss(logits_a, ids), mean_loss(logits_b, ids)


@dataclasses.dataclass(frozen=True)
class Entry:
  """What became of one tensor of the source.

  Attributes:
    name: in the source.
    path: in our tree, with the layer as [l]; or why there is none.
    shape: in the source.
    stored: the source's word for how it is kept.
    dtype: of our leaf.
    source_hash: first hexadecimal digits of the SHA-256 of the source's
      values.
    back_hash: the same of our leaf brought back to the source's name, layout
      and dtype; None for a tensor that has no place in our tree.
  """

  name: str
  path: str
  shape: tuple[int, ...]
  stored: str
  dtype: str
  source_hash: str
  back_hash: str | None

  @property
  def same(self) -> bool:
    """Nothing was lost; a tensor that is left out by rule loses nothing."""
    return self.back_hash in (None, self.source_hash)


def account(
  config: config_lib.LlamaConfig,
  source: names.Source,
  params: Mapping[str, Any],
) -> list[Entry]:
  """Every tensor of the source, followed into our tree and back.

  Reads one tensor at a time. Quantised tensors are hashed as their
  dequantised float32 values.

  Raises:
    BadFileError: source and configuration, or params and configuration, do
      not hold the same set of tensors.
  """
  names.check(config, source)
  names.check_tied(config, source)
  entries = []
  back = names.write_tensors(config, source.scheme, params)
  leaves = names.flatten(params)
  places = names.places(config, source.scheme)
  for place, (name, value) in zip(places, back, strict=True):
    original = np.ascontiguousarray(source.get(name))
    layer = "" if place.layer is None else f"[{place.layer}]"
    tensor = source.tensors[name]
    entries.append(
      Entry(
        name=name,
        path=place.row.path + layer,
        shape=tensor.shape,
        stored=tensor.stored,
        dtype=str(leaves[place.row.path].dtype),
        source_hash=_hash(original),
        back_hash=_hash(value.astype(original.dtype)),
      )
    )
  for name, why in names.ignored(source, config).items():
    tensor = source.tensors[name]
    entries.append(
      Entry(
        name=name,
        path=f"({why})",
        shape=tensor.shape,
        stored=tensor.stored,
        dtype=str(tensor.dtype),
        source_hash=_hash(np.ascontiguousarray(source.get(name))),
        back_hash=None,
      )
    )
  return entries


def table(entries: Sequence[Entry]) -> str:
  """The account as aligned text, one tensor a line."""
  lines = [("tensor", "ours", "shape", "stored", "dtype", "sha256", "back")]
  for entry in entries:
    verdict = "same" if entry.same else f"DIFFERS {entry.back_hash}"
    lines.append(
      (
        entry.name,
        entry.path,
        "x".join(map(str, entry.shape)),
        entry.stored,
        entry.dtype,
        entry.source_hash,
        "left out" if entry.back_hash is None else verdict,
      )
    )
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) for cell, width in zip(line, widths, strict=True)
    ).rstrip()
    for line in lines
  )


def check_vocabulary(
  config: config_lib.LlamaConfig, tokenizer: Vocabulary, file: str
) -> None:
  """Raises BadFileError if the tokenizer has ids that the embedding lacks.

  An embedding larger than the vocabulary is legal: many are padded.
  """
  if tokenizer.vocab_size > config.vocab_size:
    raise errors.BadFileError(
      f"{file}: the tokenizer has {tokenizer.vocab_size} ids but the embedding"
      f" has model.vocab_size={config.vocab_size} rows; use the tokenizer that"
      " belongs to these weights."
    )


def _hash(array: np.ndarray) -> str:
  """Sixteen hexadecimal digits of the SHA-256 of an array's bytes."""
  raw = array.reshape(-1).view(np.uint8)
  return hashlib.sha256(raw).hexdigest()[:16]
