"""Distillation against torch, by parts, and what its config refuses.

golden/make_distill.py made the numbers, in float32 on both sides.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.checkpoint import hugging_face_config, names, weights
from llama_jax.kernels import divergence
from llama_jax.model import decoder as decoder_lib
from llama_jax.objectives import distill
from llama_jax.training import step as step_lib

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "distill.npz"
CONFIG = distill.Distill("hf:teacher", 0.5, 0.3, 0.7, 2.5, 0)


@functools.cache
def golden():
  return dict(np.load(GOLDEN))


def params_of(config, prefix):
  """The golden file's arrays of this prefix as params."""
  arrays = {
    place.name: golden()[prefix + place.name]
    for place in names.places(config, "hf")
  }
  tensors = {
    name: weights.Tensor(array.shape, array.dtype, "F32")
    for name, array in arrays.items()
  }
  return weights.read_params(
    config,
    weights.Source(
      "golden", "hf", tensors, lambda name, *span: arrays[name][slice(*span)]
    ),
  )


def model_of(kind):
  """A decoder and its params."""
  config = hugging_face_config.parse(json.loads(str(golden()[kind])), kind)
  decoder = decoder_lib.Decoder(
    config, attention="reference", rematerialise="none"
  )
  return decoder, params_of(config, f"{kind}/")


def states(decoder, params, *rows):
  return decoder.apply({"params": params}, *rows, method="states")


@functools.cache
def golden_batch():
  """Inputs and next tokens: segment 0 is padding."""
  ids = golden()["ids"].astype(np.int32)
  return {
    "tokens": ids[:, :-1],
    "targets": ids[:, 1:],
    "positions": golden()["positions"][:, :-1].astype(np.int32),
    "segments": golden()["mask"][:, :-1].astype(np.int32),
    "loss_mask": golden()["scored"].astype(np.float32),
    "sources": np.array([0, 1, 1], np.int32),
  }


@functools.cache
def teacher_states():
  """Computed once for all cases: half of their compilation."""
  decoder, params = model_of("teacher")
  rows = [golden_batch()[n] for n in ("tokens", "positions", "segments")]
  return jax.jit(functools.partial(states, decoder))(params, *rows)


@pytest.mark.parametrize("case", ["forward", "reverse", "mixture", "stored"])
def test_against_torch(case):
  """Loss, what is told and every gradient, within 1e-5."""
  *mixture, k = golden()[f"{case}/mixture"].tolist()
  config = distill.Distill("hf:teacher", *mixture, int(k))
  student, params = model_of("student")

  def teacher(frozen, batch):
    del batch
    held = frozen["teacher"]
    return divergence.top(held, int(k), config.temperature) if k else held

  objective = distill.make(
    config,
    functools.partial(states, student),
    teacher,
    divergence.loss_sum,
    num_sources=2,
  )
  batch = golden_batch()
  grad = jax.jit(jax.value_and_grad(objective, has_aux=True))
  (total, (count, sums)), gradients = grad(
    params, batch, {"teacher": teacher_states()}
  )
  np.testing.assert_allclose(total, golden()[f"{case}/loss"], rtol=1e-5)
  scored = batch["loss_mask"]
  assert count == scored.sum()
  for name, key in (("nll", "nll"), ("kl", "forward")):
    want = (golden()[f"{case}/{key}"] * scored).sum()
    np.testing.assert_allclose(sums[name][0], want, rtol=1e-5)
    assert sums[name][1] == count
  assert ("reverse_kl" in sums) == (case != "stored")
  np.testing.assert_allclose(
    sums["source_loss"][0].sum(), sums["nll"][0], rtol=1e-6
  )
  np.testing.assert_array_equal(
    sums["source_tokens"][0], [scored[0].sum(), scored[1:].sum()]
  )
  ours = names.flatten(gradients)
  theirs = names.flatten(params_of(student.config, f"{case}/gradients/"))
  assert ours.keys() == theirs.keys()
  for path, value in theirs.items():
    scale = max(1, np.abs(value).max())
    np.testing.assert_allclose(
      ours[path], value, rtol=0, atol=1e-5 * scale, err_msg=path
    )
    assert np.abs(value).max() > 1e-3, path


def toy(config):
  """An objective of two tables of words: hidden states are their rows."""

  def states(table_VD, ids, positions, segments):
    del positions, segments
    return divergence.States(table_VD[ids], table_VD, True)

  def teacher(frozen, batch):
    return states(frozen["teacher"], batch["tokens"], None, None)

  return distill.make(config, states, teacher, divergence.loss_sum, 2)


def toy_case(B=4, T=6):
  rng = np.random.default_rng(0)
  student, teacher = (
    jnp.asarray(rng.normal(size=(11, width)), jnp.float32) for width in (5, 8)
  )
  batch = {
    "tokens": rng.integers(11, size=(B, T)),
    "targets": rng.integers(11, size=(B, T)),
    "positions": np.zeros((B, T), np.int32),
    "segments": np.ones((B, T), np.int32),
    # Rows hold different numbers of scored tokens.
    "loss_mask": np.float32(rng.random((B, T)) < np.linspace(0, 1, B)[:, None]),
    "sources": rng.integers(2, size=B),
  }
  batch["loss_mask"][0, 0] = 1
  return student, {"teacher": teacher}, jax.tree.map(jnp.asarray, batch)


def test_microbatches_equal_one_batch():
  student, frozen, batch = toy_case()
  objective = toy(CONFIG)

  @jax.jit
  def accumulate(batch):
    return step_lib.accumulate(objective, student, batch, frozen)

  whole = accumulate(jax.tree.map(lambda a: a[None], batch))
  parts = accumulate(
    jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), batch)
  )
  assert whole[0][1][0] == batch["loss_mask"].sum()
  for one, other in zip(
    jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True
  ):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_tokens_that_are_not_trained_do_not_count():
  student, frozen, batch = toy_case()
  objective = jax.jit(toy(CONFIG))
  want = objective(student, batch, frozen)
  masked = batch["loss_mask"] == 0
  assert masked.any()
  targets = jnp.where(masked, (batch["targets"] + 3) % 11, batch["targets"])
  tokens = jnp.where(masked, (batch["tokens"] + 3) % 11, batch["tokens"])
  got = objective(student, batch | dict(tokens=tokens, targets=targets), frozen)
  for one, other in zip(
    jax.tree.leaves(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize(
  "fields",
  [dict(data=0, reverse=0), dict(data=0, forward=0)],
  ids=["forward", "reverse"],
)
def test_it_learns_the_teacher(fields):
  """Plain descent, a student wide enough: both divergences tend to 0."""
  _, frozen, batch = toy_case()
  student = 0.3 * np.random.default_rng(1).normal(size=(11, 12))
  config = distill.Distill(
    **dict(teacher="x", data=0, forward=1, reverse=1, temperature=1, top_k=0)
    | fields
  )
  objective = toy(config)

  @jax.jit
  def descend(student):
    def one(student, _):
      grad, (count, sums) = jax.grad(objective, has_aux=True)(
        student, batch, frozen
      )
      told = {name: total for name, (total, _) in sums.items()}
      return student - 0.3 * grad / count, (told["kl"], told["reverse_kl"])

    return jax.lax.scan(one, student, None, length=300)[1]

  for each in descend(jnp.asarray(student)):
    assert each[-1] < 0.02 * each[0]


@pytest.mark.parametrize(
  "change, said",
  [
    (dict(teacher=""), ["objective.teacher is empty", "hf:"]),
    (dict(data=-1.0), ["objective.data=-1.0", "0 or more"]),
    (dict(forward=float("nan")), ["objective.forward=nan", "0 or more"]),
    (dict(reverse=float("inf")), ["objective.reverse=inf", "0 or more"]),
    (
      dict(forward=0.0, reverse=0.0),
      ["objective.forward=0", "objective.reverse=0", "next_token"],
    ),
    (dict(temperature=0.0), ["objective.temperature=0.0", "above 0"]),
    (dict(top_k=-1), ["objective.top_k=-1", "0 or more"]),
    (dict(top_k=2.0), ["objective.top_k=2.0", "whole"]),
    (dict(top_k=8), ["objective.reverse=0.7", "objective.top_k=8"]),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused(change, said):
  fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
  with pytest.raises(errors.ConfigError) as caught:
    distill.Distill(**fields | change)
  assert all(word in str(caught.value) for word in said), str(caught.value)
