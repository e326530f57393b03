"""A checkpoint of a model larger than memory, written block by block.

Orbax saves a skeleton, one number for each leaf; then each leaf's array is
made anew in its real shape and filled, so that no leaf is ever in memory. A
file holds a block of one layer, with checksums inside.
"""

import collections
import math
import pathlib
import shutil
from typing import Any

import numpy as np

from llama_jax.checkpoint import building, names, orbax, weights

READ_CHUNK = 8 << 20


def fill(
  site: building.Building,
  step: pathlib.Path,
  config,
  source: weights.Source,
  *,
  block_bytes: int,
) -> None:
  """Writes a source's weights as the folder of a step, in a site.

  What an earlier process finished there is not done again.
  """
  halves = weights.as_scheme(config, source, "hf")
  dtypes = weights.leaf_dtypes(config, halves)
  if not step.exists():
    _write_skeleton(step, config, dtypes)
  for name in site.done:
    site.finish(name, halves.tensors[name].num_bytes)
  places = {
    place.name: place
    for place in names.places(config, "hf")
    if place.name not in site.done
  }
  arrays = {
    row.path: _Array(
      step / "params" / array_name(row),
      names.our_shape(config, row),
      dtypes[row.path],
      row,
      block_bytes=block_bytes,
    )
    for row in {place.row for place in places.values()}
  }
  spans = (
    (place.name, start, min(start + step_, place.shape[0]))
    for place in places.values()
    for step_ in (arrays[place.row.path].block,)
    for start in range(0, place.shape[0], step_)
  )

  def turn(name: str, rows: np.ndarray) -> np.ndarray:
    row = places[name].row
    rows = rows.astype(dtypes[row.path], copy=False)
    return rows if row.reshape == names.AS_IS else weights.transpose(rows)

  # One block is on its way to the disk while the next are read and turned.
  pending: collections.deque[tuple[Any, str | None]] = collections.deque()

  def settle(most: int) -> None:
    while len(pending) > most:
      write, finished = pending.popleft()
      write.result()
      if finished is not None:
        site.finish(finished, halves.tensors[finished].num_bytes)

  with orbax.writable(step):
    try:
      for name, start, stop, rows in weights.read_ahead(halves, spans, turn):
        place = places[name]
        write = arrays[place.row.path].write(place.layer, start, stop, rows)
        pending.append((write, name if stop == place.shape[0] else None))
        settle(most=1)
      settle(most=0)
    finally:
      # Who removes what failed must not find it growing again.
      for write, _ in pending:
        write.exception()


def array_name(row: names.Row) -> str:
  """The folder that orbax gives to a leaf."""
  return row.path.replace("/", ".")


def _write_skeleton(step: pathlib.Path, config, dtypes) -> None:
  """A checkpoint of one number a leaf, laid out as _Array expects it."""
  tree = names.nest(
    {
      row.path: np.zeros(
        (1,) * len(names.our_shape(config, row)), dtypes[row.path]
      )
      for row in names.rows(config)
    }
  )
  with orbax.context() as ocp:
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.array_metadata_store = None
    context.array.saving.enable_write_sharding_file = False
    context.array.saving.use_compression = False
    with context, orbax.writable(step):
      ocp.save_checkpointables(step, {"params": tree})


class _Array:
  """The array of one leaf, written in blocks; kept if it is there already.

  A file holds a block of the formats' rows, which are columns of a kernel of
  ours: so many of one layer as fit a block. A read takes a part of that.

  Attributes:
    block: rows to write at a time.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    shape: tuple[int, ...],
    dtype: np.dtype,
    row: names.Row,
    *,
    block_bytes: int,
  ):
    import tensorstore

    columns = row.reshape != names.AS_IS
    self._columns = columns
    # One layer of a kernel; the norms of all layers.
    read = [1] * (len(shape) - 2) + list(shape[-2:]) if columns else [*shape]
    axis = len(shape) - 1 if columns else 0
    row_bytes = math.prod(read) // read[axis] * dtype.itemsize
    read[axis] = max(1, min(read[axis], READ_CHUNK // row_bytes))
    blocks = max(1, block_bytes // (read[axis] * row_bytes))
    write = [*read]
    write[axis] *= min(blocks, -(-shape[axis] // read[axis]))
    whole = names.stacked(row) and not columns
    self.block = shape[-1] if whole else write[axis]
    metadata = _zarr_metadata(shape, dtype, write, read)
    spec = {
      "driver": "zarr3",
      "kvstore": {"driver": "file", "path": f"{folder}/"},
      # building.py puts every file on the disk before it names them.
      "context": {"file_io_sync": False},
    }
    self._array = tensorstore.open(spec, open=True).result()
    if self._array.shape != shape:
      shutil.rmtree(folder)
      self._array = tensorstore.open(
        {**spec, "metadata": metadata}, create=True
      ).result()

  def write(self, layer: int | None, start: int, stop: int, ours: np.ndarray):
    """Starts to write a block, in our orientation; the future of it."""
    index: tuple[Any, ...] = () if layer is None else (layer,)
    index += (slice(None),) if self._columns else ()
    return self._array[(*index, slice(start, stop))].write(ours)


def _zarr_metadata(shape, dtype, write, read) -> dict[str, Any]:
  """Zarr 3: files of chunks `write`, of checked parts `read`."""
  plain = {"name": "bytes", "configuration": {"endian": "little"}}
  checked = [plain, {"name": "crc32c"}]
  sharding = {
    "chunk_shape": read,
    "codecs": checked,
    "index_codecs": checked,
  }
  return {
    "shape": list(shape),
    "data_type": dtype.name,
    "fill_value": 0.0,
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": write}},
    "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
  }
