"""LoRA (arXiv:2106.09685): a frozen model, and small matrices beside its own.

A projection x @ W becomes x @ W + alpha / rank * (x @ A) @ B. A [in, rank] and
B [rank, out] are trained and W is not, so that W takes no gradient, no moments
and no float32. The decoder is the one there is: its projections add the second
term where their params hold the two (model/linear.py).

Adapters are a tree like the params, of what is trained:

  layers/MODULE/TARGET/lora_a  [L, in, rank]
  layers/MODULE/TARGET/lora_b  [L, rank, out]
  score/kernel                 [D, 1], the whole score of a reward model

No dropout. Embedding, head and norms stay as they are.

L layers, I in, O out, r rank, D embed.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama_jax import errors
from llama_jax.kernels import int8
from llama_jax.model import config as config_lib
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import heads

TARGETS = ("query", "key", "value", "out", "gate", "up", "down")
INT8 = "int8"
DTYPES = ("float32", "bfloat16", INT8)


@dataclasses.dataclass(frozen=True)
class LoRA:
  """What is trained beside which projections, and how the rest is kept.

  Attributes:
    rank: columns of A and rows of B.
    alpha: the second term's weight is alpha / rank.
    targets: which projections, of TARGETS.
    base_dtype: of the frozen matrices, one of DTYPES. "int8" has a scale for
      each output channel and is for the layers' matrices; the embedding and
      the head are then bfloat16.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...]
  base_dtype: str

  def __post_init__(self):
    if type(self.rank) is not int or self.rank < 1:
      raise errors.ConfigError(
        f"lora.rank={self.rank!r} must be a whole number, 1 or more; 8 to 64"
        " are usual."
      )
    if not 0 < self.alpha < math.inf:
      raise errors.ConfigError(
        f"lora.alpha={self.alpha!r} must be above 0; once or twice lora.rank is"
        " usual."
      )
    listed = isinstance(self.targets, (tuple, list)) and self.targets
    if not listed or not set(self.targets) <= set(TARGETS):
      raise errors.ConfigError(
        f"lora.targets={self.targets!r} must be one or more of"
        f" {', '.join(TARGETS)}, as in ('query', 'value')."
      )
    if self.base_dtype not in DTYPES:
      raise errors.ConfigError(
        f"lora.base_dtype={self.base_dtype!r} is not known; use one of"
        f" {', '.join(DTYPES)}."
      )
    # In one order, each once: what is the same compares as the same.
    targets = tuple(name for name in TARGETS if name in self.targets)
    object.__setattr__(self, "targets", targets)


def init(
  config: config_lib.LlamaConfig, lora: LoRA, key: jax.Array
) -> dict[str, Any]:
  """Fresh adapters, boxed with their logical axes as decoder.init's params.

  A is uniform within 1 / sqrt(in), as in the authors' code; the paper says
  Gaussian. B is zero: the model begins as its base. A score is as
  heads.Score's at initialisation.
  """
  whole = jax.eval_shape(
    lambda: decoder_lib.init(decoder_lib.Decoder(config), key)
  )
  score_key, *keys = jax.random.split(key, 1 + len(TARGETS))
  keys = dict(zip(TARGETS, keys, strict=True))

  def pair(name, kernel):
    layers, into, out = kernel.value.shape
    bound = into**-0.5
    a_LIr = jax.random.uniform(
      keys[name], (layers, into, lora.rank), jnp.float32, -bound, bound
    )
    b_LrO = jnp.zeros((layers, lora.rank, out), jnp.float32)
    axes = kernel.names
    return {
      "lora_a": nn.LogicallyPartitioned(a_LIr, (*axes[:2], None)),
      "lora_b": nn.LogicallyPartitioned(b_LrO, (axes[0], None, axes[2])),
    }

  layers = {}
  for module, held in whole["layers"].items():
    if chosen := [name for name in lora.targets if name in held]:
      layers[module] = {n: pair(n, held[n]["kernel"]) for n in chosen}
  adapters: dict[str, Any] = {"layers": layers}
  if config.head == "scalar":
    x_BTD = jnp.zeros((1, 1, config.embed_dim))
    score = heads.Score(config.embed_dim).init(score_key, x_BTD)
    adapters["score"] = score["params"]
  return adapters


def join(
  base: Mapping[str, Any], adapters: Mapping[str, Any], lora: LoRA
) -> dict[str, Any]:
  """The decoder's params: the base's, with what the adapters hold beside them.

  Not their sum: each kernel has its lora_a and lora_b, and alpha / rank is in
  lora_b. Differentiable by the adapters.
  """
  scale = lora.alpha / lora.rank

  def joined(held, added):
    tree = dict(held)
    for name, value in added.items():
      if isinstance(value, Mapping):
        tree[name] = joined(held.get(name, {}), value)
      else:
        tree[name] = value * scale if name == "lora_b" else value
    return tree

  return joined(base, adapters)


def _eight_bits(path, lora: LoRA) -> bool:
  """Whether the leaf at a path of params is quantized."""
  kernel = path[0].key == "layers" and path[-1].key == "kernel"
  return kernel and lora.base_dtype == INT8


def freeze(params: Mapping[str, Any], lora: LoRA) -> dict[str, Any]:
  """A whole model's params as the base, its matrices in lora.base_dtype.

  Quantized ones are an int8.Quantized of [L, out, in]. Norms' scales stay as
  they are stored, and a score is left out: the adapters hold it.
  """
  dtype = "bfloat16" if lora.base_dtype == INT8 else lora.base_dtype

  def one(path, leaf):
    if _eight_bits(path, lora):
      # One layer at a time in float32.
      return jax.lax.map(lambda kernel_IO: int8.quantize(kernel_IO.T), leaf)
    return leaf if path[-1].key == "scale" else leaf.astype(dtype)

  rest = {name: tree for name, tree in params.items() if name != "score"}
  return jax.tree.map_with_path(one, rest)


def shardings(placed: Mapping[str, Any], lora: LoRA) -> dict[str, Any]:
  """Where a base lies, from the NamedShardings of the whole model's params."""

  def one(path, sharding):
    if not _eight_bits(path, lora):
      return sharding
    layers, rows, columns = sharding.spec
    return int8.Quantized(
      jax.NamedSharding(sharding.mesh, jax.P(layers, columns, rows)),
      jax.NamedSharding(sharding.mesh, jax.P(layers, columns)),
    )

  rest = {name: tree for name, tree in placed.items() if name != "score"}
  return jax.tree.map_with_path(one, rest)


def account(config: config_lib.LlamaConfig, lora: LoRA) -> dict[str, int]:
  """Bytes that training holds from step to step, by component.

  base, and of the adapters: themselves, their gradients, and Adam's moments,
  all in float32. Activations come on top (benchmarks/memory.py). Allocates
  nothing.
  """

  def make():
    key = jax.random.key(0)
    whole = nn.unbox(decoder_lib.init(decoder_lib.Decoder(config), key))
    return freeze(whole, lora), nn.unbox(init(config, lora, key))

  base, adapters = (
    sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    for tree in jax.eval_shape(make)
  )
  return {
    "base": base,
    "adapters": adapters,
    "gradients": adapters,
    "moments": 2 * adapters,
  }
