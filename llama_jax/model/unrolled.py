"""Params as decoding wants them, of those as training stacks them.

Layers apart; kernels as [out, in] (kernels/matmul.py says why); on one device
matrices of the same x merged, and on CPU in panels.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels import panels

# What a matrix of weights is called, whose ever it is.
MATRICES = ("kernel", "embedding")
# Module of a layer -> the matrix that merge makes, of which.
MERGED = {
  "attention": ("qkv", ("query", "key", "value")),
  "mlp": ("gate_up", ("gate", "up")),
}


def _turned(tree):
  return jax.tree.map_with_path(
    lambda path, leaf: leaf.T if path[-1].key == "kernel" else leaf, tree
  )


@functools.partial(jax.jit, static_argnames="merged")
def _taken(stacked, index, merged):
  """Of one layer, what is stacked of all."""
  layer = jax.tree.map(
    lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False),
    stacked,
  )
  return _merged(_turned(layer)) if merged else _turned(layer)


def _groups(layers: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Parts of stacked layers, taken out of them: matrices that merge together,
  and each other array."""
  while layers:
    module, tree = layers.popitem()
    _, together = MERGED.get(module, ("", ()))
    if together and together[0] in tree:
      yield {module: {name: tree.pop(name) for name in together}}
    while tree:
      yield {module: dict([tree.popitem()])}


def unstacked(
  params: dict[str, Any], merged: bool = False, free: bool = False
) -> Iterator[dict[str, Any]]:
  """Params for decoding part by part, each made when it is asked for.

  First all but the layers, then "layers" [L, ...] as {"layers_0": ...} and so
  on, a few matrices of each layer at a time; `join` puts them together.

  Args:
    params: of a Decoder(scan=True).
    merged: as `merge` makes of them.
    free: takes out of params what is made, which leaves them empty: so no more
      is held twice than a few matrices of each layer.

  Yields:
    nested dicts, each kernel as [out, in].
  """
  params = params if free else jax.tree.map(lambda leaf: leaf, params)
  layers = params.pop("layers")
  rest = _turned(params)
  params.clear()
  yield rest
  del rest
  for group in _groups(layers):
    stacked = jax.tree.map(jnp.asarray, group)
    del group
    # One program for all layers: three times as fast as operation by operation.
    for i in range(jax.tree.leaves(stacked)[0].shape[0]):
      yield {f"layers_{i}": _taken(stacked, i, merged)}
    del stacked


def join(whole: dict[str, Any], part: dict[str, Any]) -> None:
  """Puts a part that `unstacked` gave where it belongs in the whole."""
  for name, tree in part.items():
    if isinstance(tree, dict) and name in whole:
      join(whole[name], tree)
    else:
      whole[name] = tree


def unstack(params: dict[str, Any]) -> dict[str, Any]:
  """All parts of `unstacked` in one tree."""
  whole: dict[str, Any] = {}
  for part in unstacked(params):
    join(whole, part)
  return whole


def merge(params: dict[str, Any]) -> dict[str, Any]:
  """Unrolled params with one matrix for all that the same x is multiplied by.

  Rows of query, key and value stand one after the other in "qkv", those of
  gate and up in "gate_up"; modules take either form, quantized or not. Fewer
  and larger products: each has its start, on two cores 0.1 ms (a token of a
  135M model in 29 ms and not 33). For one device alone: equal parts of such
  rows are not parts of the heads.
  """
  return {
    name: _merged(tree) if name.startswith("layers_") else tree
    for name, tree in params.items()
  }


def cut(params: dict[str, Any]) -> dict[str, Any]:
  """Params, or a part of them, with matrices in panels (kernels/panels.py).

  Those of which the panels would not be whole stay as they are.
  """

  def one(path, leaf):
    whole = path[-1].key in MATRICES and panels.fits(leaf)
    return _cut(leaf) if whole else leaf

  return jax.tree.map_with_path(one, params)


_cut = jax.jit(panels.cut)


def _merged(layer):
  layer = dict(layer)
  for module, (name, parts) in MERGED.items():
    if parts[0] not in layer.get(module, ()):
      continue
    held = dict(layer[module])
    taken = [held.pop(part) for part in parts]
    held[name] = jax.tree.map(lambda *rows: jnp.concatenate(rows), *taken)
    layer[module] = held
  return layer
