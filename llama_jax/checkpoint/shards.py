"""Weights of a file read part by part onto the devices that hold the parts.

orbax: does the same by itself (store.read_params).
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.checkpoint import names, weights
from llama_jax.model import config as config_lib

# (start, stop) on each axis.
Bounds = tuple[tuple[int, int], ...]


def read_params(
  config: config_lib.LlamaConfig,
  source: weights.Source,
  shardings: Mapping[str, Any],
) -> dict[str, Any]:
  """What weights.read_params gives, as JAX arrays that lie where they are told.

  A part that several devices hold is read once. The host never holds more than
  the largest part of a leaf and one tensor.

  Args:
    config: the model's configuration.
    source: the weights, in any scheme.
    shardings: a tree like the params, of jax.sharding.Shardings.

  Raises:
    BadFileError: a tensor is missing, unexpected or of a wrong shape.
  """
  weights.check(config, source)
  weights.check_tied(config, source)
  halves = weights.as_scheme(config, source, "hf")
  dtypes = weights.leaf_dtypes(config, source)
  tensors = collections.defaultdict(list)
  for place in names.places(config, "hf"):
    tensors[place.row.path].append(place)
  placed = names.flatten(shardings)
  return names.nest(
    {
      row.path: _read_leaf(
        halves,
        tensors[row.path],
        names.our_shape(config, row),
        dtypes[row.path],
        placed[row.path],
      )
      for row in names.rows(config)
    }
  )


def _read_leaf(
  source: weights.Source,
  tensors: Sequence[names.Place],
  shape: tuple[int, ...],
  dtype: np.dtype,
  sharding,
):
  """One leaf of our tree; its tensors in the order of the layers."""
  import jax

  holders = collections.defaultdict(list)
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    bounds = tuple(
      one.indices(size)[:2] for one, size in zip(index, shape, strict=True)
    )
    holders[bounds].append(device)
  arrays = []
  for bounds, devices in holders.items():
    part = _read_part(source, tensors, bounds, dtype)
    arrays += [jax.device_put(part, device) for device in devices]
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read_part(
  source: weights.Source,
  tensors: Sequence[names.Place],
  bounds: Bounds,
  dtype: np.dtype,
) -> np.ndarray:
  if tensors[0].layer is None:
    return np.ascontiguousarray(_slice(source, tensors[0], bounds), dtype)
  (first, last), *rest = bounds
  part = np.empty([stop - start for start, stop in bounds], dtype)
  for layer, place in zip(part, tensors[first:last], strict=True):
    layer[...] = _slice(source, place, rest)
  return part


def _slice(
  source: weights.Source, place: names.Place, bounds: Sequence[tuple[int, int]]
) -> np.ndarray:
  """A part of one tensor in our layout; whole rows of the file are read."""
  if place.row.reshape == names.AS_IS:
    (start, stop), *columns = bounds
    rows = source.rows(place.name, start, stop)
    return rows[(slice(None), *(slice(*one) for one in columns))]
  inner, outer = bounds
  rows = source.rows(place.name, *outer)
  return weights.transpose(rows[:, slice(*inner)])
