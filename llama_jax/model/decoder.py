"""The decoder: one forward for training, prefill and cached decoding.

Params are a plain nested dict (checkpoint/names.py lists every path). For
training the layers are stacked and scanned; for decoding they are unstacked
and unrolled, which reads each weight in place (1.4x faster a token on CPU;
unrolled.py makes such params).

B batch, T tokens, D embed, V vocab, L layers.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama_jax import errors, kernels
from llama_jax.kernels import (
  cross_entropy,
  divergence,
  fp8,
  int8,
  panels,
  reference,
)
from llama_jax.model import attention, heads, linear, mlp, norm, rope
from llama_jax.model import config as config_lib
from llama_jax.parallel import rules

# What a block keeps for its backward pass, by the names that arrays were given
# where they are made; None: whatever that pass asks for.
REMATERIALISATION = {
  "none": None,
  "dots": (linear.KEPT, reference.KEPT),
  "attention": (reference.KEPT,),
  "full": (),
}
DTYPES = ("float32", "bfloat16", "float16", "float8")


class Block(nn.Module):
  """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

  config: config_lib.LlamaConfig
  dtype: jnp.dtype
  kernel: str
  transposed: bool = False

  @nn.compact
  def __call__(self, x_BTD, tokens: attention.Tokens, cache=None, held=None):
    D, eps = self.config.embed_dim, self.config.norm_eps
    scale_D = linear.Scale(D, name="attention_norm")()
    added_BTD, written = attention.Attention(
      self.config, self.dtype, self.kernel, self.transposed, name="attention"
    )(norm.rms_norm(x_BTD, scale_D, eps), tokens, cache, held)
    x_BTD = x_BTD + added_BTD
    scale_D = linear.Scale(D, name="mlp_norm")()
    x_BTD = x_BTD + mlp.MLP(
      self.config, self.dtype, self.transposed, name="mlp"
    )(norm.rms_norm(x_BTD, scale_D, eps))
    return rules.constrain(x_BTD, "batch", None, None), written


@functools.partial(jax.jit, static_argnums=0)
def _apply(block: Block, params, *args):
  return block.apply({"params": params}, *args)


def _unrolled(block: Block, *args):
  """One of many alike layers, traced with the first of them.

  A function of its own within the program, which XLA puts in place: a layer
  more costs no tracing (30 layers: 0.5 s of every program, now 0.1).
  """
  if block.is_initializing():
    return block(*args)
  alike = block.clone(parent=None, name=None)
  return _apply(alike, block.variables["params"], *args)


class Decoder(nn.Module):
  """A Llama.

  Attributes:
    config: what it is.
    dtype: compute dtype, one of DTYPES. Norms, RoPE, softmax and logits are
      float32 whatever it is; the residual stream is in dtype. "float8" is
      bfloat16 but for the blocks' projections (kernels/fp8.py), for training
      alone; where no unit computes it, it is emulated and slow.
    attention: a key of kernels.ATTENTION, or "auto": the platform's fastest.
    rematerialise: what the backward pass computes again of each block: "none"
      nothing, "dots" what lies between the matrix products (norms, RoPE,
      SwiGLU), "attention" all but the attention kernel, "full" everything.
      benchmarks/memory.py prints what each costs.
    scan: stacked layers under a scan; False unrolls what unrolled.py made.
  """

  config: config_lib.LlamaConfig
  dtype: str = "float32"
  attention: str = "auto"
  rematerialise: str = "full"
  scan: bool = True

  def __post_init__(self):
    for name, allowed in (
      ("dtype", DTYPES),
      ("attention", (kernels.AUTO, *kernels.ATTENTION)),
      ("rematerialise", tuple(REMATERIALISATION)),
    ):
      if getattr(self, name) not in allowed:
        raise errors.ConfigError(
          f"model.{name}={getattr(self, name)!r} is not known;"
          f" use one of {', '.join(allowed)}."
        )
    if self.dtype == "float8" and not self.scan:
      raise errors.ConfigError(
        "model.dtype='float8' is for training; decode in bfloat16."
      )
    super().__post_init__()

  def setup(self):
    config = self.config
    V, D = config.vocab_size, config.embed_dim
    self.embed = Embedding(V, D)
    block = Block
    kept = REMATERIALISATION[self.rematerialise]
    if kept is not None:
      # A scan's body is compiled once and cannot be merged with its
      # recomputation, so the barrier against that would only cost time.
      block = nn.remat(
        Block,
        prevent_cse=not self.scan,
        policy=jax.checkpoint_policies.save_only_these_names(*kept),
      )
    dtype = fp8.E4M3 if self.dtype == "float8" else jnp.dtype(self.dtype)
    fields = (config, dtype, self.attention)
    if self.scan:
      self.layers = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=config.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )(*fields)
    else:
      self.layers = [Block(*fields, True) for i in range(config.num_layers)]
    self.final_norm = linear.Scale(D)
    if config.head == "scalar":
      self.score = heads.Score(D, not self.scan)
    elif not config.tied_embeddings:
      self.head = Head(D, V, not self.scan)

  def hidden(self, ids_BT, positions_BT, segments_BT, cache=None):
    """Hidden states [B, T, D] after the last norm, and the cache."""
    tokens = attention.Tokens(
      positions_BT, segments_BT, *rope.table(self.config, positions_BT)
    )
    table_VD = self.embed()
    if isinstance(table_VD, int8.Quantized):
      x_BTD = int8.take(table_VD, ids_BT)
    elif isinstance(table_VD, panels.Panels):
      x_BTD = panels.take(table_VD, ids_BT)
    else:
      # Rows whole before the look-up: only then does a batch-sharded look-up
      # need no more than a sum over the vocabulary's parts.
      x_BTD = rules.constrain(table_VD, "vocab", None)[ids_BT]
    x_BTD = x_BTD.astype("bfloat16" if self.dtype == "float8" else self.dtype)
    x_BTD = rules.constrain(x_BTD, "batch", None, None)
    if self.scan:
      if cache is not None:
        raise ValueError("Decoding with a cache needs Decoder(scan=False).")
      x_BTD, _ = self.layers(x_BTD, tokens)
    else:
      if cache is not None:
        cache = cache.begin(positions_BT, segments_BT)
        layers, cache = cache.split()
      else:
        layers = [None] * len(self.layers)
      written = []
      for block, held in zip(self.layers, layers, strict=True):
        x_BTD, held = _unrolled(block, x_BTD, tokens, cache, held)
        written.append(held)
      if cache is not None:
        cache = cache.end(written, ids_BT.shape[1])
    x_BTD = norm.rms_norm(x_BTD, self.final_norm(), self.config.norm_eps)
    return x_BTD, cache

  def _head(self) -> jax.Array:
    if self.config.head != "words":
      raise errors.ConfigError(
        f"model.head={self.config.head} is a reward model, which gives rewards"
        " and no logits; name a language model."
      )
    return self.embed() if self.config.tied_embeddings else self.head()

  @property
  def _head_rows(self) -> bool:
    """Whether the head lies as [V, D]."""
    return self.config.tied_embeddings or not self.scan

  def logits(self, x_BTD) -> jax.Array:
    """Float32 logits [B, T, V] of hidden states."""
    return cross_entropy.project(x_BTD, self._head(), tied=self._head_rows)

  def __call__(self, ids_BT, positions_BT, segments_BT, cache=None):
    """Logits float32 [B, T, V] and the cache (None where none was given).

    Args:
      ids_BT: int32 token ids.
      positions_BT: int32, counted from 0 in each segment.
      segments_BT: int32; tokens see only their own segment, 0 is padding.
      cache: the tokens before these, or None.
    """
    x_BTD, cache = self.hidden(ids_BT, positions_BT, segments_BT, cache)
    return self.logits(x_BTD), cache

  def loss_sum(
    self,
    ids_BT,
    positions_BT,
    segments_BT,
    targets_BT,
    weights_BT,
    z_loss: float,
    sparse: bool = False,
  ):
    """What cross_entropy.loss_sum gives: the sum to minimise, each nll."""
    x_BTD, _ = self.hidden(ids_BT, positions_BT, segments_BT)
    return cross_entropy.loss_sum(
      x_BTD,
      self._head(),
      targets_BT,
      weights_BT,
      self._head_rows,
      z_loss,
      sparse,
    )

  def token_nll(
    self, ids_BT, positions_BT, segments_BT, targets_BT, wanted_BT=None
  ):
    """What cross_entropy.token_nll gives, float32 [B, T] in nats."""
    x_BTD, _ = self.hidden(ids_BT, positions_BT, segments_BT)
    return cross_entropy.token_nll(
      x_BTD, self._head(), targets_BT, wanted_BT, self._head_rows
    )

  def states(self, ids_BT, positions_BT, segments_BT) -> divergence.States:
    """What logits are made of, for losses that make them in chunks."""
    x_BTD, _ = self.hidden(ids_BT, positions_BT, segments_BT)
    return divergence.States(x_BTD, self._head(), self._head_rows)

  def rewards(self, ids_BT, positions_BT, segments_BT) -> jax.Array:
    """A reward model's score of the text up to each token, float32 [B, T].

    That of a whole text is its last token's (arXiv:2307.09288, 3.2.2).
    """
    if self.config.head != "scalar":
      raise errors.ConfigError(
        f"model.head={self.config.head} is a language model, which gives no"
        " rewards; train one with a reward objective, or name a reward model."
      )
    x_BTD, _ = self.hidden(ids_BT, positions_BT, segments_BT)
    return self.score(x_BTD)


class Embedding(nn.Module):
  """One row per word, float32 [V, D] at initialisation."""

  vocab_size: int
  embed_dim: int

  @nn.compact
  def __call__(self) -> jax.Array:
    shape = (self.vocab_size, self.embed_dim)
    return linear.matrix(self, "embedding", shape, ("vocab", "embed"), 0.02)


class Head(nn.Module):
  """The untied output projection, float32 [D, V] at initialisation.

  transposed: it lies as [V, D], which decoding wants.
  """

  embed_dim: int
  vocab_size: int
  transposed: bool = False

  @nn.compact
  def __call__(self) -> jax.Array:
    order = -1 if self.transposed else 1
    shape, axes = (self.embed_dim, self.vocab_size), ("embed", "vocab")
    return linear.matrix(self, "kernel", shape[::order], axes[::order], 0.02)


def init(decoder: Decoder, key: jax.Array) -> dict[str, Any]:
  """Fresh params, each boxed with its logical axes (nn.unbox strips them).

  Initialisation: normal with standard deviation 0.02, the two projections that
  end in the residual stream divided by sqrt(2 L). Not published for LLaMA.
  """
  token = jnp.zeros((1, 1), jnp.int32)
  # Which kernel attends is no matter to params, and one runs everywhere.
  decoder = decoder.clone(attention="reference")
  method = "rewards" if decoder.config.head == "scalar" else None
  return decoder.init(key, token, token, token, method=method)["params"]


def grow_vocabulary(params: dict[str, Any], vocab_size: int) -> dict[str, Any]:
  """Params whose embedding and head have rows for new words, after the old.

  A new row is the mean of the old ones, so that before it is trained it takes
  little from any word. How Code Llama began its own is not published.
  """

  def grown(leaf, axis):
    more = vocab_size - leaf.shape[axis]
    if not more:
      return leaf
    mean = jnp.mean(leaf, axis, keepdims=True)
    return jnp.concatenate([leaf, jnp.repeat(mean, more, axis)], axis)

  params = dict(params)
  params["embed"] = {"embedding": grown(params["embed"]["embedding"], 0)}
  if "head" in params:
    params["head"] = {"kernel": grown(params["head"]["kernel"], 1)}
  return params


def count_parameters(config: config_lib.LlamaConfig) -> int:
  """Weights of a model, without allocating any."""
  shapes = jax.eval_shape(
    lambda: nn.unbox(init(Decoder(config), jax.random.key(0)))
  )
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))
