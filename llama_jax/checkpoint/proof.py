"""Evidence that a conversion lost nothing.

Two independent proofs. account.py shows that the mapping of tensors is a
bijection, byte for byte. reference_logits() here is a second Llama, in NumPy,
on the source's own tensors with the source's own names and RoPE layout. It
shares nothing with the model or with names.TABLE but the configuration, so an
exchanged pair of names or a wrong permutation shows as a number.

Shapes: R rows of positions, T tokens, t = R * T, D embed, N heads, K kv heads,
H head dim, V vocab.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import weights
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
  "meta": _Layout(
    embed="tok_embeddings",
    block="layers.",
    attention_norm="attention_norm",
    query="attention.wq",
    key="attention.wk",
    value="attention.wv",
    out="attention.wo",
    mlp_norm="ffn_norm",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
    norm="norm",
    head="output",
    pairs="interleaved",
  ),
}
# Of weights that are widened at once.
_BLOCK_BYTES = 32 << 20


class Vocabulary(Protocol):
  """The part of a tokenizer that check_vocabulary looks at."""

  vocab_size: int


def inverse_frequencies(config: config_lib.LlamaConfig) -> np.ndarray:
  """RoPE's angle per position for each pair of a head, float64 [H / 2].

  Linear scaling stretches the positions of arXiv:2306.15595; Llama 3.1's goes
  by wavelength, as in arXiv:2407.21783 and RECIPES.md 1.
  """
  exponents = np.arange(0, config.head_dim, 2, dtype=np.float64)
  frequencies = config.rope_theta ** (-exponents / config.head_dim)
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies
  if scaling.kind == "linear":
    return frequencies / scaling.factor
  wavelengths = 2 * math.pi / frequencies
  smooth = scaling.original_context / wavelengths - scaling.low_freq_factor
  smooth /= scaling.high_freq_factor - scaling.low_freq_factor
  # At and below 0 only the slowed frequency is left, from 1 on only the plain.
  smooth = np.clip(smooth, 0.0, 1.0)
  return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def reference_logits(
  config: config_lib.LlamaConfig,
  source: weights.Source,
  ids: Sequence[int],
  *,
  positions: Sequence[Sequence[int]] | None = None,
  dtype: np.typing.DTypeLike = np.float32,
) -> np.ndarray:
  """A plain causal Llama forward on a source's own tensors.

  Reads blocks of rows, so that it needs little memory for a model of any size.

  Args:
    config: the model's configuration.
    source: its scheme says names, and RoPE in halves or interleaved pairs.
    ids: T token ids.
    positions: R rows of T positions for RoPE, rising; one row of 0, 1, ... by
      default. Spread ones reach past a scaled model's original context
      cheaply.
    dtype: of the arithmetic and of the angles, as in the published code; norms
      and softmax are float64.

  Returns:
    logits [R, T, V] of dtype; of a reward model its rewards, [R, T, 1].
  """
  where = _LAYOUTS[source.scheme]
  ids = np.asarray(ids)
  T = len(ids)
  positions_RT = np.asarray([np.arange(T)] if positions is None else positions)
  R = len(positions_RT)
  frequencies = inverse_frequencies(config).astype(dtype)
  angles_tH = np.outer(positions_RT.astype(dtype), frequencies)
  cos_tH, sin_tH = np.cos(angles_tH), np.sin(angles_tH)
  causal_TT = np.tril(np.ones((T, T), bool))

  def norm(x_tD: np.ndarray, name: str) -> np.ndarray:
    wide = x_tD.astype(np.float64)
    scale = np.sqrt((wide * wide).mean(axis=1, keepdims=True) + config.norm_eps)
    weight_D = source.get(name + ".weight").astype(np.float64)
    return (wide / scale * weight_D).astype(dtype)

  def linear(x_tD: np.ndarray, name: str) -> np.ndarray:
    spans = source.spans([name + ".weight"], _BLOCK_BYTES)
    return np.concatenate(
      [x_tD @ source.rows(*span).astype(dtype).T for span in spans], axis=1
    )

  def rotate(x_tQ: np.ndarray) -> np.ndarray:
    x_tNH = x_tQ.reshape(R * T, -1, config.head_dim)
    half = config.head_dim // 2
    if where.pairs == "halves":
      first, second = slice(None, half), slice(half, None)
    else:
      first, second = slice(0, None, 2), slice(1, None, 2)
    a, b = x_tNH[..., first], x_tNH[..., second]
    cos, sin = cos_tH[:, None, :], sin_tH[:, None, :]
    turned = np.empty_like(x_tNH)
    turned[..., first] = a * cos - b * sin
    turned[..., second] = a * sin + b * cos
    return turned

  def attend(q_TH: np.ndarray, k_TH: np.ndarray, v_TH: np.ndarray):
    scores_TT = (q_TH @ k_TH.T).astype(np.float64)
    scores_TT /= math.sqrt(config.head_dim)
    scores_TT = np.where(causal_TT, scores_TT, -np.inf)
    scores_TT = np.exp(scores_TT - scores_TT.max(axis=1, keepdims=True))
    probs_TT = scores_TT / scores_TT.sum(axis=1, keepdims=True)
    return probs_TT.astype(dtype) @ v_TH

  embed = where.embed + ".weight"
  rows = {i: source.rows(embed, i, i + 1)[0] for i in sorted(set(ids.tolist()))}
  x_TD = np.stack([rows[i] for i in ids.tolist()]).astype(dtype)
  x_tD = np.concatenate([x_TD] * R)
  for layer in range(config.num_layers):
    block = f"{where.block}{layer}."
    h_tD = norm(x_tD, block + where.attention_norm)
    q_tNH = rotate(linear(h_tD, block + where.query))
    k_tKH = rotate(linear(h_tD, block + where.key))
    v_tKH = linear(h_tD, block + where.value).reshape(k_tKH.shape)
    out_tNH = np.empty_like(q_tNH)
    for row in range(R):
      span = slice(row * T, (row + 1) * T)
      for n in range(config.num_heads):
        group = n // config.num_groups
        out_tNH[span, n] = attend(
          q_tNH[span, n], k_tKH[span, group], v_tKH[span, group]
        )
    x_tD = x_tD + linear(out_tNH.reshape(R * T, -1), block + where.out)
    h_tD = norm(x_tD, block + where.mlp_norm)
    gate_tF = linear(h_tD, block + where.gate).astype(np.float64)
    gate_tF = (gate_tF * 0.5 * (1 + np.tanh(gate_tF / 2))).astype(dtype)
    up_tF = linear(h_tD, block + where.up)
    x_tD = x_tD + linear(gate_tF * up_tF, block + where.down)

  x_tD = norm(x_tD, where.norm)
  if config.head == "scalar":
    last = "score"  # in Hugging Face's names: no other scheme has one
  else:
    last = where.embed if config.tied_embeddings else where.head
  return linear(x_tD, last).reshape(R, T, -1)


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


def same_vocabulary(one, other) -> bool:
  """Whether two tokenizers give the built-in text the same ids."""
  return (one.vocab_size, one.bos_id, one.eos_id, one.encode(TEXT)) == (
    other.vocab_size,
    other.bos_id,
    other.eos_id,
    other.encode(TEXT),
  )
