"""Weights in 8 or 4 bits, for decoding.

Every matrix of the unrolled params becomes an int8.Quantized in its place;
linear.matrix and the decoder take either. Norms and scores stay. Matrices that
words look up or are scored by are 8 bits wide in "int4" too: at 4, the tied one
of SmolLM2-135M cost 0.08 nats a token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llama_jax import errors
from llama_jax.kernels import int8
from llama_jax.model import unrolled

KINDS = ("int8", "int4")
_WORDS = ("embed", "head")
# One row: nothing to save.
_KEPT = ("score",)


def _is_quantized(leaf) -> bool:
  return isinstance(leaf, int8.Quantized)


def quantize(
  params: dict[str, Any], kind: str, knob: str = "--quantize"
) -> dict[str, Any]:
  """Params with every matrix in 8 bits a weight, or 4 ("int4").

  In "int4" the embedding, the head, and matrices whose rows int8.GROUP does not
  divide have 8.

  Args:
    params: unrolled (unrolled.unstack), in any float dtype. Not to be cast
      after this: scales are float32.
    kind: one of KINDS.
    knob: what an error message calls it.
  """
  if kind not in KINDS:
    raise errors.ConfigError(
      f"{knob}={kind!r} is not known; use one of {', '.join(KINDS)}."
    )
  if "layers" in params:
    raise ValueError("Only unrolled params can be quantized: unrolled.unstack.")

  def one(path, leaf):
    keys = [entry.key for entry in path]
    if keys[-1] not in unrolled.MATRICES or keys[0] in _KEPT:
      return leaf
    if kind == "int8" or keys[0] in _WORDS or leaf.shape[1] % int8.GROUP:
      return _eight(leaf)
    return _four(leaf)

  return jax.tree.map_with_path(one, params)


_eight, _four = jax.jit(int8.quantize), jax.jit(int8.quantize4)


def specs(params: dict[str, Any], unquantized) -> Any:
  """PartitionSpecs of quantized params from those of the matrices they were.

  A scale lies as its rows do; steps and lows as their groups do, whose number
  the mesh must divide.
  """

  def one(leaf, spec):
    if not _is_quantized(leaf):
      return spec
    rows = PartitionSpec(*spec[:1])
    each = None if leaf.step_OG is None else spec
    return int8.Quantized(spec, rows, each, each)

  return jax.tree.map(one, params, unquantized, is_leaf=_is_quantized)


@jax.jit
def _off(weights_OI, quantized: int8.Quantized):
  """The error's norm by that of the weights."""
  weights_OI = weights_OI.astype(jnp.float32)
  off_OI = int8.dequantize(quantized) - weights_OI
  return jnp.linalg.norm(off_OI) / jnp.linalg.norm(weights_OI)


@dataclasses.dataclass
class Report:
  """What quantizing saved and cost.

  Attributes:
    was_bytes, now_bytes: of the params, before and after.
    off: path of a matrix -> how far its weights moved, by their norm.
  """

  was_bytes: int = 0
  now_bytes: int = 0
  off: dict[str, float] = dataclasses.field(default_factory=dict)

  def add(self, was: dict[str, Any], made: dict[str, Any]) -> None:
    """Params, or a part of them, and what quantize made of them."""

    def one(path, leaf, was):
      if _is_quantized(leaf):
        name = "/".join(entry.key for entry in path)
        self.off[name] = float(_off(was, leaf))

    jax.tree.map_with_path(one, made, was, is_leaf=_is_quantized)
    self.was_bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(was))
    self.now_bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(made))

  def __str__(self) -> str:
    mean = sum(self.off.values()) / len(self.off)
    worst = max(self.off, key=self.off.get)
    was, now = (f"{b / 1e6:,.1f} MB" for b in (self.was_bytes, self.now_bytes))
    return (
      f"weights {was} -> {now}; a matrix moved by {mean:.2%} of its norm,"
      f" {worst} by {self.off[worst]:.2%}"
    )
