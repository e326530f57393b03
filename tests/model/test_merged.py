"""Merged projections: the same forward from fewer and larger matrices."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import llama as llama_lib
from llama_jax.decoding import placement
from llama_jax.kernels import int8
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import quantize, sizes
from llama_jax.model import unrolled as unrolled_lib
from llama_jax.parallel import mesh as mesh_lib

# Another number of heads, of kv heads and of columns each.
NANO = dataclasses.replace(sizes.get("nano"), head_dim=16)
DECODER = decoder_lib.Decoder(NANO, scan=False)
IDS = np.random.default_rng(0).integers(512, size=(2, 24), dtype=np.int32)


@pytest.fixture(scope="module")
def stacked(random_params):
  return random_params(NANO)


@pytest.fixture(scope="module")
def plain(stacked):
  return jax.tree.map(jnp.asarray, unrolled_lib.unstack(stacked))


@jax.jit
def forward(params):
  positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
  segments = jnp.ones_like(positions)
  return DECODER.apply({"params": params}, IDS, positions, segments)[0]


def test_matrices_of_the_same_input_are_one(plain):
  merged = unrolled_lib.merge(plain)
  D, F, H = 64, 192, 16
  attention, mlp = (merged["layers_1"][name] for name in ("attention", "mlp"))
  assert set(attention) == {"qkv", "out"} and set(mlp) == {"gate_up", "down"}
  assert attention["qkv"]["kernel"].shape == ((4 + 2 * 2) * H, D)
  assert mlp["gate_up"]["kernel"].shape == (2 * F, D)
  count = [sum(x.size for x in jax.tree.leaves(p)) for p in (plain, merged)]
  assert count[0] == count[1]
  # What was given is as it was.
  assert set(plain["layers_1"]["mlp"]) == {"gate", "up", "down"}


def test_the_forward_is_the_same(plain):
  """But for the order of sums: of 64 and 192 terms, in float32."""
  got, want = forward(unrolled_lib.merge(plain)), forward(plain)
  np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.std(want)))
  # A head or a gate taken for another would show.
  swapped = unrolled_lib.merge(plain)
  kernel = swapped["layers_0"]["mlp"]["gate_up"]["kernel"]
  swapped["layers_0"]["mlp"]["gate_up"]["kernel"] = jnp.roll(kernel, 192, 0)
  assert jnp.abs(forward(swapped) - want).max() > 0.01 * jnp.std(want)


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_quantized_rows_are_the_same_bit_for_bit(plain, kind):
  """In either order, since every row has scales of its own."""
  plain = {"layers_0": plain["layers_0"]}
  apart = quantize.quantize(plain, kind)
  together = quantize.quantize(unrolled_lib.merge(plain), kind)
  jax.tree.map(
    np.testing.assert_array_equal, together, unrolled_lib.merge(apart)
  )
  qkv = int8.dequantize(together["layers_0"]["attention"]["qkv"]["kernel"])
  key = int8.dequantize(apart["layers_0"]["attention"]["key"]["kernel"])
  np.testing.assert_array_equal(qkv[64 : 64 + 32], key)


def test_llama_merges_what_decodes(stacked, plain):
  want = forward(plain)

  def unrolled(**fields):
    made = llama_lib.Llama(NANO, stacked, None, **fields)
    return made, made.unrolled[1]

  _, params = unrolled()
  assert set(params["layers_0"]["mlp"]) == {"gate_up", "down"}
  assert set(params["layers_0"]["attention"]) == {"qkv", "out"}
  np.testing.assert_allclose(forward(params), want, atol=1e-5)
  llama, params = unrolled(quantize="int8")
  line = llama.describe_quantized()
  assert "int8" in line and "%" in line


def test_on_a_mesh_nothing_is_merged(stacked, plain):
  mesh = mesh_lib.make(
    mesh_lib.ParallelConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2]
  )
  llama = llama_lib.Llama(NANO, stacked, None, mesh=mesh)
  assert set(llama.unrolled[1]["layers_0"]["mlp"]) == {"gate", "up", "down"}
  with pytest.raises(ValueError, match="qkv"):
    placement.place(DECODER, unrolled_lib.merge(plain), mesh)


def test_what_was_taken_is_freed_on_the_way(stacked, plain):
  """Never more than the matrices at hand are held twice."""
  own = jax.tree.map(jnp.array, stacked)
  layers = own["layers"]
  held = {
    module: [weakref.ref(leaf) for leaf in jax.tree.leaves(layers[module])]
    for module in ("attention", "mlp")
  }

  def alive(module):
    gc.collect()
    return sum(ref() is not None for ref in held[module])

  whole, done = {}, []
  for part in unrolled_lib.unstacked(own, merged=True, free=True):
    unrolled_lib.join(whole, part)
    (module,) = part.get("layers_0", {"": None})
    if module in held and module not in done:
      assert not any(map(alive, done)) and alive(module)
      done.append(module)
  assert own == {} and len(done) == 2 and not any(map(alive, done))
  want = unrolled_lib.merge(plain)
  jax.tree.map(np.testing.assert_array_equal, whole, want)
  # Without free all is as it was.
  unrolled_lib.unstack(stacked)
  assert len(jax.tree.leaves(stacked["layers"])) == 9
