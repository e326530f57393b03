"""What a checkpoint is, in a few lines."""

import collections
import math

from llama_jax.checkpoint import names, verify, weights
from llama_jax.model import config as config_lib
from llama_jax.model import sizes

_FIRST_CHARACTERS = 60


def describe(side: verify.Side) -> str:
  """The lines that --describe prints; reads no weights."""
  return "\n".join(
    f"{label:<13}{value}"
    for label, value in (
      ("checkpoint", side.reference),
      ("architecture", _architecture(side.config)),
      ("preset", _preset(side.config)),
      ("rope", _rope(side.config)),
      *_amounts(side.config, side.source),
      *_words(side.config, side.tokenizer),
    )
  )


def _architecture(config: config_lib.LlamaConfig) -> str:
  groups = {config.num_heads: "MHA", 1: "MQA"}.get(config.num_kv_heads, "GQA")
  head = "tied embeddings" if config.tied_embeddings else "untied embeddings"
  if config.head == "scalar":
    head = "a score in place of words (a reward model)"
  return (
    f"Llama: {config.num_layers} layers, embed_dim {config.embed_dim},"
    f" mlp_dim {config.mlp_dim}, {config.num_heads} heads of"
    f" {config.head_dim}, {config.num_kv_heads} kv heads ({groups}),"
    f" vocab_size {config.vocab_size}, {head}, norm_eps"
    f" {config.norm_eps:g}, context {config.context_length:,}"
  )


def _preset(config: config_lib.LlamaConfig) -> str:
  name, differs = sizes.nearest(config)
  if not differs:
    alike = [n for n, size in sizes.SIZES.items() if size == config]
    return " = ".join(alike)
  shown = ", ".join(
    f"{field} {_short(ours)} (there {_short(theirs)})"
    for field, (ours, theirs) in differs.items()
  )
  return f"none; nearest {name}, but {shown}"


def _short(value) -> str:
  if isinstance(value, config_lib.RopeScaling):
    return f"{value.kind} x{value.factor:g}"
  return f"{value:g}" if isinstance(value, float) else str(value)


def _rope(config: config_lib.LlamaConfig) -> str:
  scaling = config.rope_scaling
  if scaling is None:
    return f"theta {config.rope_theta:g}, not scaled"
  text = (
    f"theta {config.rope_theta:g}, {scaling.kind} factor {scaling.factor:g}"
  )
  if scaling.kind == "llama3":
    text += (
      f" (low {scaling.low_freq_factor:g}, high {scaling.high_freq_factor:g},"
      f" original context {scaling.original_context:,})"
    )
  return text


def _amounts(config: config_lib.LlamaConfig, source: weights.Source):
  kinds: collections.Counter[str] = collections.Counter()
  parameters = num_bytes = 0
  for place in names.places(config, source.scheme):
    tensor = source.tensors[place.name]
    kinds[tensor.stored] += 1
    parameters += math.prod(tensor.shape)
    num_bytes += weights.stored_bytes(tensor)
  yield "parameters", f"{parameters:,}"
  yield (
    "tensors",
    ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
  )
  yield "weights", f"{num_bytes / 1e6:,.1f} MB"


def _words(config: config_lib.LlamaConfig, tokenizer):
  if tokenizer is None:
    yield "tokenizer", "none"
    return
  spare = config.vocab_size - tokenizer.vocab_size
  yield (
    "tokenizer",
    f"{type(tokenizer).__name__}, {tokenizer.vocab_size:,} ids"
    + (f" ({spare} rows of the embedding are spare)" if spare else "")
    + (", begins with BOS" if tokenizer.add_bos else ""),
  )
  names_of = {i: text for text, i in tokenizer.special_tokens.items()}
  yield (
    "stop tokens",
    ", ".join(f"{names_of.get(i, '?')} {i}" for i in tokenizer.stop_ids)
    or "none",
  )
  template = tokenizer.chat_template
  if template is None:
    yield "template", "none"
  else:
    first = " ".join(template.split())[:_FIRST_CHARACTERS]
    yield "template", f"{len(template):,} characters: {first}..."
