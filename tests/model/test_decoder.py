"""The decoder's shape, its causality, and that all its forms agree."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.checkpoint import names, proof, weights
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes
from llama_jax.model import unrolled as unrolled_lib

NANO = sizes.get("nano")
UNTIED = dataclasses.replace(NANO, tied_embeddings=False)


@functools.cache
def fresh(config):
  decoder = decoder_lib.Decoder(config)
  key = jax.random.key(0)
  params = jax.jit(lambda: nn.unbox(decoder_lib.init(decoder, key)))()
  return jax.tree.map(np.asarray, params)


@functools.cache
def params_of(config):
  # Larger than at initialisation, so that attention is not flat and a wrong
  # position or segment moves the logits.
  return jax.tree.map(lambda leaf: leaf * 4, fresh(config))


def tokens(B, T, seed=0):
  ids = np.random.default_rng(seed).integers(512, size=(B, T), dtype=np.int32)
  positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
  return ids, positions, np.ones_like(ids)


@functools.partial(jax.jit, static_argnames="decoder")
def _forward(params, *batch, decoder):
  return decoder.apply({"params": params}, *batch)[0]


def forward(decoder, params, *batch):
  return _forward(params, *batch, decoder=decoder)


def paths(config):
  """The contract, written out again here."""
  L, D, F, V = 2, 64, 192, 512
  N, K, H = 4, 2, 24
  tree = {
    "embed/embedding": (V, D),
    "layers/attention_norm/scale": (L, D),
    "layers/attention/query/kernel": (L, D, N * H),
    "layers/attention/key/kernel": (L, D, K * H),
    "layers/attention/value/kernel": (L, D, K * H),
    "layers/attention/out/kernel": (L, N * H, D),
    "layers/mlp_norm/scale": (L, D),
    "layers/mlp/gate/kernel": (L, D, F),
    "layers/mlp/up/kernel": (L, D, F),
    "layers/mlp/down/kernel": (L, F, D),
    "final_norm/scale": (D,),
  }
  return tree if config.tied_embeddings else tree | {"head/kernel": (D, V)}


@pytest.mark.parametrize("config", [NANO, UNTIED], ids=["tied", "untied"])
def test_params_are_a_plain_dict_of_the_agreed_paths(config):
  params = params_of(config)
  flat = names.flatten(params)
  assert {path: leaf.shape for path, leaf in flat.items()} == paths(config)
  assert all(leaf.dtype == np.float32 for leaf in flat.values())
  assert type(params) is dict and type(params["layers"]) is dict
  total = sum(int(np.prod(shape)) for shape in paths(config).values())
  assert decoder_lib.count_parameters(config) == total


def test_published_parameter_count():
  # huggingface.co/HuggingFaceTB/SmolLM2-135M
  smollm2 = sizes.get("smollm2-135m")
  assert decoder_lib.count_parameters(smollm2) == 134_515_008


def test_initialisation():
  params = fresh(UNTIED)
  for path, leaf in names.flatten(params).items():
    if path.endswith("scale"):
      assert (leaf == 1).all()
      continue
    # Two layers: what ends in the residual stream is divided by sqrt(2 * 2).
    last = "out" in path or "down" in path
    want = 0.02 / 2 if last else 0.02
    np.testing.assert_allclose(leaf.std(), want, rtol=0.05, err_msg=path)
    # A standard error of the mean is want / sqrt(size).
    assert abs(leaf.mean()) < 4 * want / leaf.size**0.5, path
  layers = params["layers"]["mlp"]["up"]["kernel"]
  assert not np.array_equal(layers[0], layers[1])


@pytest.mark.parametrize("config", [NANO, UNTIED], ids=["tied", "untied"])
def test_equals_a_second_llama_in_numpy(config):
  """proof.reference_logits shares nothing with the model but the config."""
  params = params_of(config)
  source = weights.from_params(config, params, "hf")
  ids, positions, segments = tokens(1, 40)
  want = proof.reference_logits(config, source, ids[0].tolist())[0]
  ours = forward(decoder_lib.Decoder(config), params, ids, positions, segments)
  assert np.abs(want).max() > 1
  np.testing.assert_allclose(ours[0], want, atol=2e-4)


@pytest.mark.parametrize("attention", ["reference", "chunked"])
def test_causality_by_gradient(attention):
  """No logit moves with a later token's embedding; all move with earlier."""
  decoder = decoder_lib.Decoder(UNTIED, attention=attention)
  T, at = 12, 5
  ids = np.arange(T, dtype=np.int32)[None]
  _, positions, segments = tokens(1, T)
  # Every token is another word, so a row of the embedding's gradient is the
  # gradient by that token's input.
  params = params_of(UNTIED)

  def one_logit(embedding):
    changed = params | {"embed": {"embedding": embedding}}
    logits, _ = decoder.apply({"params": changed}, ids, positions, segments)
    return jnp.sum(jnp.sin(logits[0, at]))

  gradient = jax.jit(jax.grad(one_logit))(params["embed"]["embedding"])
  by_token = np.abs(np.asarray(gradient)[:T]).max(-1)
  assert (by_token[: at + 1] > 0).all()
  assert (by_token[at + 1 :] == 0).all()


@pytest.mark.parametrize("attention", ["reference", "chunked"])
def test_packed_equals_separate(attention):
  decoder = decoder_lib.Decoder(NANO, attention=attention)
  params = params_of(NANO)
  ids, positions, segments = tokens(1, 30)
  for number, span in enumerate((slice(0, 11), slice(11, 24)), start=1):
    positions[0, span] = np.arange(span.stop - span.start)
    segments[0, span] = number
  segments[0, 24:] = 0
  packed = forward(decoder, params, ids, positions, segments)
  assert np.isfinite(packed).all()
  for span in (slice(0, 11), slice(11, 24)):
    size = span.stop - span.start
    alone = forward(decoder, params, ids[:, span], *tokens(1, size)[1:])
    np.testing.assert_allclose(packed[:, span], alone, atol=2e-5)
  # The second document would read otherwise if it saw the first.
  one = forward(decoder, params, *tokens(1, 30))
  assert np.abs(one[:, 11:24] - packed[:, 11:24]).max() > 0.1


def loss_and_gradients(decoder, params, batch):
  def loss(params):
    return decoder.apply({"params": params}, *batch, 0.0, method="loss_sum")[0]

  return jax.jit(jax.value_and_grad(loss))(params)


def training_batch(B, T):
  ids, positions, segments = tokens(B, T)
  weights = np.ones((B, T), np.float32)
  weights[:, -1] = 0
  return ids, positions, segments, np.roll(ids, -1, axis=1), weights


@functools.cache
def plain_gradients():
  decoder = decoder_lib.Decoder(NANO, rematerialise="none")
  return loss_and_gradients(decoder, params_of(NANO), training_batch(2, 24))


@pytest.mark.parametrize("rematerialise", ["dots", "attention", "full"])
def test_rematerialisation_changes_nothing(rematerialise):
  """The same sums, but XLA orders some of them otherwise."""
  decoder = decoder_lib.Decoder(NANO, rematerialise=rematerialise)
  ours = loss_and_gradients(decoder, params_of(NANO), training_batch(2, 24))
  largest = max(np.abs(g).max() for g in jax.tree.leaves(ours[1]))
  for a, b in zip(
    jax.tree.leaves(ours), jax.tree.leaves(plain_gradients()), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * largest)


def test_each_rematerialisation_keeps_what_it_says():
  """Products in a layer's gradient: what is computed again is more of them."""

  def products(rematerialise):
    decoder = decoder_lib.Decoder(NANO, rematerialise=rematerialise)
    batch = training_batch(2, 24)

    def loss(params):
      return decoder.apply({"params": params}, *batch, 0.0, method="loss_sum")[
        0
      ]

    program = str(jax.make_jaxpr(jax.grad(loss))(fresh(NANO)))
    return program.count("dot_general[")

  count = {name: products(name) for name in decoder_lib.REMATERIALISATION}
  # Query, key, value, out, gate, up: down's output is no part of a gradient.
  # The scores and the values' sum of attention, which has one tile here.
  assert count["none"] == count["dots"]
  assert count["attention"] - count["none"] == 6
  assert count["full"] - count["attention"] == 2


def test_scan_equals_unrolled():
  decoder = decoder_lib.Decoder(NANO, scan=False, rematerialise="none")
  params = params_of(NANO)
  value, gradients = loss_and_gradients(
    decoder, unrolled_lib.unstack(params), training_batch(2, 24)
  )
  want_value, want = plain_gradients()
  np.testing.assert_allclose(value, want_value, rtol=1e-6)
  unstacked = unrolled_lib.unstack(want)
  assert jax.tree.structure(gradients) == jax.tree.structure(unstacked)
  largest = max(np.abs(g).max() for g in jax.tree.leaves(want))
  for a, b in zip(
    jax.tree.leaves(gradients), jax.tree.leaves(unstacked), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-5 * largest)


def test_loss_sum_is_the_logits_loss():
  """One forward: loss_sum, token_nll and logits tell the same."""
  ids, positions, segments, targets, weights = batch = training_batch(2, 24)
  decoder = decoder_lib.Decoder(NANO)
  variables = {"params": params_of(NANO)}

  @jax.jit
  def all_three():
    logits, _ = decoder.apply(variables, ids, positions, segments)
    return (
      logits,
      decoder.apply(variables, *batch[:4], method="token_nll"),
      *decoder.apply(variables, *batch, 0.5, method="loss_sum"),
    )

  logits, nll, total, same_nll = all_three()
  logits = np.asarray(logits, np.float64)
  log_sums = np.log(np.exp(logits).sum(-1, keepdims=True))
  logprobs = logits - log_sums
  want = -np.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(nll, want, atol=1e-4)
  np.testing.assert_allclose(same_nll, want, atol=1e-4)
  want = weights * (want + 0.5 * log_sums[..., 0] ** 2)
  np.testing.assert_allclose(total, want.sum(), rtol=1e-5)


def test_bfloat16_stays_close():
  params = fresh(NANO)
  batch = tokens(2, 24)
  high = forward(decoder_lib.Decoder(NANO), params, *batch)
  low = forward(decoder_lib.Decoder(NANO, dtype="bfloat16"), params, *batch)
  assert low.dtype == jnp.float32
  difference = np.abs(low - high)
  # Rounded to 8 bits, hundreds of times: 2 % of the logits' spread; and not
  # zero, or dtype does nothing.
  assert 1e-5 < difference.max() < 0.05 * np.std(high) * 5
  assert difference.mean() < 0.02 * np.std(high)


@pytest.mark.parametrize(
  "field, value",
  [("dtype", "float4"), ("attention", "flash"), ("rematerialise", "some")],
)
def test_unknown_choices_are_refused(field, value):
  with pytest.raises(errors.ConfigError) as caught:
    decoder_lib.Decoder(NANO, **{field: value})
  assert f"model.{field}='{value}'" in str(caught.value)
  assert "use one of" in str(caught.value)
