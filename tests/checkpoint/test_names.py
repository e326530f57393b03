"""The table of names is a bijection, and says what does not fit it."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.checkpoint import names, weights
from llama_jax.model import config as config_lib

BASE = config_lib.LlamaConfig(
  vocab_size=11,
  embed_dim=12,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_dim=10,
  norm_eps=1e-5,
  rope_theta=1e4,
  rope_scaling=None,
  context_length=64,
  tied_embeddings=False,
)


def random_source(config, scheme="hf", dtype=np.float32, file="m"):
  rng = np.random.default_rng(0)
  arrays = {
    place.name: rng.normal(size=place.shape).astype(dtype)
    for place in names.places(config, scheme)
  }
  return source_of(arrays, scheme, file)


def source_of(arrays, scheme="hf", file="m"):
  tensors = {
    name: weights.Tensor(a.shape, a.dtype, str(a.dtype))
    for name, a in arrays.items()
  }
  held = dict(arrays)
  return weights.Source(
    file, scheme, tensors, lambda name, start, stop: held[name][start:stop]
  )


def all_of(source):
  return {name: source.get(name) for name in source.tensors}


def changed(source, **arrays):
  """The source with tensors replaced, or with None, removed."""
  all_arrays = {name: source.get(name) for name in source.tensors}
  all_arrays.update({k.replace("__", "."): v for k, v in arrays.items()})
  kept = {k: v for k, v in all_arrays.items() if v is not None}
  return source_of(kept, source.scheme)


@pytest.mark.parametrize("scheme", names.SCHEMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_is_bitwise(scheme, dtype, tied):
  config = dataclasses.replace(BASE, tied_embeddings=tied)
  source = random_source(config, scheme, dtype)
  params = weights.read_params(config, source)
  weights.check_params(config, params)
  back = all_of(weights.from_params(config, params, scheme))
  assert list(back) == list(source.tensors)
  for name, value in back.items():
    assert value.dtype == dtype
    assert value.flags.c_contiguous
    assert value.tobytes() == source.get(name).tobytes(), name


def test_kernels_are_transposed_and_stacked():
  source = random_source(BASE)
  params = weights.read_params(BASE, source)
  np.testing.assert_array_equal(
    params["layers"]["mlp"]["down"]["kernel"][2],
    source.get("model.layers.2.mlp.down_proj.weight").T,
  )
  np.testing.assert_array_equal(
    params["head"]["kernel"], source.get("lm_head.weight").T
  )


def test_params_may_be_jax_arrays():
  source = random_source(BASE, dtype=ml_dtypes.bfloat16)
  params = jax.tree.map(jnp.asarray, weights.read_params(BASE, source))
  for name, value in all_of(weights.from_params(BASE, params, "hf")).items():
    np.testing.assert_array_equal(value, source.get(name))


def test_rope_layouts_by_hand():
  """Two heads of width 6: pairs (0,3) (1,4) (2,5) against (0,1) (2,3) (4,5)."""
  halves = np.arange(12)[:, None]
  interleaved = names.change_rope_layout(halves, 6, to="interleaved")
  assert interleaved[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
  back = names.change_rope_layout(interleaved, 6, to="halves")
  np.testing.assert_array_equal(back, halves)


def test_only_query_and_key_change_layout():
  params = weights.read_params(BASE, random_source(BASE))
  hf = list(all_of(weights.from_params(BASE, params, "hf")).items())
  gguf = list(all_of(weights.from_params(BASE, params, "gguf")).items())
  moved = {
    name.split(".", 2)[2]
    for (name, a), (_, b) in zip(gguf, hf, strict=True)
    if not np.array_equal(a, b)
  }
  assert moved == {"attn_q.weight", "attn_k.weight"}


def test_layers_of_unlike_dtype_become_float32():
  source = changed(
    random_source(BASE, dtype=np.float16),
    model__layers__1__mlp__up_proj__weight=np.ones((10, 12), np.float32) / 3,
  )
  params = weights.read_params(BASE, source)
  up = params["layers"]["mlp"]["up"]["kernel"]
  assert up.dtype == np.float32
  assert params["layers"]["mlp"]["gate"]["kernel"].dtype == np.float16
  np.testing.assert_array_equal(
    up[0], source.get("model.layers.0.mlp.up_proj.weight").T
  )
  assert up[1, 0, 0] == np.float32(1) / 3


REFUSED = {
  "missing layer": (
    {"model__layers__2__mlp__up_proj__weight": None},
    r"lacks .*layers\.2\.mlp\.up_proj.* \[10, 12\].*num_layers=3",
  ),
  "missing head": (
    {"lm_head__weight": None},
    r"lacks .*lm_head.*tied_embeddings=False",
  ),
  "one layer more": (
    {"model__layers__3__mlp__up_proj__weight": np.ones((10, 12))},
    r"layers\.3\.mlp.*beyond model\.num_layers=3",
  ),
  "unknown": (
    {"model__layers__0__self_attn__q_norm__weight": np.ones(6)},
    r"q_norm.* no place in a Llama",
  ),
  "bias": (
    {"model__layers__0__self_attn__q_proj__bias": np.ones(24)},
    r"not a Llama.*q_proj\.bias",
  ),
  "kv heads": (
    {"model__layers__0__self_attn__k_proj__weight": np.ones((24, 12))},
    r"k_proj\.weight is \[24, 12\] but model\.num_kv_heads=2 x"
    r" model\.head_dim=6 makes it \[12, 12\]",
  ),
  "vocabulary": (
    {"model__embed_tokens__weight": np.ones((12, 12))},
    r"\[12, 12\] but model\.vocab_size=11 makes it \[11, 12\]",
  ),
  "dimensions": (
    {"model__norm__weight": np.ones((12, 1))},
    r"\[12, 1\] but model\.embed_dim=12 makes it \[12\]",
  ),
  "dtype": ({"model__norm__weight": np.ones(12, np.int8)}, "int8.*float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
  arrays, message = REFUSED[case]
  source = changed(random_source(BASE), **arrays)
  with pytest.raises(errors.BadFileError, match=message):
    weights.read_params(BASE, source)


def test_biases_are_the_reason_even_if_a_tensor_is_missing():
  source = changed(
    random_source(BASE),
    model__layers__0__input_layernorm__weight=None,
    model__layers__0__input_layernorm__bias=np.ones(12),
  )
  with pytest.raises(errors.BadFileError, match="not a Llama"):
    weights.check(BASE, source)


def test_a_forged_number_of_layers_costs_nothing():
  config = dataclasses.replace(BASE, num_layers=10**12)
  with pytest.raises(errors.BadFileError, match=r"layers\.3\."):
    weights.check(config, random_source(BASE))


def test_old_inverse_frequencies_are_left_out():
  source = changed(
    random_source(BASE),
    model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(3),
  )
  weights.check_params(BASE, weights.read_params(BASE, source))
  assert weights.ignored(source, BASE) == {
    "model.layers.0.self_attn.rotary_emb.inv_freq": "recomputed from rope_theta"
  }


def test_a_tied_head_must_equal_the_embedding():
  tied = dataclasses.replace(BASE, tied_embeddings=True)
  source = random_source(tied)
  embedding = source.get("model.embed_tokens.weight")
  params = weights.read_params(tied, changed(source, lm_head__weight=embedding))
  assert "head" not in params
  with pytest.raises(errors.BadFileError, match="declared tied"):
    weights.read_params(tied, changed(source, lm_head__weight=embedding + 1))


def test_params_of_another_configuration_are_refused():
  params = weights.read_params(BASE, random_source(BASE))
  wrong = dataclasses.replace(BASE, mlp_dim=9)
  tied = dataclasses.replace(BASE, tied_embeddings=True)
  for config, message in (
    (wrong, r"mlp/gate/kernel is \[3, 12, 10\]"),
    (tied, "head/kernel.*no place"),
  ):
    with pytest.raises(errors.BadFileError, match=message):
      list(all_of(weights.from_params(config, params, "hf")).items())
  del params["final_norm"]
  with pytest.raises(errors.BadFileError, match="lack final_norm/scale"):
    weights.check_params(BASE, params)
