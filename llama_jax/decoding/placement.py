"""Where params and pages lie on a mesh while decoding."""

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax import errors
from llama_jax.kernels import paged
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import quantize
from llama_jax.parallel import mesh as mesh_lib
from llama_jax.parallel import rules


def specs(decoder: decoder_lib.Decoder, params: dict[str, Any]) -> Any:
  """PartitionSpecs of unrolled params, quantized or not."""
  boxed = jax.eval_shape(lambda: decoder_lib.init(decoder, jax.random.key(0)))
  found = jax.tree.map(
    lambda spec: rules.spec(tuple(spec)),
    nn.get_partition_spec(boxed),
    is_leaf=lambda one: isinstance(one, PartitionSpec),
  )
  return quantize.specs(params, found)


def place(
  decoder: decoder_lib.Decoder, params: dict[str, Any], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Params on a mesh, each array in its parts.

  Raises ConfigError where the mesh does not divide the model.
  """
  config = decoder.config
  sizes = mesh_lib.ParallelConfig(**dict(mesh.shape))
  mesh_lib.check(
    sizes,
    {
      "fsdp": {"model.embed_dim": config.embed_dim},
      "tensor": {
        "model.num_kv_heads": config.num_kv_heads,
        "model.mlp_dim": config.mlp_dim,
        "model.vocab_size": config.vocab_size,
      },
    },
  )
  return jax.device_put(params, rules.shardings(mesh, specs(decoder, params)))


def kernel(name: str, mesh: jax.sharding.Mesh | None) -> str:
  """The paged kernel to resolve: of several devices gather alone can."""
  if mesh is None or mesh.size == 1 or name == "gather":
    return name
  if name != paged.AUTO:
    raise errors.ConfigError(
      f"decoding.attention={name!r} is one device's; use gather on a mesh of"
      f" {mesh.size}."
    )
  return "gather"


def pool_sharding(
  pool_kernel: str, mesh: jax.sharding.Mesh | None
) -> NamedSharding | None:
  """Of each array of a pool: its kv heads over the tensor axis."""
  if mesh is None:
    return None
  axis = paged.KV_HEADS_AXIS[pool_kernel]
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, "tensor"))
