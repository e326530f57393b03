"""This host: its rows of a batch, its memory, what its devices do best."""

import pathlib
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax.parallel import rules


def local_rows(batch_size: int) -> slice:
  """Rows of the global batch that this process loads."""
  each = batch_size // jax.process_count()
  return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, axis: int = 0):
  """This process's rows as global arrays, rows split over the mesh.

  Args:
    batch: name -> array whose given axis counts rows.
    mesh: where to.
    axis: which axis counts rows (1 behind an axis of microbatches).
  """
  names = (None,) * axis + ("batch",)
  sharding = NamedSharding(mesh, rules.spec(names))
  return {
    name: jax.make_array_from_process_local_data(sharding, array)
    for name, array in batch.items()
  }


def fastest_dtype() -> str:
  """The dtype that the devices multiply fastest.

  bfloat16 on every accelerator and on CPUs with matrix units for it (AMX),
  else float32.
  """
  if jax.default_backend() != "cpu":
    return "bfloat16"
  try:
    features = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:  # not Linux
    return "float32"
  return "bfloat16" if "amx_bf16" in features else "float32"


def peak_memory() -> int:
  """The most bytes that were in use at once.

  Of this process's fullest device, or of the process itself on CPU.
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [
    one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one
  ]
  if peaks:
    return max(peaks)
  import resource

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024
