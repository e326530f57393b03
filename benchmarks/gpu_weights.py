"""Random weights that both sides of a GPU benchmark make for themselves.

They come from NumPy by the name of each array, so that no file has to pass
between a process of JAX and one of torch. Letters of model/decoder.py.
"""

import zlib
from typing import Any

import numpy as np


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
  """Our paths -> shapes of a model, with one entry for each layer's array.

  Args:
    config: model.config.LlamaConfig as a dict.
  """
  V, D, F = (config[n] for n in ("vocab_size", "embed_dim", "mlp_dim"))
  N, K, H = (config[n] for n in ("num_heads", "num_kv_heads", "head_dim"))
  found = {"embed.embedding": (V, D), "final_norm.scale": (D,)}
  if not config["tied_embeddings"]:
    found["head.kernel"] = (D, V)
  for layer in range(config["num_layers"]):
    for path, shape in (
      ("attention_norm.scale", (D,)),
      ("mlp_norm.scale", (D,)),
      ("attention.query.kernel", (D, N * H)),
      ("attention.key.kernel", (D, K * H)),
      ("attention.value.kernel", (D, K * H)),
      ("attention.out.kernel", (N * H, D)),
      ("mlp.gate.kernel", (D, F)),
      ("mlp.up.kernel", (D, F)),
      ("mlp.down.kernel", (F, D)),
    ):
      found[f"layers.{layer}.{path}"] = shape
  return found


def weight(path: str, shape: tuple[int, ...]) -> np.ndarray:
  """One array of a random model, float32; norms' scales lie around 1."""
  rng = np.random.default_rng(zlib.crc32(path.encode()))
  values = rng.standard_normal(shape, np.float32)
  if path.endswith("scale"):
    return 1 + np.float32(0.1) * values
  return np.float32(0.02) * values


def stacked(config: dict[str, Any]) -> dict[str, Any]:
  """All arrays of such a model as our params, layers stacked, in NumPy."""
  params, layers = {}, {}
  for path, shape in shapes(config).items():
    names = path.split(".")
    if names[0] == "layers":
      layers.setdefault(tuple(names[2:]), []).append(weight(path, shape))
      continue
    params.setdefault(names[0], {})[names[1]] = weight(path, shape)
  for names, arrays in layers.items():
    place = params.setdefault("layers", {})
    for name in names[:-1]:
      place = place.setdefault(name, {})
    place[names[-1]] = np.stack(arrays)
  return params
