"""GGUF files of ours: what llama.cpp demands, and nothing lost on the way."""

import dataclasses
import json
import subprocess
import sys

import gguf as gguf_package
import ml_dtypes
import numpy as np
import pytest

from llama_jax import errors
from llama_jax import text as text_lib
from llama_jax.checkpoint import building, gguf, hugging_face, names, weights
from llama_jax.model import config as config_lib
from llama_jax.text import gguf_header

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
LONG = dataclasses.replace(
  BASE, head_dim=64, rope_theta=5e5, context_length=131072
)


def llama3(factor, original=8192, low=1.0, high=4.0):
  return config_lib.RopeScaling("llama3", factor, low, high, original)


def linear(factor):
  return config_lib.RopeScaling("linear", factor, None, None, None)


CONFIGS = {
  "grouped": BASE,
  "all heads": dataclasses.replace(BASE, num_kv_heads=4),
  "one kv head, tied": dataclasses.replace(
    BASE, num_kv_heads=1, tied_embeddings=True
  ),
  "free head_dim": dataclasses.replace(BASE, head_dim=14, norm_eps=1e-6),
  "odd widths": dataclasses.replace(BASE, embed_dim=20, mlp_dim=50),
  "llama 3.1": dataclasses.replace(LONG, rope_scaling=llama3(8.0)),
  "llama 3.2": dataclasses.replace(LONG, rope_scaling=llama3(32.0)),
  "no power of 2": dataclasses.replace(LONG, rope_scaling=llama3(8.1)),
  "other original": dataclasses.replace(LONG, rope_scaling=llama3(4.0, 2048)),
  "linear": dataclasses.replace(BASE, rope_scaling=linear(4.0)),
  "linear 8.1": dataclasses.replace(BASE, rope_scaling=linear(8.1)),
}


class Words:
  """As much of a tokenizer as the writer uses."""

  def __init__(self, vocab_size=40, scores=True):
    self.vocab_size = vocab_size
    self.fields = {
      "tokenizer.ggml.model": "llama",
      "tokenizer.ggml.tokens": [f"w{i}" for i in range(vocab_size)],
      "tokenizer.ggml.token_type": [1] * vocab_size,
      "tokenizer.ggml.bos_token_id": 1,
      "tokenizer.ggml.add_bos_token": True,
      "tokenizer.chat_template": "{{ messages }}",
    }
    if scores:
      self.fields["tokenizer.ggml.scores"] = [0.5] * vocab_size

  def gguf_metadata(self):
    return self.fields


def random_params(config, dtype=np.float32):
  rng = np.random.default_rng(0)
  return names.nest(
    {
      row.path: rng.normal(size=names.our_shape(config, row)).astype(dtype)
      for row in names.rows(config)
    }
  )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_there_and_back(name, dtype, tmp_path):
  """Matrices bitwise; norms as float32, which holds the same values."""
  config = CONFIGS[name]
  params = random_params(config, dtype)
  gguf.write(tmp_path / "m.gguf", config, params, None)
  found, back, tokenizer = gguf.read(tmp_path / "m.gguf")
  assert found == config
  assert tokenizer is None
  back = names.flatten(back)
  for path, value in names.flatten(params).items():
    wanted = np.float32 if path.endswith("scale") else dtype
    assert back[path].dtype == wanted
    assert back[path].tobytes() == value.astype(wanted).tobytes(), path


@pytest.mark.parametrize("block_bytes", [1, 3000, 10**9])
def test_hugging_face_to_gguf_and_back_is_bitwise(block_bytes, tmp_path):
  config = CONFIGS["llama 3.1"]
  hugging_face.write(tmp_path / "hf", config, random_params(config), None)
  _, source = hugging_face.open_tensors(tmp_path / "hf")
  with building.building(tmp_path / "m.gguf") as site:
    gguf.write_into(site, config, source, None, block_bytes=block_bytes)
  found, between = gguf.open_tensors(tmp_path / "m.gguf")
  assert found == config
  with building.building(tmp_path / "back") as site:
    hugging_face.write_into(site, config, between, None)
  for file in ("model.safetensors", "config.json"):
    there, back = (tmp_path / folder / file for folder in ("hf", "back"))
    assert there.read_bytes() == back.read_bytes()


def test_gguf_to_gguf(tmp_path):
  """Factors are computed anew, and quantised weights widen or stay Q8_0."""
  config = CONFIGS["llama 3.1"]
  params = random_params(config)
  gguf.write(tmp_path / "a.gguf", config, params, None, quantize="Q8_0")
  _, source = gguf.open_tensors(tmp_path / "a.gguf")
  for name, quantize in (("b", None), ("c", "Q8_0")):
    with building.building(tmp_path / f"{name}.gguf") as site:
      gguf.write_into(site, config, source, None, quantize=quantize)
    _, again = gguf.open_tensors(tmp_path / f"{name}.gguf")
    for key in source.tensors:
      np.testing.assert_array_equal(again.get(key), source.get(key))
    assert {x.stored for x in again.tensors.values()} == (
      {"F32", "Q8_0"} if quantize else {"F32"}
    )


def test_the_package_reads_it(tmp_path):
  """gguf.GGUFReader as the independent truth of layout and metadata."""
  config = dataclasses.replace(CONFIGS["llama 3.2"], tied_embeddings=True)
  params = random_params(config, ml_dtypes.bfloat16)
  gguf.write(tmp_path / "m.gguf", config, params, Words())
  reader = gguf_package.GGUFReader(tmp_path / "m.gguf")
  assert reader.alignment == 32
  found = {key: field.contents() for key, field in reader.fields.items()}
  expected = {
    "general.architecture": "llama",
    "general.type": "model",
    "general.name": "params",
    "general.file_type": gguf_package.LlamaFileType.MOSTLY_BF16,
    "general.quantization_version": 2,
    "llama.vocab_size": 40,
    "llama.context_length": 131072,
    "llama.embedding_length": 32,
    "llama.block_count": 2,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 64,
    "llama.attention.value_length": 64,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.rope.dimension_count": 64,
    "llama.rope.freq_base": 5e5,
    "llama.rope.scaling.original_context_length": 8192,
    **Words().fields,
  }
  assert {k: v for k, v in found.items() if "GGUF." not in k} == expected

  tensors = {tensor.name: tensor for tensor in reader.tensors}
  source = weights.from_params(config, params, "gguf")
  assert set(tensors) == set(source.tensors) | {"rope_freqs.weight"}
  for name in source.tensors:
    value, kind = source.get(name), tensors[name].tensor_type.name
    if value.ndim == 1:
      assert kind == "F32"
      np.testing.assert_array_equal(tensors[name].data, value.astype("f4"))
    else:
      assert kind == "BF16"
      assert tensors[name].data.tobytes() == value.tobytes()
  factors = []
  for pair in range(32):
    # llama.cpp's converter, in the words of RECIPES.md 1.
    wavelength = 2 * np.pi * 5e5 ** (2 * pair / 64)
    s = np.clip((8192 / wavelength - 1) / (4 - 1), 0, 1)
    factors.append(1 / ((1 - s) / 32 + s))
  np.testing.assert_allclose(
    tensors["rope_freqs.weight"].data, factors, rtol=1e-6
  )


@pytest.mark.parametrize("name", ["linear", "grouped"])
def test_scaling_keys(name, tmp_path):
  gguf.write(
    tmp_path / "m.gguf", CONFIGS[name], random_params(CONFIGS[name]), None
  )
  metadata = gguf_header.read(tmp_path / "m.gguf").metadata
  found = {k: v for k, v in metadata.items() if "scaling" in k}
  kind, factor = (f"llama.rope.scaling.{key}" for key in ("type", "factor"))
  assert found == ({kind: "linear", factor: 4.0} if name == "linear" else {})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("block_bytes", [1, 10**9])
def test_q8_0_is_the_packages(dtype, block_bytes, tmp_path):
  """Rows of 32, 64 and 256 are quantised; those of 50 keep their dtype."""
  config = dataclasses.replace(LONG, mlp_dim=50)
  params = random_params(config, dtype)
  path = tmp_path / "m.gguf"
  gguf.write(
    path, config, params, None, quantize="Q8_0", block_bytes=block_bytes
  )
  source = weights.from_params(config, params, "gguf")
  q8_0 = gguf_package.GGMLQuantizationType.Q8_0
  kinds = set()
  for tensor in gguf_package.GGUFReader(path).tensors:
    value = source.get(tensor.name)
    kinds.add((tensor.tensor_type.name, value.ndim, value.shape[-1]))
    if tensor.tensor_type == q8_0:
      expected = gguf_package.quants.quantize(value.astype(np.float32), q8_0)
      np.testing.assert_array_equal(tensor.data, expected)
  plain = weights.stored_as(np.dtype(dtype))
  assert kinds == {
    ("F32", 1, 32),
    ("Q8_0", 2, 32),
    ("Q8_0", 2, 256),
    (plain, 2, 50),
  }
  # Half a step of 1/127 of a block's largest, and its float16 rounding.
  up = gguf.read(path)[1]["layers"]["mlp"]["up"]["kernel"]
  largest = np.abs(params["layers"]["mlp"]["up"]["kernel"]).max()
  wrong = np.abs(up - params["layers"]["mlp"]["up"]["kernel"].astype("f4"))
  assert 0 < wrong.max() < 0.51 * float(largest) / 127
  assert gguf_header.read(path).metadata["general.file_type"] == 7


def test_stopped_and_gone_on_with_is_the_same_file(tmp_path):
  config = CONFIGS["llama 3.1"]
  source = weights.from_params(config, random_params(config), "gguf")
  read = []

  def rows(name, start, stop):
    read.append(name)
    return source.rows(name, start, stop)

  watched = dataclasses.replace(source, rows=rows)
  with building.building(tmp_path / "whole.gguf") as site:
    gguf.write_into(site, config, source, Words(), quantize="Q8_0")
  finished = []

  def stop(unit, num_bytes):
    finished.append(unit)
    if len(finished) == 9:
      raise KeyboardInterrupt

  path, job = tmp_path / "m.gguf", {"job": 1}
  with (
    pytest.raises(KeyboardInterrupt),
    building.building(path, job, stop) as site,
  ):
    gguf.write_into(site, config, watched, Words(), quantize="Q8_0")
  assert not path.exists()
  read.clear()
  with building.building(path, job) as site:
    assert site.done == set(finished)
    gguf.write_into(site, config, watched, Words(), quantize="Q8_0")
  assert set(read) == set(source.tensors) - set(finished)
  assert path.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
  assert {entry.name for entry in tmp_path.iterdir()} == {
    "m.gguf",
    "whole.gguf",
  }


@pytest.mark.parametrize("scores", [True, False])
def test_every_row_has_a_token(scores, tmp_path):
  gguf.write(tmp_path / "m.gguf", BASE, random_params(BASE), Words(37, scores))
  found = gguf_header.read(tmp_path / "m.gguf").metadata
  assert found["tokenizer.ggml.tokens"][35:] == [
    "w35",
    "w36",
    "[PAD37]",
    "[PAD38]",
    "[PAD39]",
  ]
  assert found["tokenizer.ggml.token_type"] == [1] * 37 + [5] * 3
  if scores:
    assert found["tokenizer.ggml.scores"] == [0.5] * 37 + [-1000.0] * 3
  else:
    assert "tokenizer.ggml.scores" not in found


def test_a_tokenizer_comes_back(tokenizer_folder, tmp_path):
  """Without the tokens that only fill the embedding."""
  tokenizer = text_lib.load_tokenizer(tokenizer_folder)
  config = dataclasses.replace(BASE, vocab_size=tokenizer.vocab_size + 12)
  gguf.write(tmp_path / "m.gguf", config, random_params(config), tokenizer)
  back = gguf.read(tmp_path / "m.gguf")[2]
  text = "def f(x):\n\treturn '</s> [PAD501] naïve 灯台'"
  assert back.encode(text) == tokenizer.encode(text)
  assert back.special_tokens == tokenizer.special_tokens
  assert back.stop_ids == tokenizer.stop_ids


def test_without_a_tokenizer(tmp_path):
  gguf.write(tmp_path / "m.gguf", BASE, random_params(BASE), None)
  found = gguf_header.read(tmp_path / "m.gguf").metadata
  assert {k: v for k, v in found.items() if "tokenizer" in k} == {
    "tokenizer.ggml.model": "none"
  }


REFUSED = {
  "low": ({"rope_scaling": llama3(8.0, low=2.0)}, "low_freq_factor=2"),
  "high": ({"rope_scaling": llama3(8.0, high=8.0)}, "high_freq_factor=8"),
  # No pair turns slowly enough for the whole factor.
  "factor unseen": (
    {"rope_scaling": llama3(8.0), "head_dim": 8, "rope_theta": 1e4},
    "slowed by the whole factor",
  ),
  "no effect": ({"rope_scaling": llama3(1.0)}, "factor=1.0"),
  "context": ({"context_length": 2**32}, "llama.context_length=4294967296"),
  "theta": ({"rope_theta": 1e300}, "llama.rope.freq_base=1e[+]300"),
  "eps": ({"norm_eps": 1e-60}, "layer_norm_rms_epsilon=1e-60"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_say(case, tmp_path):
  fields, message = REFUSED[case]
  config = dataclasses.replace(LONG, **fields)
  with pytest.raises(errors.UserError, match=message):
    gguf.write(tmp_path / "m.gguf", config, random_params(config), None)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e20])
def test_no_scale_for_a_block(value, tmp_path):
  params = random_params(BASE)
  params["layers"]["mlp"]["up"]["kernel"][1, 3, 5] = value
  with pytest.raises(
    errors.UserError, match=r"quantize=Q8_0: params.*blk\.1\.ffn_up"
  ):
    gguf.write(tmp_path / "m.gguf", BASE, params, None, quantize="Q8_0")
  assert not list(tmp_path.iterdir())


def test_other_refusals(tmp_path):
  params = random_params(BASE)
  path = tmp_path / "m.gguf"
  with pytest.raises(errors.ConfigError, match=r"quantize='Q4_K'.*Q8_0"):
    gguf.write(path, BASE, params, None, quantize="Q4_K")
  with pytest.raises(errors.BadFileError, match=r"41 ids.*vocab_size=40"):
    gguf.write(path, BASE, params, Words(41))
  tied = dataclasses.replace(BASE, tied_embeddings=True)
  with pytest.raises(errors.BadFileError, match="head/kernel"):
    gguf.write(path, tied, params, None)
  assert not list(tmp_path.iterdir())
  path.write_text("mine")
  with pytest.raises(errors.UserError, match="exists"):
    gguf.write(path, BASE, params, None)
  assert path.read_text() == "mine"


_LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp
path, ids, text, count = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 1, 0
params.cpuparams.n_threads, params.warmup = 2, False
# What it would round by default.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.flash_attn_type = off
server = xllamacpp.Server(params)
answer = server.handle_completions({
  "prompt": ids, "max_tokens": count, "logprobs": 1, "temperature": 0,
  "ignore_eos": True,
})
request = urllib.request.Request(
  server.listening_address + "/tokenize",
  json.dumps({"content": text, "add_special": False}).encode(),
)
words = json.load(urllib.request.urlopen(request))["tokens"]
content = answer["choices"][0]["logprobs"]["content"]
print("RESULT", json.dumps({
  "words": words,
  "ids": [one["id"] for one in content],
  "logprobs": [one["logprob"] for one in content],
}))
"""

SMOLLM2_CASES = {
  "F32": (None, None),
  "Q8_0": ("Q8_0", None),
  # Not what the model was trained with, but a number that only the right
  # frequencies give; 32 positions are passed by the prompt.
  "linear": (None, linear(2.0)),
  "llama3": (None, llama3(8.0, 32)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SMOLLM2_CASES)
def test_llama_cpp_answers_as_we_do(case, smollm2, tmp_path):
  """xllamacpp, a wheel of llama.cpp, runs what we wrote of SmolLM2."""
  pytest.importorskip("xllamacpp")
  import llama_jax

  quantize, scaling = SMOLLM2_CASES[case]
  config, params, tokenizer = gguf.read(smollm2)
  config = dataclasses.replace(config, rope_scaling=scaling)
  path = tmp_path / "smollm2.gguf"
  gguf.write(path, config, params, tokenizer, quantize=quantize)
  llama = llama_jax.load(f"gguf:{path}")
  assert llama.config == config

  text = "A lighthouse, 12 ships and naïve 灯台!\n\n  They'd \t<b>"
  # What comes next is so sure that no rounding of 8 bits changes it.
  prompt = tokenizer.encode("".join(f"{i}, " for i in range(1, 21)))
  assert len(prompt) > 32
  arguments = json.dumps([str(path), prompt, text, 48])
  done = subprocess.run(
    [sys.executable, "-c", _LLAMA_CPP, arguments],
    capture_output=True,
    text=True,
    timeout=500,
  )
  (line,) = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
  theirs = json.loads(line.removeprefix("RESULT "))
  assert theirs["words"] == tokenizer.encode(text)
  new = theirs["ids"]
  assert len(new) == 48
  logits = np.asarray(llama.logits([prompt + new])[0], np.float64)
  logits = logits[len(prompt) - 1 : -1]
  logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  ours = logprobs[np.arange(48), new]
  worst = np.abs(ours - theirs["logprobs"]).max()
  print(f"{case}: log-probabilities differ by {worst:.1e}")
  # "ignore_eos" leaves these out.
  logprobs[:, list(tokenizer.stop_ids)] = -np.inf
  assert logprobs.argmax(axis=1).tolist() == new
  # llama.cpp rounds activations, too, where weights are quantised.
  assert worst < (0.3 if quantize else 1e-3)
