"""Every format into every other, and bitwise back."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from llama_jax import checkpoint, convert, text
from llama_jax.checkpoint import (
  building,
  gguf,
  gguf_write,
  hugging_face,
  meta,
  names,
  store,
  weights,
)
from llama_jax.model import config as config_lib
from llama_jax.model import sizes

# A shape that all formats can say: Meta's has no head_dim of its own.
PLAIN = dataclasses.replace(sizes.get("nano"), head_dim=16)
SCALED = dataclasses.replace(
  PLAIN,
  tied_embeddings=False,
  num_kv_heads=4,
  num_heads=8,
  head_dim=8,
  rope_theta=5e5,
  rope_scaling=config_lib.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
  context_length=131072,
)


def bits(params):
  return {
    path: (np.asarray(leaf).dtype, np.asarray(leaf).tobytes())
    for path, leaf in names.flatten(params).items()
  }


def cast(params, dtype):
  return names.nest(
    {k: v.astype(dtype) for k, v in names.flatten(params).items()}
  )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("config", [PLAIN, SCALED], ids=["tied", "scaled"])
def test_through_every_format_and_back(
  config, dtype, tmp_path, random_params, tokenizer_folder, capsys
):
  """orbax -> meta of 1, 2 and 4 files -> hf -> meta -> gguf -> orbax, each
  step with its proof, the tokenizer and its stop tokens along."""
  tokenizer = text.load_tokenizer(tokenizer_folder)
  params = cast(random_params(config), dtype)
  store.write(tmp_path / "start", config, params, tokenizer)
  steps = (
    ("orbax:start", "meta:m1", {}),
    ("meta:m1", "meta:m2", {"model_parallel": 2}),
    ("meta:m2", "hf:h1", {"shard_gb": 1e-4}),
    ("hf:h1", "meta:m4", {"model_parallel": 2}),
    ("meta:m4", "gguf:g.gguf", {}),
    ("gguf:g.gguf", "hf:h2", {}),
    ("hf:h2", "orbax:end", {}),
  )
  for source, destination, settings in steps:
    source, destination = (
      reference.replace(":", f":{tmp_path}/")
      for reference in (source, destination)
    )
    job = convert.Job(source, destination, **settings)
    convert.convert(job, check=True)
    said = capsys.readouterr().out
    forwards = said.count("forward  ")
    assert forwards == (2 if config.rope_scaling else 1), said
    found, read, words = checkpoint.load(destination)
    assert found == config
    want = bits(params)
    if destination.startswith("gguf:") or "h2" in destination:
      # llama.cpp keeps norms in float32; nothing is lost.
      read = cast(read, dtype)
    if destination.endswith("end"):
      read = cast(read, dtype)
    assert bits(read) == want, destination
    assert words.encode("def f(x):\n  1") == tokenizer.encode("def f(x):\n  1")
    assert words.stop_ids == tokenizer.stop_ids
    assert words.chat_template == tokenizer.chat_template


def test_a_format_is_read_as_it_is_written():
  """Every format of the table offers what the others of it do."""
  import importlib

  for scheme, module_name in checkpoint.FORMATS.items():
    module = importlib.import_module(module_name)
    for function in ("read", "read_config", "read_tokenizer", "open_tensors"):
      assert callable(getattr(module, function)), (scheme, function)
    assert hasattr(module, "write_into") == (scheme in checkpoint.WRITES)


@pytest.mark.parametrize("module", [hugging_face, meta])
def test_what_was_quantised_is_written_as_it_is_read(
  module, tmp_path, random_params
):
  """GGUF's own word for a tensor is none of the other formats'."""
  file = tmp_path / "q.gguf"
  gguf_write.write(file, PLAIN, random_params(PLAIN), None, quantize="Q8_0")
  config, source = gguf.open_tensors(file)
  assert "Q8_0" in {tensor.stored for tensor in source.tensors.values()}
  with building.building(tmp_path / "new") as site:
    module.write_into(site, config, source, None)
  want = weights.read_params(config, source)
  found = weights.read_params(*module.open_tensors(tmp_path / "new"))
  assert bits(found) == bits(want)
