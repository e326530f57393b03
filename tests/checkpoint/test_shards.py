"""Params read straight onto a mesh against the same read whole."""

import collections
import dataclasses
import importlib

import jax
import ml_dtypes
import numpy as np
import pytest

from llama_jax import checkpoint, text
from llama_jax.checkpoint import names, shards, weights
from llama_jax.decoding import placement
from llama_jax.model import sizes
from llama_jax.parallel import mesh as mesh_lib

# A shape that all formats can say, with a head of its own.
CONFIG = dataclasses.replace(
  sizes.get("nano"), head_dim=16, tied_embeddings=False
)


def make_mesh(*sizes_):
  return mesh_lib.make(mesh_lib.ParallelConfig(*sizes_), jax.devices()[:4])


@pytest.fixture(scope="module")
def params(random_params):
  """In bfloat16, all but the norms; gguf: keeps norms in float32."""
  leaves = names.flatten(random_params(CONFIG))
  return names.nest(
    {
      path: leaf if "norm" in path else leaf.astype(ml_dtypes.bfloat16)
      for path, leaf in leaves.items()
    }
  )


@pytest.mark.parametrize("scheme", checkpoint.WRITES)
def test_every_format(scheme, params, tmp_path, tokenizer_folder):
  tokenizer = text.load_tokenizer(tokenizer_folder)
  module = importlib.import_module(checkpoint.FORMATS[scheme])
  module.write(tmp_path / "model", CONFIG, params, tokenizer)
  reference = f"{scheme}:{tmp_path / 'model'}"
  for mesh in (make_mesh(2, 1, 2), make_mesh(1, 2, 2)):
    wanted = placement.shardings(CONFIG, mesh)
    config, found, words = checkpoint.load(reference, "--ckpt", wanted)
    assert config == CONFIG
    assert words.vocab_size == tokenizer.vocab_size
    placed = names.flatten(wanted)
    whole = names.flatten(params)
    for path, leaf in names.flatten(found).items():
      want = whole.pop(path)
      assert leaf.dtype == want.dtype, path
      assert np.asarray(leaf).tobytes() == want.tobytes(), path
      assert leaf.sharding.is_equivalent_to(placed[path], leaf.ndim), path
    assert not whole
    # In parts indeed.
    kernel = found["layers"]["mlp"]["gate"]["kernel"]
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    for shard in kernel.addressable_shards:
      assert shard.data.nbytes * parts == kernel.nbytes


def test_a_part_is_read_once_whoever_holds_it(params):
  """Two copies of two parts. A file has rows of the output: where the input is
  split all rows are read for each part."""
  source = weights.from_params(CONFIG, params, "meta")
  read = collections.Counter()

  def rows(name, start, stop):
    read[name] += stop - start
    return source.rows(name, start, stop)

  shards.read_params(
    CONFIG,
    dataclasses.replace(source, rows=rows),
    placement.shardings(CONFIG, make_mesh(2, 1, 2)),
  )
  for name, tensor in source.tensors.items():
    times = 2 if name.endswith((".wo.weight", ".w2.weight")) else 1
    assert read[name] == times * tensor.shape[0], name
