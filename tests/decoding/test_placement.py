"""A model on a mesh of simulated devices against the same on one."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from llama_jax import errors
from llama_jax import llama as llama_lib
from llama_jax.decoding import placement
from llama_jax.model import sizes
from llama_jax.model import unrolled as unrolled_lib
from llama_jax.parallel import mesh as mesh_lib


@pytest.fixture(scope="module")
def llamas(nano):
  """quantize -> on one device, and on two parts of two."""
  sizes_ = mesh_lib.ParallelConfig(data=1, fsdp=2, tensor=2)
  mesh = mesh_lib.make(sizes_, jax.devices()[:4])

  @functools.cache
  def make(quantize=""):
    return [
      llama_lib.load(f"hf:{nano}", quantize=quantize, mesh=one)
      for one in (None, mesh)
    ]

  return make


def test_the_same_words_and_logits(llamas):
  one, many = llamas()
  prompts = ["def read_lines(path):", "import", "x = [1, 2, 3]\n\n"]
  want = one.generate(prompts, max_new_tokens=12)
  assert many.generate(prompts, max_new_tokens=12) == want
  # It is not left set for others.
  assert jax.sharding.get_abstract_mesh().empty
  ids = np.arange(24, dtype=np.int32).reshape(1, -1)
  np.testing.assert_allclose(many.logits(ids), one.logits(ids), atol=1e-5)


# int4's groups of 32 are the smallest parts that a matrix can be split into.
@pytest.mark.parametrize("quantize", ["", "int4"])
def test_weights_lie_in_parts_quantized_or_not(llamas, quantize):
  one, many = (llama.unrolled[1] for llama in llamas(quantize))
  # One device's are merged; a mesh's are not, since parts of heads are split.
  together = unrolled_lib.merge(jax.device_get(many))
  if not quantize:
    together = unrolled_lib.cut(together)
  jax.tree.map(np.testing.assert_array_equal, together, one)
  for parts in jax.tree.leaves(many):
    if parts.ndim == 2:
      assert all(
        s.data.size * 4 == parts.size for s in parts.addressable_shards
      )


def test_one_device_needs_no_mesh():
  assert placement.make_mesh(1, 1, 1) is None
  assert placement.make_mesh(1, 1, -1).shape["tensor"] == 8


@pytest.mark.parametrize(
  "axes, changes, quantize, said",
  [
    ((2, 1, 4), {}, "", "parallel.tensor=4 does not divide model.num_kv_heads"),
    ((1, 8, 1), {"embed_dim": 36}, "", "parallel.fsdp=8 .*embed_dim=36; use"),
    ((4, 1, 2), {"vocab_size": 511}, "", "tensor=2 .*model.vocab_size=511"),
    ((2, 4, 1), {}, "int4", r"fsdp=4 .*model.embed_dim / 32 of int4=2; .*1, 2"),
    ((4, 1, 2), {"mlp_dim": 96}, "int4", "tensor=2 .*mlp_dim / 32 of int4=3"),
  ],
)
def test_a_mesh_that_does_not_divide_the_model(axes, changes, quantize, said):
  config = dataclasses.replace(sizes.get("nano"), **changes)
  mesh = placement.make_mesh(*axes)
  with pytest.raises(errors.ConfigError, match=said):
    placement.check(config, mesh, quantize)
  if quantize:
    placement.check(config, mesh)
