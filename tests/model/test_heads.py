"""A reward model's head: what it computes, where it lies, how it begins."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax import errors
from llama_jax.checkpoint import names, proof, weights
from llama_jax.kernels import int8
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import heads, quantize, sizes
from llama_jax.model import unrolled as unrolled_lib
from llama_jax.parallel import mesh, rules
from llama_jax.training import flops

TIED = sizes.get("nano")
UNTIED = dataclasses.replace(TIED, tied_embeddings=False)
REWARD = dataclasses.replace(TIED, head="scalar")
DECODER = decoder_lib.Decoder(REWARD)


def tokens(B, T, seed=0):
  ids = np.random.default_rng(seed).integers(512, size=(B, T), dtype=np.int32)
  positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
  return ids, positions, np.ones_like(ids)


@functools.partial(jax.jit, static_argnames="decoder")
def _rewards(params, *batch, decoder):
  return decoder.apply({"params": params}, *batch, method="rewards")


def rewards(params, *batch, decoder=DECODER):
  return np.asarray(_rewards(params, *batch, decoder=decoder))


def boxed(config):
  decoder = decoder_lib.Decoder(config)
  return jax.eval_shape(lambda: decoder_lib.init(decoder, jax.random.key(0)))


@pytest.mark.parametrize("words", [TIED, UNTIED], ids=["tied", "untied"])
def test_one_column_in_place_of_the_words(words):
  reward = dataclasses.replace(words, head="scalar")
  ours, theirs = (
    {path: (leaf.shape, leaf.dtype) for path, leaf in flat.items()}
    for flat in (names.flatten(nn.unbox(boxed(c))) for c in (reward, words))
  )
  theirs.pop("head/kernel", None)
  assert ours == theirs | {"score/kernel": ((64, 1), jnp.float32)}
  size = decoder_lib.count_parameters(reward)
  assert size == decoder_lib.count_parameters(TIED) + 64


def test_a_new_score():
  """Of variance 1 / (D + 1), alike where it is made with a model and after."""
  D, key = 4096, jax.random.key(3)
  params = nn.unbox(heads.Score(D).init(key, jnp.zeros((1, 1, D))))["params"]
  begun = heads.to_scalar({"final_norm": {"scale": jnp.ones(D)}}, key)["score"]
  for kernel in (params["kernel"], begun["kernel"]):
    assert kernel.shape == (D, 1) and kernel.dtype == jnp.float32
    # A standard error of 1.1 %.
    np.testing.assert_allclose(kernel.std(), 4097**-0.5, rtol=0.05)
    assert abs(kernel.mean()) < 4 * 4097**-0.5 / D**0.5


def test_equals_a_second_llama_in_numpy(random_params):
  params = random_params(REWARD)
  ids, *rest = tokens(1, 40)
  source = weights.from_params(REWARD, params, "hf")
  (want,) = proof.reference_logits(REWARD, source, ids[0])
  assert np.abs(want).max() > 0.5
  ours = rewards(params, ids, *rest)
  assert ours.dtype == np.float32
  np.testing.assert_allclose(ours[0], want[:, 0], atol=2e-5)


def test_answers_of_one_row_do_not_see_each_other(random_params):
  """The reward of each segment's last token is that of the text alone."""
  params = random_params(REWARD)
  ids, positions, segments = tokens(1, 40)
  spans = (slice(0, 11), slice(11, 24), slice(24, 36))
  for number, span in enumerate(spans, start=1):
    positions[0, span] = np.arange(span.stop - span.start)
    segments[0, span] = number
  segments[0, 36:] = 0
  packed = rewards(params, ids, positions, segments)
  assert np.isfinite(packed).all()
  # One text a row, all padded to one length.
  alone = np.zeros((3, 40), np.int32)
  lengths = np.array([span.stop - span.start for span in spans])
  for row, span in zip(alone, spans, strict=True):
    row[: span.stop - span.start] = ids[0, span]
  _, positions, there = tokens(3, 40)
  there *= positions < lengths[:, None]
  separate = rewards(params, alone, positions, there)
  for number, span in enumerate(spans):
    np.testing.assert_allclose(
      packed[0, span.stop - 1], separate[number, lengths[number] - 1], atol=2e-5
    )


def test_unrolled_equals_scanned_and_is_not_quantized(random_params):
  params, batch = random_params(REWARD), tokens(2, 24)
  want = rewards(params, *batch)
  unrolled = decoder_lib.Decoder(REWARD, scan=False, rematerialise="none")
  turned = unrolled_lib.unstack(params)
  ours = rewards(turned, *batch, decoder=unrolled)
  np.testing.assert_allclose(ours, want, atol=2e-5)
  two = {name: turned[name] for name in ("score", "embed")}
  small = quantize.quantize(two, "int8")
  assert isinstance(small["embed"]["embedding"], int8.Quantized)
  assert small["score"]["kernel"] is turned["score"]["kernel"]


def test_bfloat16_states_are_scored_in_float32():
  rng = np.random.default_rng(0)
  x_BTD = jnp.asarray(rng.normal(size=(2, 3, 64)), jnp.bfloat16)
  kernel = rng.normal(size=(64, 1)).astype(np.float32)
  score = heads.Score(64).apply({"params": {"kernel": kernel}}, x_BTD)
  want = np.asarray(x_BTD, np.float64) @ kernel.astype(np.float64)
  assert score.dtype == jnp.float32
  # Products of bfloat16 would be 0.03 off.
  np.testing.assert_allclose(score, want[..., 0], atol=1e-5)


def test_sharded_equals_one_device(random_params):
  params, batch = random_params(REWARD), tokens(8, 16)
  want = rewards(params, *batch)
  devices = mesh.make(mesh.ParallelConfig(2, 2, 2), jax.devices())
  placed = rules.shardings(
    devices,
    jax.tree.map(
      lambda axes: rules.spec(tuple(axes)),
      nn.get_partition_spec(boxed(REWARD)),
      is_leaf=lambda one: isinstance(one, P),
    ),
  )
  assert placed["score"]["kernel"].spec == P("fsdp", None)
  with jax.set_mesh(devices):
    ours = rewards(jax.device_put(params, placed), *batch)
  np.testing.assert_allclose(ours, want, atol=2e-5)


def test_each_head_refuses_what_the_other_gives():
  batch = tokens(1, 8)
  more = (batch[0], np.ones((1, 8), np.float32), 0.0)
  for config, message, calls in (
    (
      REWARD,
      "model.head=scalar is a reward model",
      ((None, ()), ("token_nll", more[:1]), ("loss_sum", more)),
    ),
    (TIED, "model.head=words is a language model", (("rewards", ()),)),
  ):
    decoder, shapes = decoder_lib.Decoder(config), nn.unbox(boxed(config))
    for method, rest in calls:
      with pytest.raises(errors.ConfigError, match=message):
        jax.eval_shape(
          lambda params, d=decoder, m=method, r=rest: d.apply(
            {"params": params}, *batch, *r, method=m
          ),
          shapes,
        )


@pytest.mark.parametrize("words", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_reward_model_begins_as_a_language_model(words, random_params):
  params = random_params(words)
  reward = dataclasses.replace(words, head="scalar")
  begun = heads.to_scalar(params, jax.random.key(0))
  weights.check_params(reward, begun)
  for name in ("embed", "layers", "final_norm"):
    assert begun[name] is params[name]
  assert ("head" in params) == (not words.tied_embeddings)
  other = heads.to_scalar(params, jax.random.key(1))
  assert not np.array_equal(begun["score"]["kernel"], other["score"]["kernel"])
  # One that is a reward model already goes on as it is.
  assert heads.to_scalar(begun, jax.random.key(1)) is begun


def test_flops_count_one_column():
  """Every kernel and no embedding is what a token is multiplied with."""
  kernels = [row for row in names.rows(REWARD) if row.path.endswith("kernel")]
  sizes_of = [np.prod(names.our_shape(REWARD, row)) for row in kernels]
  assert flops.matmul_weights(REWARD) == sum(sizes_of)
