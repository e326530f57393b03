"""Hugging Face folders: there and back bitwise, and refusals that explain."""

import dataclasses
import json
import os
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llama_jax import errors, text
from llama_jax.checkpoint import gguf, hugging_face, names, weights
from llama_jax.model import config as config_lib

GOLDEN = pathlib.Path(__file__).parent / "golden"

GROUPED = config_lib.LlamaConfig(
  vocab_size=40,
  embed_dim=24,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_dim=32,
  norm_eps=1e-5,
  rope_theta=1e4,
  rope_scaling=None,
  context_length=128,
  tied_embeddings=False,
)
CONFIGS = {
  "grouped": GROUPED,
  "all heads": dataclasses.replace(GROUPED, num_kv_heads=4),
  "one kv head": dataclasses.replace(GROUPED, num_kv_heads=1),
  "tied": dataclasses.replace(GROUPED, tied_embeddings=True),
  "free head_dim": dataclasses.replace(GROUPED, head_dim=16),
  "llama 3.2": dataclasses.replace(
    GROUPED,
    rope_theta=5e5,
    rope_scaling=config_lib.RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
    context_length=131072,
  ),
  "linear": dataclasses.replace(
    GROUPED,
    rope_scaling=config_lib.RopeScaling("linear", 4.0, None, None, None),
  ),
}


class Tokenizer:
  """As much of a tokenizer as write() uses."""

  vocab_size = 40


def random_params(config, dtype=np.float32):
  rng = np.random.default_rng(0)
  return names.nest(
    {
      row.path: rng.normal(size=names.our_shape(config, row)).astype(dtype)
      for row in names.rows(config)
    }
  )


def assert_bitwise(a, b):
  a, b = names.flatten(a), names.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    assert a[path].dtype == b[path].dtype
    assert a[path].tobytes() == b[path].tobytes(), path


@pytest.fixture
def folder(tmp_path):
  """A sound folder, to be spoilt."""
  path = tmp_path / "model"
  hugging_face.write(path, GROUPED, random_params(GROUPED), None)
  return path


def edit(folder, **fields):
  """Replaces keys of config.json; a value of ... removes the key."""
  path = folder / "config.json"
  config = json.loads(path.read_text()) | fields
  config = {k: v for k, v in config.items() if v is not ...}
  path.write_text(json.dumps(config))


def shard(folder):
  """Makes a folder's weights several files with an index."""
  config, params, _ = hugging_face.read(folder)
  shutil.rmtree(folder)
  hugging_face.write(folder, config, params, None, shard_bytes=8000)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 5000, 1])
def test_there_and_back_is_bitwise(name, dtype, shard_bytes, tmp_path):
  config = CONFIGS[name]
  params = random_params(config, dtype)
  hugging_face.write(
    tmp_path / "m", config, params, None, shard_bytes=shard_bytes
  )
  found, back, tokenizer = hugging_face.read(tmp_path / "m")
  assert found == config
  assert tokenizer is None
  assert_bitwise(back, params)

  files = sorted((tmp_path / "m").glob("*.safetensors"))
  if shard_bytes == 10**9:
    assert [file.name for file in files] == ["model.safetensors"]
  else:
    index = json.loads((tmp_path / "m" / hugging_face.INDEX).read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    leaves = names.flatten(params).values()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in leaves)
    if shard_bytes == 1:
      assert len(files) == len(index["weight_map"])


@pytest.mark.parametrize("name", ["grouped", "stretched"])
def test_what_transformers_wrote_comes_back(name, tmp_path):
  config, params, _ = hugging_face.read(GOLDEN / name)
  hugging_face.write(tmp_path / "m", config, params, None)
  theirs = safetensors.numpy.load_file(GOLDEN / name / "model.safetensors")
  ours = safetensors.numpy.load_file(tmp_path / "m" / "model.safetensors")
  assert theirs.keys() == ours.keys()
  for key, value in theirs.items():
    np.testing.assert_array_equal(ours[key], value)
  before = json.loads((GOLDEN / name / "config.json").read_text())
  after = json.loads((tmp_path / "m" / "config.json").read_text())
  for key in set(before) & set(after):
    assert after[key] == before[key], key


ROPE = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
LLAMA31 = config_lib.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
LINEAR = config_lib.RopeScaling("linear", 4.0, None, None, None)


@pytest.mark.parametrize(
  ("fields", "theta", "scaling"),
  [
    # Llama 1, 2023: no rope_theta at all.
    ({"rope_theta": ..., "rope_scaling": ...}, 1e4, None),
    ({"rope_theta": 1000000, "rope_scaling": None}, 1e6, None),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5, None),
    (
      {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **ROPE}},
      5e5,
      LLAMA31,
    ),
    (
      {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **ROPE}},
      5e5,
      LLAMA31,
    ),
    # From transformers 4.31 on, and 4.43.
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 1e4, LINEAR),
    ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, 1e4, LINEAR),
    # transformers 5.
    (
      {
        "rope_theta": ...,
        "rope_scaling": ...,
        "rope_parameters": {
          "rope_type": "linear",
          "rope_theta": 5e5,
          "factor": 4.0,
        },
      },
      5e5,
      LINEAR,
    ),
    (
      {
        "rope_theta": ...,
        "rope_scaling": ...,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
      },
      5e5,
      None,
    ),
    (
      {
        "rope_theta": ...,
        "rope_scaling": ...,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **ROPE},
      },
      5e5,
      LLAMA31,
    ),
  ],
)
def test_rope_of_every_era(fields, theta, scaling, folder):
  edit(folder, **({"rope_parameters": ...} | fields))
  config = hugging_face.read_config(folder)
  assert config.rope_theta == theta
  assert config.rope_scaling == scaling


def test_absent_fields_of_older_versions(folder, tmp_path):
  all_heads = dataclasses.replace(GROUPED, num_kv_heads=4)
  params = random_params(all_heads)
  hugging_face.write(tmp_path / "old", all_heads, params, None)
  old = ("head_dim", "num_key_value_heads", "tie_word_embeddings")
  edit(tmp_path / "old", **dict.fromkeys((*old, "attention_bias"), ...))
  edit(tmp_path / "old", max_position_embeddings=..., max_sequence_length=128)
  assert hugging_face.read(tmp_path / "old")[0] == all_heads


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    ({"model_type": "qwen2"}, "model_type='qwen2'"),
    ({"architectures": ..., "model_type": ...}, "no model of transformers"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"type": "linear"}}, "rope factor=None"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "contradicts itself"),
    ({"rope_scaling": {"type": ["linear"]}}, r"\['linear'\].*'llama3'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
    ({"rope_scaling": {"rope_type": "dynamic"}}, "'dynamic'"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "rope factor=None"),
    ({"rope_scaling": {"rope_type": "llama3", **ROPE}}, "contradicts itself"),
    ({"rope_scaling": [8]}, r"rope_scaling=\[8\]"),
    ({"rope_theta": 5e5}, "contradicts itself"),
    ({"rope_theta": "1e4"}, "rope_theta='1e4'"),
    ({"rope_theta": 10**400}, "finite"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"hidden_size": ...}, "lacks hidden_size"),
    ({"hidden_size": 25}, r"\[40, 24\] but model.embed_dim=25"),
    ({"hidden_size": "24"}, "hidden_size='24'"),
    ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ({"num_attention_heads": True}, "num_attention_heads=True"),
    ({"num_key_value_heads": 3}, "num_kv_heads=3"),
    ({"head_dim": 8}, r"q_proj.* model.num_heads=4 x model.head_dim=8"),
    ({"num_hidden_layers": 10**9}, r"layers\.2\..*num_layers=1000000000"),
    ({"num_hidden_layers": 1}, "beyond model.num_layers=1"),
    ({"rms_norm_eps": 0}, "norm_eps"),
    ({"tie_word_embeddings": True}, "declared tied"),
  ],
)
def test_a_config_that_is_no_llama_or_not_of_these_weights(
  fields, message, folder
):
  edit(folder, **fields)
  with pytest.raises(errors.BadFileError, match=message):
    hugging_face.read(folder)


def test_biases_are_refused(folder):
  file = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(24, np.float32)
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(errors.BadFileError, match="not a Llama"):
    hugging_face.read(folder)


def test_other_dtypes_are_refused(folder):
  file = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(errors.BadFileError, match=r"norm.weight is I8"):
    hugging_face.read(folder)


@pytest.mark.parametrize(
  "name", ["../out.safetensors", "/out.safetensors", "a/b.safetensors", 3, ".."]
)
def test_an_index_leads_nowhere_else(name, folder):
  shard(folder)
  index = json.loads((folder / hugging_face.INDEX).read_text())
  index["weight_map"]["model.norm.weight"] = name
  (folder / hugging_face.INDEX).write_text(json.dumps(index))
  (first, *_) = folder.glob("*.safetensors")
  shutil.copy(first, folder.parent / "out.safetensors")
  with pytest.raises(errors.BadFileError, match=str(name)):
    hugging_face.read(folder)


def test_links_stay_in_the_folder_or_its_cache(folder):
  weights = folder / "model.safetensors"
  weights.rename(folder.parent / "elsewhere")
  weights.symlink_to("../elsewhere")
  with pytest.raises(errors.BadFileError, match="outside the folder"):
    hugging_face.read(folder)

  cache = folder.parent / "cache"
  (cache / "snapshots").mkdir(parents=True)
  (cache / "blobs").mkdir()
  (folder.parent / "elsewhere").rename(cache / "blobs" / "0a1b")
  snapshot = folder.rename(cache / "snapshots" / "c0ffee")
  (snapshot / "model.safetensors").unlink()
  (snapshot / "model.safetensors").symlink_to("../../blobs/0a1b")
  assert hugging_face.read(snapshot)[0] == GROUPED


def test_shards_that_disagree(folder):
  shard(folder)
  index = json.loads((folder / hugging_face.INDEX).read_text())
  files = sorted(set(index["weight_map"].values()))
  index["weight_map"]["model.embed_tokens.weight"] = files[-1]
  (folder / hugging_face.INDEX).write_text(json.dumps(index))
  with pytest.raises(errors.BadFileError, match=r"lacks .*embed_tokens"):
    hugging_face.read(folder)

  shard_copy = safetensors.numpy.load_file(folder / files[0])
  shard_copy |= safetensors.numpy.load_file(folder / files[-1])
  safetensors.numpy.save_file(shard_copy, folder / files[-1])
  with pytest.raises(errors.BadFileError, match="another file"):
    hugging_face.read(folder)
  (folder / files[-1]).unlink()
  with pytest.raises(errors.BadFileError, match=files[-1]):
    hugging_face.read(folder)


def test_weights_cut_off_anywhere(folder):
  file = folder / "model.safetensors"
  whole = file.read_bytes()
  for size in (*range(0, 3000, 61), *range(3000, len(whole), 1999)):
    file.write_bytes(whole[:size])
    with pytest.raises(errors.BadFileError, match=rf"\({size} bytes\)"):
      hugging_face.read(folder)
  file.write_bytes(whole[:-5])
  with pytest.raises(errors.BadFileError, match=f"asks for {len(whole)} bytes"):
    hugging_face.read(folder)


@pytest.mark.parametrize(
  "name", ["config.json", "model.safetensors", "model.safetensors.index.json"]
)
def test_mutants_give_one_kind_of_error(name, folder):
  """A mutant may be sound: a key that nobody reads, a value that fits."""
  if name == hugging_face.INDEX:
    shard(folder)
  file = folder / name
  whole = file.read_bytes()
  header = len(whole)
  if name == "model.safetensors":
    header = 8 + int.from_bytes(whole[:8], "little")
  rng = np.random.default_rng(2)
  refused = 0
  for _ in range(150):
    mutant = bytearray(whole)
    for _ in range(rng.integers(1, 5)):
      where = int(rng.integers(header))
      kind = rng.integers(3)
      if kind == 0:
        mutant[where] ^= 1 << rng.integers(8)
      elif kind == 1:
        mutant[where : where + 4] = rng.bytes(4)
      else:
        digits = b'0123456789{}[]",:.-e/\\'
        mutant[where] = digits[rng.integers(len(digits))]
    file.write_bytes(mutant)
    try:
      hugging_face.read(folder)
    except errors.BadFileError:
      refused += 1
  assert refused > 75


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"[]",
    b"null",
    b"[" * 200_000,
    b'{"a": 1, "a": 2}',
    b"\xff\xfe",
    b'{"hidden_size": ' + b"9" * 5000 + b"}",
    b" " * (17 << 20),
  ],
)
def test_hostile_json(content, folder):
  (folder / "config.json").write_bytes(content)
  with pytest.raises(errors.BadFileError, match=r"config\.json"):
    hugging_face.read(folder)


def test_what_is_no_folder(folder, tmp_path):
  file = tmp_path / "file"
  file.write_text("x")
  (tmp_path / "empty").mkdir()
  for path in (tmp_path / "absent", file, tmp_path / "empty"):
    with pytest.raises(errors.BadFileError):
      hugging_face.read(path)
  (folder / "model.safetensors").unlink()
  with pytest.raises(errors.BadFileError, match="only safetensors"):
    hugging_face.read(folder)
  os.mkfifo(folder / "model.safetensors")
  with pytest.raises(errors.BadFileError, match="not a file"):
    hugging_face.read(folder)


def test_tokenizer_and_stop_ids_travel(tmp_path):
  params = random_params(GROUPED)
  words = ["<unk>", "<s>", "</s>", *"abcd", "<|im_end|>"]
  tokenizer = text.from_gguf_metadata(
    {
      "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.tokens": words,
      "tokenizer.ggml.token_type": [3 if "<" in w else 1 for w in words],
      "tokenizer.ggml.merges": [],
      "tokenizer.ggml.bos_token_id": 1,
      "tokenizer.ggml.eos_token_id": 2,
    }
  )
  hugging_face.write(tmp_path / "m", GROUPED, params, tokenizer)
  for name in ("config.json", "generation_config.json"):
    fields = json.loads((tmp_path / "m" / name).read_text())
    assert fields["bos_token_id"] == 1
    assert fields["eos_token_id"] == [2, 7]
  assert (tmp_path / "m" / "tokenizer.json").exists()


def test_a_taken_destination_is_left_alone(tmp_path):
  params = random_params(GROUPED)
  (tmp_path / "m").mkdir()
  hugging_face.write(tmp_path / "m", GROUPED, params, None)
  before = (tmp_path / "m" / "model.safetensors").stat()
  with pytest.raises(errors.UserError, match="not an empty folder"):
    hugging_face.write(tmp_path / "m", GROUPED, params, None)
  assert (tmp_path / "m" / "model.safetensors").stat() == before
  (tmp_path / "f").write_text("x")
  with pytest.raises(errors.UserError, match="not an empty folder"):
    hugging_face.write(tmp_path / "f", GROUPED, params, None)


def test_a_write_that_fails_leaves_nothing(tmp_path):
  class Failing(Tokenizer):
    def save(self, folder):
      raise OSError("disk full")

  class Large(Tokenizer):
    vocab_size = 41

  params = random_params(GROUPED)
  for tokenizer, message in ((Failing(), "disk full"), (Large(), "41 ids")):
    with pytest.raises(errors.UserError, match=message):
      hugging_face.write(tmp_path / "m", GROUPED, params, tokenizer)
    assert not list(tmp_path.iterdir())
  del params["head"]
  with pytest.raises(errors.BadFileError, match="lack head/kernel"):
    hugging_face.write(tmp_path / "m", GROUPED, params, None)
  assert not list(tmp_path.iterdir())


def test_smollm2_from_gguf_to_a_folder(smollm2, tmp_path):
  """One tensor read by safetensors alone equals the GGUF's, rows permuted."""
  config, source = gguf.open_tensors(smollm2)
  params = weights.read_params(config, source)
  tokenizer = gguf.read_tokenizer(smollm2)
  hugging_face.write(tmp_path / "m", config, params, tokenizer)
  assert hugging_face.read_config(tmp_path / "m") == config
  name = "model.layers.7.self_attn.q_proj.weight"
  with safetensors.safe_open(
    tmp_path / "m" / "model.safetensors", framework="np"
  ) as file:
    found = file.get_tensor(name)
  theirs = source.get("blk.7.attn_q.weight").reshape(9, 32, 2, 576)
  np.testing.assert_array_equal(
    found.reshape(9, 2, 32, 576)[:, 0, 5], theirs[:, 5, 0]
  )
  np.testing.assert_array_equal(
    found.reshape(9, 2, 32, 576)[:, 1, 5], theirs[:, 5, 1]
  )
  again = hugging_face.read_tokenizer(tmp_path / "m")
  assert again.encode("def f(x): # 17") == tokenizer.encode("def f(x): # 17")
  assert again.stop_ids == tokenizer.stop_ids
