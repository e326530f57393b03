"""Attention and loss arithmetic. One signature for every attention kernel.

  attend(q_BTNH, k_BSKH, v_BSKH, *, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS)
    -> [B, T, N, H]

A query sees a key when both are in one segment (0 marks padding) and the key's
position is not later. Positions and segments say packing, padding and decoding
alike, so no kernel needs a dense mask. Where T == S the two are taken to be the
same tokens in order, which lets a kernel skip later blocks. What stands in
padding is finite and otherwise the kernel's own affair.
"""

from collections.abc import Callable

import jax

from llama_jax import errors
from llama_jax.kernels import chunked, cudnn, reference, splash

ATTENTION: dict[str, Callable] = {
  "reference": reference.attend,
  "chunked": chunked.attend,
  "cudnn": cudnn.attend,
  "splash": splash.attend,
}
# (platform, dtype, head_dim) -> why it cannot run there, or None; the others
# run anywhere. "auto" takes the first that can, else chunked.
_OBSTACLES = {"splash": splash.obstacle, "cudnn": cudnn.obstacle}
AUTO = "auto"
# Of which a program is one device's, so that a mesh needs a shard_map.
PER_DEVICE = ("splash",)


def platform() -> str:
  """Of the mesh that is set, else of this process: "cpu", "gpu", "tpu"."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def resolve(name: str, dtype, head_dim: int) -> str:
  """A key of ATTENTION for "auto" or a named kernel that can run here.

  Raises ConfigError where it cannot.
  """
  here = platform()
  found = {
    kernel: obstacle(here, dtype, head_dim)
    for kernel, obstacle in _OBSTACLES.items()
  }
  able = [kernel for kernel in found if found[kernel] is None]
  if name == AUTO:
    return able[0] if able else "chunked"
  if found.get(name):
    others = [kernel for kernel in ATTENTION if not found.get(kernel)]
    raise errors.ConfigError(
      f"model.attention={name!r} cannot run here: {found[name]};"
      f" use {AUTO} or one of {', '.join(others)}."
    )
  return name
