"""llama2.c's .bin files: a real model's own words, and refusals."""

import dataclasses
import pathlib
import shutil
import struct
import tracemalloc

import numpy as np
import pytest

from llama_jax import errors, llama
from llama_jax.checkpoint import llama2c, names, proof, weights
from llama_jax.model import config as config_lib

GOLDEN = pathlib.Path(__file__).parent / "golden"
DATA = pathlib.Path(__file__).parents[3] / "shared" / "data"
STORIES = DATA / "weights" / "stories260K.bin"

CONFIG = config_lib.LlamaConfig(
  vocab_size=12,
  embed_dim=8,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=2,
  mlp_dim=6,
  norm_eps=1e-5,
  rope_theta=1e4,
  rope_scaling=None,
  context_length=5,
  tied_embeddings=True,
)
UNTIED = dataclasses.replace(CONFIG, tied_embeddings=False)


def tensors_of(config):
  """Meta's names -> arrays, all numbers different."""
  rng = np.random.default_rng(0)
  return {
    place.name: rng.normal(size=place.shape).astype(np.float32)
    for place in names.places(config, "meta")
  }


def export(config, tensors, version):
  """The bytes of a file, as llama2.c's export.py orders them."""
  c = config
  sizes = (c.embed_dim, c.mlp_dim, c.num_layers, c.num_heads, c.num_kv_heads)
  attention = [f"attention.w{letter}" for letter in "qkvo"]
  mlp = [f"feed_forward.w{number}" for number in "123"]

  def layers(*kinds):
    return b"".join(
      tensors[f"layers.{layer}.{kind}.weight"].tobytes()
      for kind in kinds
      for layer in range(c.num_layers)
    )

  embed = tensors["tok_embeddings.weight"].tobytes()
  norm = tensors["norm.weight"].tobytes()
  head = b"" if c.tied_embeddings else tensors["output.weight"].tobytes()
  if version == 0:
    vocab_size = c.vocab_size if c.tied_embeddings else -c.vocab_size
    header = struct.pack("<7i", *sizes, vocab_size, c.context_length)
    tables = np.full(c.context_length * c.head_dim, 7, np.float32).tobytes()
    return b"".join(
      (header, embed, layers("attention_norm", *attention, "ffn_norm", *mlp))
      + (norm, tables, head)
    )
  header = struct.pack("<Ii", 0x616B3432, version)
  header += struct.pack("<7i", *sizes, c.vocab_size, c.context_length)
  header += bytes([c.tied_embeddings])
  return b"".join(
    (header.ljust(256, b"\0"), layers("attention_norm", "ffn_norm"), norm)
    + (embed, layers(*attention, *mlp), head)
  )


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_every_number_is_in_its_place(config, version, tmp_path):
  tensors = tensors_of(config)
  path = tmp_path / "m.bin"
  path.write_bytes(export(config, tensors, version))
  found, source = llama2c.open_tensors(path)
  assert found == config
  assert source.tensors.keys() == tensors.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(source.get(name), value, name)
    np.testing.assert_array_equal(source.rows(name, 1, 2), value[1:2], name)
  assert llama2c.read_config(path) == config
  assert llama2c.read(path)[2] is None


@pytest.mark.skipif(not STORIES.exists(), reason="no real weights")
def test_stories_equal_the_published_ones(tmp_path):
  """karpathy/llama2.c, doc/stories260K.md: greedy, from BOS."""
  shutil.copy(STORIES, tmp_path)
  assert llama2c.read_tokenizer(tmp_path / STORIES.name) is None
  shutil.copy(DATA / "tokenizers" / "tok512.model", tmp_path)
  model = llama.Llama(*llama2c.read(tmp_path / STORIES.name))
  published = (GOLDEN / "stories260K.txt").read_text().strip()
  found = model.generate("", max_new_tokens=256)
  assert found.strip().startswith(published)

  _, source = llama2c.open_tensors(STORIES)
  ids = [1, *model.tokenizer.encode(published)[:100]]
  (reference,) = proof.reference_logits(model.config, source, ids)
  ours = np.asarray(model.logits([ids])[0])
  # Logits reach 15; two float32 forwards differ in the order of sums.
  np.testing.assert_allclose(ours, reference, atol=1e-4)
  assert proof.mean_loss(ours, ids) < 0.6


def test_only_one_tokenizer_beside_it_is_taken(tmp_path):
  (tmp_path / "m.bin").write_bytes(export(CONFIG, tensors_of(CONFIG), 1))
  for name in "ab":
    (tmp_path / f"{name}.model").write_bytes(b"no tokenizer")
  assert llama2c.read_tokenizer(tmp_path / "m.bin") is None
  (tmp_path / "b.model").unlink()
  with pytest.raises(errors.BadFileError, match=r"a\.model"):
    llama2c.read(tmp_path / "m.bin")


@pytest.mark.parametrize("version", [0, 1])
def test_sizes_must_match_exactly(version, tmp_path):
  whole = export(UNTIED, tensors_of(UNTIED), version)
  path = tmp_path / "m.bin"
  for size in (*range(0, len(whole), 97), len(whole) - 1):
    path.write_bytes(whole[:size])
    with pytest.raises(errors.BadFileError, match=rf"\({size} bytes\)"):
      llama2c.open_tensors(path)
  path.write_bytes(whole + b"\0")
  with pytest.raises(errors.BadFileError, match=f"asks for {len(whole)} bytes"):
    llama2c.open_tensors(path)


@pytest.mark.parametrize(
  ("version", "message"),
  [(2, "version 2.* int8.* --version 1"), (3, "unknown"), (-1, "version -1")],
)
def test_other_versions_are_named(version, message, tmp_path):
  path = tmp_path / "m.bin"
  path.write_bytes(export(CONFIG, tensors_of(CONFIG), version))
  with pytest.raises(errors.BadFileError, match=message):
    llama2c.open_tensors(path)


ABSURD = [
  (version, field, value)
  for version in (0, 1)
  for field in range(7)
  for value in (0, -1, -(2**31), 2**31 - 1, 3)
  # The number of layers there is, and a context that no table of version 1
  # is as long as.
  if (field, value) != (2, 3) and (version, field, value > 0) != (1, 6, True)
]


@pytest.mark.parametrize(("version", "field", "value"), ABSURD)
def test_absurd_headers(version, field, value, tmp_path):
  content = bytearray(export(CONFIG, tensors_of(CONFIG), version))
  struct.pack_into("<i", content, 8 * version + 4 * field, value)
  path = tmp_path / "m.bin"
  path.write_bytes(content)
  tracemalloc.start()
  with pytest.raises(errors.BadFileError, match=r"m\.bin"):
    llama2c.open_tensors(path)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1 << 20


@pytest.mark.parametrize(
  "count", [300, pytest.param(10_000, marks=pytest.mark.slow)]
)
def test_mutants_give_one_kind_of_error(count, tmp_path):
  rng = np.random.default_rng(0)
  path = tmp_path / "m.bin"
  refused = 0
  for i in range(count):
    content = bytearray(export(UNTIED, tensors_of(UNTIED), i % 2))
    for _ in range(rng.integers(1, 4)):
      at = int(rng.integers(45 if i % 2 else 28))
      if rng.integers(2):
        content[at] ^= 1 << rng.integers(8)
      else:
        content[at : at + 4] = rng.bytes(4)
    path.write_bytes(content[: None if rng.integers(4) else at * 30])
    try:
      config, source = llama2c.open_tensors(path)
      # What is left is another context length, or heads of other widths.
      weights.check(config, source)
      assert config.context_length != 5 or config != UNTIED
      source.get("norm.weight")
    except errors.BadFileError:
      refused += 1
  assert refused > count * 0.7


def test_what_is_no_file(tmp_path):
  for path in (tmp_path, tmp_path / "absent"):
    with pytest.raises(errors.BadFileError):
      llama2c.open_tensors(path)
  (tmp_path / "text").write_text("Once upon a time " * 100)
  with pytest.raises(errors.BadFileError, match="text"):
    llama2c.open_tensors(tmp_path / "text")
