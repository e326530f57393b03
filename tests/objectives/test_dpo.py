"""DPO equals the papers' formulas on transformers' Llama, packed or not.

golden/make_finetuning.py made the numbers, one sequence at a time.
"""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.checkpoint import hugging_face_config, names, weights
from llama_jax.data import packing
from llama_jax.model import decoder as decoder_lib
from llama_jax.objectives import dpo, next_token

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "finetuning.npz"
KINDS = {
  "dpo": dpo.DPO(0.1, 0.2, 0.0, False, False, dpo.LIVE),
  "dpo_smooth": dpo.DPO(0.5, 0.0, 0.1, False, False, dpo.LIVE),
  "dpo_mean": dpo.DPO(2.0, 0.2, 0.0, True, False, dpo.LIVE),
}


@functools.cache
def golden():
  """The numbers, a decoder, and (prefix) -> params."""
  numbers = dict(np.load(GOLDEN))
  config = hugging_face_config.parse(
    json.loads(str(numbers["config"])), "golden"
  )

  def params(prefix=""):
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

  decoder = decoder_lib.Decoder(
    config, attention="reference", rematerialise="none"
  )
  return numbers, decoder, params


def documents():
  """Each pair as a document of two parts."""
  numbers, _, _ = golden()
  count = sum(name.startswith("ids_") for name in numbers)
  for index in range(0, count, 2):
    ids = [numbers[f"ids_{i}"] for i in (index, index + 1)]
    trained = [numbers[f"trained_{i}"] for i in (index, index + 1)]
    yield packing.Document(
      np.concatenate(ids),
      index // 2,
      True,
      np.concatenate(trained),
      tuple(map(len, ids)),
    )


def batch_of(row_length, together=True):
  """Packed rows and what goes along, by hand: pairs are neighbours."""
  rows = list(packing.pack(documents(), row_length, together))
  S = max(len(row["documents"]) for row in rows)
  found = []
  for row in rows:
    segments = len(row["documents"])
    pairs = np.zeros((S // 2, 2), np.int32)
    pairs[: segments // 2] = [(s, s + 1) for s in range(1, segments, 2)]
    last = np.zeros(S, np.int32)
    for s in range(1, segments + 1):
      last[s - 1] = np.flatnonzero(row["segments"] == s)[-1]
    inputs = packing.inputs(row, 0, row_length, True)
    found.append(inputs | {"pairs": pairs, "last": last})
  return {name: np.stack([one[name] for one in found]) for name in found[0]} | {
    "sources": np.zeros(len(found), np.int32)
  }


def apply(method, params, *args):
  _, decoder, _ = golden()
  return decoder.apply({"params": params}, *args, method=method)


def mean_and_gradients(objective, params, batch, frozen=None):
  (total, (count, sums)), gradients = jax.jit(
    jax.value_and_grad(objective, has_aux=True)
  )(params, batch, frozen)
  return (
    total / count,
    jax.tree.map(lambda leaf: leaf / count, gradients),
    {name: pair for name, pair in sums.items()},
  )


def check_gradients(kind, gradients):
  _, _, params = golden()
  theirs = names.flatten(params(f"{kind}/gradients/"))
  ours = names.flatten(gradients)
  assert ours.keys() == theirs.keys()
  for path, value in theirs.items():
    np.testing.assert_allclose(
      ours[path], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=path
    )


@pytest.mark.parametrize("row_length", [40, 80])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind, row_length):
  """80 holds all sequences in one row, 40 in several."""
  numbers, _, params = golden()
  objective = dpo.make(KINDS[kind], functools.partial(apply, "token_nll"))
  loss, gradients, _ = mean_and_gradients(
    objective,
    params(),
    batch_of(row_length),
    {"reference": params("reference/")},
  )
  np.testing.assert_allclose(loss, numbers[f"{kind}/loss"], rtol=1e-5)
  check_gradients(kind, gradients)


def test_sft_is_next_token_by_its_mask():
  numbers, _, params = golden()
  objective = next_token.make(
    lambda params, *args: apply("loss_sum", params, *args, 0.0), 1
  )
  batch = batch_of(80)
  # The chosen ones are the odd segments.
  batch["loss_mask"] = batch["loss_mask"] * (batch["segments"] % 2)
  loss, gradients, _ = mean_and_gradients(objective, params(), batch)
  np.testing.assert_allclose(loss, numbers["sft/loss"], rtol=1e-5)
  check_gradients("sft", gradients)


def test_a_cached_reference_is_the_live_one():
  _, _, params = golden()
  token_nll = functools.partial(apply, "token_nll")
  settings = KINDS["dpo"].__dict__
  live = dpo.make(dpo.DPO(**settings), token_nll)
  cached = dpo.make(dpo.DPO(**{**settings, "reference": dpo.CACHED}), token_nll)
  batch = batch_of(40)
  reference = params("reference/")
  logprobs = dpo.answer_logprobs(token_nll, reference, batch)
  one = mean_and_gradients(live, params(), batch, {"reference": reference})
  two = mean_and_gradients(cached, params(), batch | {"reference": logprobs})
  # The same sums in two programs.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    one,
    two,
  )


def test_what_it_tells():
  """At the reference the margin is 0, nobody wins, and the loss is log 2."""
  _, _, params = golden()
  objective = dpo.make(
    dpo.DPO(0.1, 0.0, 0.0, False, False, dpo.LIVE),
    functools.partial(apply, "token_nll"),
  )
  batch = batch_of(40)
  loss, _, sums = mean_and_gradients(
    objective, params(), batch, {"reference": params()}
  )
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
  told = {name: float(total / count) for name, (total, count) in sums.items()}
  assert told["accuracy"] == 0.5 and told["margin"] == 0
  assert told["reward/better"] == told["reward/other"] == 0
  # Log-probabilities by segment, summed by hand.
  nll_BT = apply(
    "token_nll",
    params(),
    *(batch[n] for n in ("tokens", "positions", "segments", "targets")),
  )
  by_hand = [
    -float((nll_BT[b] * batch["loss_mask"][b])[batch["segments"][b] == s].sum())
    for b, pairs in enumerate(batch["pairs"])
    for s, _ in pairs
    if s
  ]
  np.testing.assert_allclose(
    told["logprob/better"], np.mean(by_hand), rtol=1e-5
  )


@pytest.mark.parametrize(
  ("knob", "value"),
  [
    ("beta", 0.0),
    ("nll_weight", -1.0),
    ("label_smoothing", 0.5),
    ("reference", "none"),
  ],
)
def test_a_wrong_number_names_its_knob(knob, value):
  settings = {**KINDS["dpo"].__dict__, knob: value}
  with pytest.raises(errors.ConfigError, match=f"objective.{knob}="):
    dpo.DPO(**settings)
