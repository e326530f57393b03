"""Where params and pages lie on a mesh while decoding."""

import contextlib
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax import errors
from llama_jax.kernels import int8, paged
from llama_jax.model import config as config_lib
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import quantize as quantize_lib
from llama_jax.parallel import mesh as mesh_lib
from llama_jax.parallel import rules


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh | None:
  """A mesh of all devices; None, for the first alone, where each axis is 1."""
  if data == fsdp == tensor == 1:
    return None
  return mesh_lib.make(mesh_lib.ParallelConfig(data, fsdp, tensor))


def check(
  config: config_lib.LlamaConfig, mesh: Mesh, quantize: str = ""
) -> None:
  """Raises ConfigError where a mesh does not divide a model.

  quantize: what its weights will be, as quantize.quantize has it.
  """
  split = {
    "fsdp": {"model.embed_dim": config.embed_dim},
    "tensor": {
      "model.num_kv_heads": config.num_kv_heads,
      "model.mlp_dim": config.mlp_dim,
      "model.vocab_size": config.vocab_size,
    },
  }
  if quantize == "int4":
    # Groups lie whole on a device.
    for axis, name, size in (
      ("fsdp", "model.embed_dim", config.embed_dim),
      ("tensor", "model.mlp_dim", config.mlp_dim),
      (
        "tensor",
        "model.num_heads * head_dim",
        config.num_heads * config.head_dim,
      ),
    ):
      if size % int8.GROUP == 0:
        split[axis][f"{name} / {int8.GROUP} of int4"] = size // int8.GROUP
  mesh_lib.check(mesh_lib.ParallelConfig(**dict(mesh.shape)), split)


def specs(decoder: decoder_lib.Decoder) -> Any:
  """PartitionSpecs of a decoder's params, before they are quantized."""
  boxed = jax.eval_shape(lambda: decoder_lib.init(decoder, jax.random.key(0)))
  return jax.tree.map(
    lambda spec: rules.spec(tuple(spec)),
    nn.get_partition_spec(boxed),
    is_leaf=lambda one: isinstance(one, PartitionSpec),
  )


def shardings(config: config_lib.LlamaConfig, mesh: Mesh) -> Any:
  """Where a checkpoint's params go, a tree like them."""
  return rules.shardings(mesh, specs(decoder_lib.Decoder(config)))


def place(
  decoder: decoder_lib.Decoder, params: dict[str, Any], mesh: Mesh
) -> dict[str, Any]:
  """Unrolled params on a mesh, each array in its parts; quantized or not.

  What lies there already stays. Raises ConfigError where the mesh does not
  divide the model.
  """
  check(decoder.config, mesh)
  placed = quantize_lib.specs(params, specs(decoder))
  return jax.device_put(params, rules.shardings(mesh, placed))


def on(mesh: Mesh | None):
  """A context in which programs see the mesh, if there is one."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def kernel(name: str, mesh: Mesh | None) -> str:
  """The paged kernel to resolve: of several devices gather alone can."""
  if mesh is None or mesh.size == 1 or name == "gather":
    return name
  if name != paged.AUTO:
    raise errors.ConfigError(
      f"attention={name!r} is one device's; use gather on a mesh of"
      f" {mesh.size}."
    )
  return "gather"


def pool_sharding(pool_kernel: str, mesh: Mesh | None) -> NamedSharding | None:
  """Of each array of a pool: its kv heads over the tensor axis."""
  if mesh is None:
    return None
  axis = paged.KV_HEADS_AXIS[pool_kernel]
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, "tensor"))
