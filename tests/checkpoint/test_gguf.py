"""GGUF files: right values from sound ones, one clear error from the rest."""

import dataclasses
import pathlib

import gguf as gguf_package
import ml_dtypes
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.checkpoint import gguf, hugging_face, names, weights
from llama_jax.model import config as config_lib

GOLDEN = pathlib.Path(__file__).parent / "golden"
TYPES = gguf_package.GGMLQuantizationType

BASE = config_lib.LlamaConfig(
  vocab_size=40,
  embed_dim=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=64,
  norm_eps=1e-5,
  rope_theta=1e4,
  rope_scaling=None,
  context_length=128,
  tied_embeddings=False,
)


def tensors_of(config, seed=0):
  rng = np.random.default_rng(seed)
  return {
    place.name: rng.normal(size=place.shape).astype(np.float32)
    for place in names.places(config, "gguf")
  }


def write(path, config, tensors, kind="F32", metadata=(), extra=()):
  """A GGUF by the package's own writer.

  kind: the type of matrices; metadata: keys of llama.* to replace, or with
  None leave out; extra: tensors added as they are.
  """
  writer = gguf_package.GGUFWriter(path, "llama")
  fields = {
    "block_count": config.num_layers,
    "context_length": config.context_length,
    "embedding_length": config.embed_dim,
    "feed_forward_length": config.mlp_dim,
    "attention.head_count": config.num_heads,
    "attention.head_count_kv": config.num_kv_heads,
    "attention.key_length": config.head_dim,
    "attention.value_length": config.head_dim,
    "attention.layer_norm_rms_epsilon": config.norm_eps,
    "rope.freq_base": config.rope_theta,
    "rope.dimension_count": config.head_dim,
    "vocab_size": config.vocab_size,
  } | dict(metadata)
  for key, value in fields.items():
    key = f"llama.{key}"
    if isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif isinstance(value, str):
      writer.add_string(key, value)
    elif isinstance(value, list):
      writer.add_array(key, value)
  for name, value in tensors.items():
    if value.ndim == 1 or kind == "F32":
      writer.add_tensor(name, value)
    elif kind == "F16":
      writer.add_tensor(name, value.astype(np.float16))
    else:
      raw = gguf_package.quants.quantize(value, TYPES[kind])
      writer.add_tensor(name, raw, raw_dtype=TYPES[kind])
  for name, value in dict(extra).items():
    writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture
def sound(tmp_path):
  """A small whole file, as bytes, and a path to put variants of it."""
  config = dataclasses.replace(BASE, num_layers=1)
  path = write(tmp_path / "sound.gguf", config, tensors_of(config))
  return path.read_bytes(), tmp_path / "mutant.gguf"


@pytest.mark.parametrize("name", ["grouped", "stretched"])
def test_equals_the_hugging_face_folder(name, tmp_path):
  """A model of transformers, through a GGUF in llama.cpp's layout."""
  config, params, _ = hugging_face.read(GOLDEN / name)
  plain = dataclasses.replace(config, rope_scaling=None)
  source = weights.from_params(config, params, "gguf")
  tensors = {name: source.get(name) for name in source.tensors}
  path = write(tmp_path / "m.gguf", config, tensors)
  read_config, read_params, tokenizer = gguf.read(path)
  assert read_config == plain
  assert tokenizer is None
  for key, value in names.flatten(params).items():
    np.testing.assert_array_equal(names.flatten(read_params)[key], value)

  # The permutation of llama.cpp's converter, in its own words.
  heads, width = config.num_heads, config.embed_dim
  query = params["layers"]["attention"]["query"]["kernel"][0].T
  permuted = query.reshape(heads, 2, -1, width).swapaxes(1, 2)
  np.testing.assert_array_equal(
    tensors["blk.0.attn_q.weight"], permuted.reshape(query.shape)
  )


@pytest.mark.parametrize(
  "config",
  [
    BASE,
    dataclasses.replace(BASE, num_kv_heads=4),
    dataclasses.replace(BASE, num_kv_heads=1, tied_embeddings=True),
    dataclasses.replace(BASE, head_dim=16, rope_theta=5e5, norm_eps=1e-6),
  ],
)
def test_configuration_round_trip(config, tmp_path):
  tensors = tensors_of(config)
  path = write(tmp_path / "m.gguf", config, tensors)
  assert gguf.read_config(path) == config
  assert gguf.read(path)[0] == config


def test_missing_keys_mean_what_llama_cpp_takes_them_to_mean(tmp_path):
  config = dataclasses.replace(BASE, num_kv_heads=4)
  absent = dict.fromkeys(
    [
      "attention.head_count_kv",
      "attention.key_length",
      "attention.value_length",
      "rope.freq_base",
      "rope.dimension_count",
      "vocab_size",
    ]
  )
  path = write(tmp_path / "m.gguf", config, tensors_of(config), metadata=absent)
  assert gguf.read_config(path) == config


@pytest.mark.parametrize(
  ("kind", "dtype"),
  [
    ("F32", np.float32),
    ("F16", np.float16),
    ("BF16", ml_dtypes.bfloat16),
    ("Q8_0", np.float32),
    ("Q4_1", np.float32),
  ],
)
def test_dtypes_and_values(kind, dtype, tmp_path):
  config = dataclasses.replace(BASE, head_dim=32)
  tensors = tensors_of(config)
  path = write(tmp_path / "m.gguf", config, tensors, kind=kind)
  params = gguf.read(path)[1]
  up = params["layers"]["mlp"]["up"]["kernel"]
  assert up.dtype == dtype
  assert params["final_norm"]["scale"].dtype == np.float32
  # The package's own reader as the independent truth.
  reader = gguf_package.GGUFReader(path)
  for tensor in reader.tensors:
    if tensor.name == "blk.1.ffn_up.weight":
      expected = gguf_package.quants.dequantize(tensor.data, tensor.tensor_type)
  np.testing.assert_array_equal(up[1].astype(np.float32).T, expected)


def llama3_factors(head_dim, theta, factor):
  """llama.cpp's table for Llama 3.1, in the words of RECIPES.md 1."""
  table = []
  for i in range(head_dim // 2):
    wavelength = 2 * np.pi * theta ** (2 * i / head_dim)
    if wavelength < 8192 / 4:
      table.append(1.0)
    elif wavelength > 8192:
      table.append(factor)
    else:
      s = (8192 / wavelength - 1) / (4 - 1)
      table.append(1 / ((1 - s) / factor + s))
  return np.array(table, np.float32)


@pytest.mark.parametrize(
  ("metadata", "factor"),
  [
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
    # llama.cpp takes a missing type for linear, and knows an older key.
    ({"rope.scaling.factor": 2.5}, 2.5),
    ({"rope.scale_linear": 4.0}, 4.0),
    ({"rope.scale_linear": 4.0, "rope.scaling.factor": 2.0}, 2.0),
    ({"rope.scaling.type": "linear"}, None),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, None),
    ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
  ],
)
def test_linear_scaling(metadata, factor, tmp_path):
  path = write(tmp_path / "m.gguf", BASE, tensors_of(BASE), metadata=metadata)
  scaling = gguf.read_config(path).rope_scaling
  if factor is None:
    assert scaling is None
  else:
    assert scaling == config_lib.RopeScaling("linear", factor, None, None, None)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama31_factors_are_recovered(factor, tmp_path):
  config = dataclasses.replace(
    BASE,
    head_dim=64,
    rope_theta=5e5,
    rope_scaling=config_lib.RopeScaling("llama3", factor, 1.0, 4.0, 8192),
  )
  table = llama3_factors(64, 5e5, factor)
  path = write(
    tmp_path / "m.gguf",
    config,
    tensors_of(config),
    extra={"rope_freqs.weight": table},
  )
  found, source = gguf.open_tensors(path)
  assert found == config
  assert weights.ignored(source, config) == {
    "rope_freqs.weight": "read as model.rope_scaling"
  }


def test_other_factors_are_refused(tmp_path):
  config = dataclasses.replace(BASE, head_dim=64, rope_theta=5e5)
  table = llama3_factors(64, 5e5, 8.0)
  wrong = {
    "moved": np.where(np.arange(32) == 18, table * 1.01, table),
    "nan": table * np.nan,
    "long": np.ones(33, np.float32),
    "other theta": llama3_factors(64, 1e5, 8.0),
  }
  for name, value in wrong.items():
    path = write(
      tmp_path / f"{name}.gguf",
      config,
      tensors_of(config),
      extra={"rope_freqs.weight": value.astype(np.float32)},
    )
    with pytest.raises(errors.BadFileError, match="rope_freqs"):
      gguf.read_config(path)
  path = write(
    tmp_path / "both.gguf",
    config,
    tensors_of(config),
    metadata={"rope.scaling.factor": 4.0},
    extra={"rope_freqs.weight": table},
  )
  with pytest.raises(errors.BadFileError, match="no linear factor beside it"):
    gguf.read_config(path)


@pytest.mark.parametrize(
  ("metadata", "message"),
  [
    ({"expert_count": 8}, "llama.expert_count=8"),
    ({"rope.scaling.type": "yarn"}, "'yarn'"),
    ({"rope.scaling.factor": 0.5}, "model.rope_scaling.factor=0.5"),
    ({"rope.scaling.factor": "4"}, "rope.scaling.factor='4'"),
    ({"rope.dimension_count": 4}, "rope.dimension_count=4"),
    ({"attention.value_length": 4}, "attention.value_length=4"),
    ({"attention.head_count": 3}, "model.num_kv_heads=2"),
    ({"attention.head_count": 0}, "model.num_heads=0"),
    ({"attention.head_count_kv": [2, 1]}, "all layers"),
    ({"block_count": 3}, r"blk\.2\.attn_norm.*num_layers=3"),
    ({"block_count": 2**31}, r"blk\.2\.attn_norm"),
    ({"block_count": 1}, "beyond model.num_layers=1"),
    ({"block_count": None}, "llama.block_count=None"),
    ({"vocab_size": 41}, r"\[40, 32\] but model.vocab_size=41"),
    ({"feed_forward_length": 65}, "model.mlp_dim=65"),
    ({"attention.layer_norm_rms_epsilon": 0.0}, "norm_eps"),
    ({"attention.layer_norm_rms_epsilon": float("inf")}, "finite"),
    ({"rope.freq_base": "x"}, "rope.freq_base='x'"),
  ],
)
def test_metadata_that_is_no_llama(metadata, message, tmp_path):
  path = write(tmp_path / "m.gguf", BASE, tensors_of(BASE), metadata=metadata)
  with pytest.raises(errors.BadFileError, match=message):
    gguf.read(path)


def test_uniform_arrays_are_one_number(tmp_path):
  same = {"attention.head_count_kv": [2, 2]}
  path = write(tmp_path / "m.gguf", BASE, tensors_of(BASE), metadata=same)
  assert gguf.read_config(path) == BASE


def test_another_architecture_is_named(tmp_path):
  writer = gguf_package.GGUFWriter(tmp_path / "q.gguf", "qwen2")
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(errors.BadFileError, match="architecture='qwen2'"):
    gguf.read(tmp_path / "q.gguf")


def test_biases_are_refused(tmp_path):
  path = write(
    tmp_path / "m.gguf",
    BASE,
    tensors_of(BASE),
    extra={"blk.0.attn_q.bias": np.ones(32, np.float32)},
  )
  with pytest.raises(errors.BadFileError, match="not a Llama"):
    gguf.read(path)


def test_a_file_cut_off_anywhere(sound):
  whole, path = sound
  for size in (*range(0, 1400, 23), *range(1400, len(whole), 997)):
    path.write_bytes(whole[:size])
    with pytest.raises(errors.BadFileError, match="mutant"):
      gguf.read(path)


def test_a_cut_in_the_weights_names_both_sizes(sound):
  whole, path = sound
  path.write_bytes(whole[:-100])
  sizes = f"need {len(whole)} bytes, the file has {len(whole) - 100}"
  with pytest.raises(errors.BadFileError, match=sizes):
    gguf.read_config(path)


def test_smollm2(smollm2):
  """The real file is the row of RECIPES.md 1, to the last parameter."""
  config, source = gguf.open_tensors(smollm2)
  assert config == config_lib.LlamaConfig(
    vocab_size=49152,
    embed_dim=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    norm_eps=1e-5,
    rope_theta=1e5,
    rope_scaling=None,
    context_length=8192,
    tied_embeddings=True,
  )
  params = weights.read_params(config, source)
  count = sum(leaf.size for leaf in names.flatten(params).values())
  assert count == 134_515_008
