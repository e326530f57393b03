"""Small Llamas of every kind compute what transformers and torch compute.

checkpoint/golden/make_llamas.py made the numbers, in float32 on both sides.
"""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from llama_jax.checkpoint import hugging_face_config, names, weights
from llama_jax.model import decoder as decoder_lib
from llama_jax.objectives import next_token
from llama_jax.training import optimizer as optimizer_lib
from llama_jax.training import schedule as schedule_lib
from llama_jax.training import state as state_lib
from llama_jax.training import step as step_lib

GOLDEN = pathlib.Path(__file__).parents[1] / "checkpoint" / "golden" / "llamas"
MODELS = sorted(file.stem for file in GOLDEN.glob("*.npz"))
assert len(MODELS) == 6


@functools.cache
def golden(name):
  """The numbers, the configuration, and the params."""
  numbers = dict(np.load(GOLDEN / f"{name}.npz"))
  fields = json.loads(str(numbers["config"]))
  config = hugging_face_config.parse(fields, name)
  return numbers, config, params_of(config, numbers)


def params_of(config, numbers, prefix=""):
  arrays = {
    place.name: numbers[prefix + place.name]
    for place in names.places(config, "hf")
  }
  tensors = {
    name: weights.Tensor(array.shape, array.dtype, "F32")
    for name, array in arrays.items()
  }
  source = weights.Source(
    "golden", "hf", tensors, lambda name, *span: arrays[name][slice(*span)]
  )
  return weights.read_params(config, source)


def batch_of(numbers, ids):
  """Rows padded on either side: segment 0 is padding, targets follow."""
  mask = numbers["mask"].astype(np.int32)
  scored = np.zeros(mask.shape, np.float32)
  scored[:, :-1] = mask[:, 1:] * mask[:, :-1]
  return {
    "tokens": ids.astype(np.int32),
    "positions": numbers["positions"].astype(np.int32),
    "segments": mask,
    "targets": np.roll(ids, -1, axis=1).astype(np.int32),
    "loss_mask": scored,
    "sources": np.zeros(len(ids), np.int32),
  }


@functools.cache
def trained(name):
  """Gradients of the first batch, metrics of ten steps, and the params."""
  numbers, config, params = golden(name)
  # test_decoder.py holds the other forms equal; this one compiles fastest.
  decoder = decoder_lib.Decoder(
    config, attention="reference", rematerialise="none"
  )
  objective = next_token.make(
    lambda params, *batch: decoder.apply(
      {"params": params}, *batch, 0.0, method="loss_sum"
    ),
    num_sources=1,
  )
  settings = optimizer_lib.OptimizerConfig(
    schedule="cosine",
    decay_fraction=0.0,
    moments_dtype="float32",
    **json.loads(str(numbers["optimizer"])),
  )
  steps = len(numbers["steps"])
  optimizer = optimizer_lib.make(settings)
  update = step_lib.make(objective, optimizer, spike_factor=0)

  @jax.jit
  def both(state, batch, rate):
    """One compilation for the update and the gradients that it hides."""
    (_, (count, _)), sums = step_lib.accumulate(objective, state.params, batch)
    gradients = jax.tree.map(lambda leaf: leaf / count, sums)
    return gradients, update(state, batch, rate)

  state = state_lib.create(params, optimizer)
  gradients, metrics = [], []
  for step, ids in enumerate(numbers["steps"]):
    rate = schedule_lib.learning_rate(
      settings, step, step, settings.warmup_steps, steps
    )
    batch = jax.tree.map(lambda leaf: leaf[None], batch_of(numbers, ids))
    found, (state, measured) = both(state, batch, np.float32(rate))
    gradients.append(found)
    metrics.append(measured | {"learning_rate": rate})
  return gradients[0], metrics, state.params


def test_every_kind_is_there():
  configs = [golden(name)[1] for name in MODELS]
  groups = {config.num_kv_heads for config in configs}
  assert 1 in groups and any(c.num_groups == 1 for c in configs)
  assert any(1 < c.num_kv_heads < c.num_heads for c in configs)
  assert {c.tied_embeddings for c in configs} == {True, False}
  assert {c.head_dim * c.num_heads == c.embed_dim for c in configs} == {
    True,
    False,
  }
  assert {1e4, 1e6} <= {c.rope_theta for c in configs}
  scalings = [c.rope_scaling for c in configs if c.rope_scaling]
  assert {(s.kind, s.factor) for s in scalings} == {
    ("linear", 4.0),
    ("llama3", 8.0),
    ("llama3", 32.0),
  }
  # The positions pass what these were first trained for.
  for scaling in scalings:
    if scaling.original_context is not None:
      positions = golden(MODELS[0])[0]["positions"]
      assert positions.max() > 4 * scaling.original_context


@pytest.mark.parametrize("name", MODELS)
def test_logits(name):
  numbers, config, params = golden(name)
  decoder = decoder_lib.Decoder(config)
  batch = batch_of(numbers, numbers["ids"])
  ours = jax.jit(lambda params, *batch: decoder.apply(params, *batch)[0])(
    {"params": params}, batch["tokens"], batch["positions"], batch["segments"]
  )
  real = numbers["mask"].astype(bool)
  assert real[0].all() and not real[1, 0] and not real[2, -1]
  assert np.abs(numbers["logits"][real]).max() > 2
  np.testing.assert_allclose(ours[real], numbers["logits"][real], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name):
  numbers, config, _ = golden(name)
  ours = names.flatten(trained(name)[0])
  theirs = names.flatten(params_of(config, numbers, "gradients/"))
  assert ours.keys() == theirs.keys()
  for path, value in theirs.items():
    np.testing.assert_allclose(
      ours[path], value, rtol=0, atol=1e-4 * np.abs(value).max(), err_msg=path
    )


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_of_adamw(name):
  """The whole of our update: schedule, clipping, decay of matrices alone."""
  numbers, config, params = golden(name)
  _, metrics, ours = trained(name)
  for key, theirs in (("loss", "losses"), ("grad_norm", "norms")):
    measured = [float(step[key]) for step in metrics]
    np.testing.assert_allclose(measured, numbers[theirs], rtol=1e-4)
  theirs = names.flatten(params_of(config, numbers, "after/"))
  for path, value in theirs.items():
    np.testing.assert_allclose(
      names.flatten(ours)[path], value, rtol=0, atol=1e-4, err_msg=path
    )
  moved = theirs["embed/embedding"] - params["embed"]["embedding"]
  assert np.abs(moved).max() > 0.02
