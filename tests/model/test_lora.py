"""LoRA: against transformers and PEFT, against merged weights, and its costs.

tests/golden/make_lora.py made the numbers, in float32 on both sides.
"""

import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from llama_jax import errors
from llama_jax.checkpoint import hugging_face
from llama_jax.kernels import int8
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import lora as lora_lib
from llama_jax.model import sizes
from llama_jax.model import unrolled as unrolled_lib
from llama_jax.parallel import mesh as mesh_lib
from llama_jax.training import state as state_lib
from llama_jax.training import step as step_lib

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lora"
NANO = sizes.get("nano")
MODULES = {
  "query": ("attention", "self_attn.q_proj"),
  "key": ("attention", "self_attn.k_proj"),
  "value": ("attention", "self_attn.v_proj"),
  "out": ("attention", "self_attn.o_proj"),
  "gate": ("mlp", "mlp.gate_proj"),
  "up": ("mlp", "mlp.up_proj"),
  "down": ("mlp", "mlp.down_proj"),
}
LORA = lora_lib.LoRA(4, 6.0, tuple(MODULES), "float32")


def from_peft(held):
  """Arrays under PEFT's names as our tree."""
  layers = {"attention": {}, "mlp": {}}
  for target, (module, theirs) in MODULES.items():
    prefix = "base_model.model.model.layers"
    layers[module][target] = {
      f"lora_{letter.lower()}": np.stack(
        [held[f"{prefix}.{i}.{theirs}.lora_{letter}.weight"].T for i in (0, 1)]
      )
      for letter in "AB"
    }
  return {"layers": layers}


@functools.partial(jax.jit, static_argnums=(0, 1))
def at_first(config, lora):
  return nn.unbox(lora_lib.init(config, lora, jax.random.key(0)))


def fresh(config, lora=LORA):
  """Adapters, with something in B."""
  rng = np.random.default_rng(1)

  def filled(path, leaf):
    made = np.asarray(leaf)
    if path[-1].key == "lora_b":
      made = 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
    return made

  return jax.tree.map_with_path(filled, at_first(config, lora))


def batch_of(ids):
  positions = np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1))
  return ids, positions, np.ones(ids.shape, np.int32)


IDS = np.random.default_rng(0).integers(512, size=(4, 17), dtype=np.int32)


def decoder_of(config, **settings):
  return decoder_lib.Decoder(config, attention="reference", **settings)


@functools.partial(jax.jit, static_argnames="decoder")
def _logits(params, *batch, decoder):
  return decoder.apply({"params": params}, *batch)[0]


def logits(config, params, ids=IDS, **settings):
  decoder = decoder_of(config, **settings)
  return _logits(params, *batch_of(ids), decoder=decoder)


def loss(decoder, scale, adapters, base, ids):
  """The mean over next tokens, and each one's."""
  lora = lora_lib.LoRA(1, scale, ("query",), "float32")
  params = lora_lib.join(base, adapters, lora)
  ids, positions, segments = batch_of(ids)
  total, nll_BT = decoder.apply(
    {"params": params},
    ids[:, :-1],
    positions[:, :-1],
    segments[:, :-1],
    ids[:, 1:],
    np.ones(ids[:, 1:].shape, np.float32),
    0.0,
    method="loss_sum",
  )
  return total / nll_BT.size, nll_BT


@functools.partial(jax.jit, static_argnames=("decoder", "scale"))
def gradient(adapters, base, ids=IDS, *, decoder, scale=1.5):
  """((loss, nll), gradients); scale is LORA's."""
  return jax.value_and_grad(
    functools.partial(loss, decoder, scale), has_aux=True
  )(adapters, base, ids)


def merged(params, adapters, lora):
  """W + alpha / rank A B, in float64."""
  layers = {name: dict(tree) for name, tree in params["layers"].items()}
  for module, targets in adapters["layers"].items():
    for name, pair in targets.items():
      a, b = (np.asarray(pair[k], np.float64) for k in ("lora_a", "lora_b"))
      kernel = layers[module][name]["kernel"] + lora.alpha / lora.rank * a @ b
      layers[module][name] = {"kernel": kernel.astype(np.float32)}
  return params | {"layers": layers}


@pytest.fixture(scope="module")
def params(random_params):
  return random_params(NANO)


def test_losses_and_gradients_are_those_of_transformers():
  golden = dict(np.load(GOLDEN / "golden.npz"))
  config, base, _ = hugging_face.read(GOLDEN / "base")
  file = GOLDEN / "adapter" / "adapter_model.safetensors"
  adapters = from_peft(safetensors.numpy.load_file(file))
  ids = golden["ids"].astype(np.int32)
  (value, nll), gradients = gradient(
    adapters, base, ids, decoder=decoder_of(config), scale=5 / 3
  )
  assert abs(value - golden["loss"]) < 1e-5
  logprobs = jax.nn.log_softmax(golden["logits"][:, :-1])
  want = -np.take_along_axis(logprobs, ids[:, 1:, None], -1)[..., 0]
  np.testing.assert_allclose(nll, want, atol=1e-5)
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5),
    gradients,
    from_peft(golden),
  )


def test_what_is_made_at_first():
  lora = lora_lib.LoRA(8, 16, ("up", "query"), "bfloat16")
  assert lora.targets == ("query", "up")
  boxed = jax.jit(lambda: lora_lib.init(NANO, lora, jax.random.key(0)))()
  assert set(boxed) == {"layers"}
  assert {m: set(t) for m, t in boxed["layers"].items()} == {
    "attention": {"query"},
    "mlp": {"up"},
  }
  pair = boxed["layers"]["mlp"]["up"]
  assert pair["lora_a"].names == ("layers", "embed", None)
  assert pair["lora_b"].names == ("layers", None, "mlp")
  a, b = (np.asarray(nn.unbox(pair)[name]) for name in ("lora_a", "lora_b"))
  assert a.shape == (2, 64, 8) and b.shape == (2, 8, 192)
  assert not b.any()
  # Uniform within 1 / 8: a standard deviation of 1 / 8 / sqrt(3).
  assert 0.12 < np.abs(a).max() <= 0.125
  assert a.std() == pytest.approx(0.125 / 3**0.5, rel=0.05)
  # Whatever else is adapted, a target begins alike; and no two layers do.
  alone = at_first(NANO, dataclasses.replace(lora, targets=("query",)))
  query = alone["layers"]["attention"]["query"]["lora_a"]
  both = boxed["layers"]["attention"]["query"]["lora_a"].value
  np.testing.assert_array_equal(query, both)
  assert (a[0] != a[1]).any()


def test_a_reward_models_score_is_trained_whole(random_params):
  scalar = dataclasses.replace(NANO, head="scalar")
  base = lora_lib.freeze(random_params(scalar), LORA)
  assert "score" not in base
  adapters = at_first(scalar, LORA)
  assert adapters["score"]["kernel"].shape == (64, 1)
  assert np.asarray(adapters["score"]["kernel"]).any()
  joined = lora_lib.join(base, adapters, LORA)
  assert joined["score"]["kernel"] is adapters["score"]["kernel"]


def test_with_b_zero_nothing_changes(params):
  joined = lora_lib.join(params, at_first(NANO, LORA), LORA)
  np.testing.assert_array_equal(logits(NANO, joined), logits(NANO, params))


def test_apart_equals_merged(params):
  """Stacked as for training, and unrolled as for decoding."""
  adapters = fresh(NANO)
  want = logits(NANO, merged(params, adapters, LORA))
  joined = lora_lib.join(params, adapters, LORA)
  spread = float(jnp.std(want))
  np.testing.assert_allclose(logits(NANO, joined), want, atol=1e-4 * spread)
  unrolled = unrolled_lib.unstack(jax.tree.map(jnp.asarray, joined))
  np.testing.assert_allclose(
    logits(NANO, unrolled, scan=False), want, atol=1e-4 * spread
  )
  assert np.abs(logits(NANO, params) - want).max() > 0.1 * spread


@pytest.mark.slow
def test_the_frozen_weights_gradients_are_not_computed(params):
  """Of each weight two products, forward and by x, and not the third by the
  weight; nor the head's, and no product twice."""

  def work(*args):
    decoder = decoder_of(NANO, rematerialise="none")
    compiled = gradient.lower(*args, decoder=decoder).compile()
    return compiled.cost_analysis()["flops"]

  small = dataclasses.replace(LORA, rank=1, targets=("query",))
  # Params in the place of adapters: all of them are trained.
  ours, whole = work(fresh(NANO, small), params), work(params, {})
  assert ours < 0.75 * whole


INT8 = dataclasses.replace(LORA, base_dtype="int8")


def widened(base):
  """The float32 base that a quantized one stands for."""

  def one(leaf):
    if not is_quantized(leaf):
      return leaf.astype(jnp.float32)
    return jax.vmap(int8.dequantize)(leaf).swapaxes(1, 2)

  return jax.tree.map(one, base, is_leaf=is_quantized)


def assert_alike(got, want):
  """Of what gradient gives, but for the order of sums in float32."""
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(
      ours, theirs, atol=1e-4 * np.abs(theirs).max()
    ),
    got,
    want,
  )


def is_quantized(leaf):
  return isinstance(leaf, int8.Quantized)


def test_a_quantized_base_is_the_weights_it_stands_for(params):
  base = jax.jit(functools.partial(lora_lib.freeze, lora=INT8))(params)
  held = base["layers"]["mlp"]["down"]["kernel"]
  assert held.values.shape == (2, 64, 192) and held.values.dtype == jnp.int8
  assert held.scale_O.shape == (2, 64)
  assert base["embed"]["embedding"].dtype == jnp.bfloat16
  assert base["final_norm"]["scale"].dtype == jnp.float32
  # Within half a step of the weights that it was made of.
  stands_for = widened(base)
  off = stands_for["layers"]["mlp"]["down"]["kernel"]
  off = np.abs(off - params["layers"]["mlp"]["down"]["kernel"])
  assert (off <= 0.501 * np.asarray(held.scale_O)[:, None]).all()
  adapters, decoder = fresh(NANO, INT8), decoder_of(NANO)
  assert_alike(
    gradient(adapters, base, decoder=decoder),
    gradient(adapters, stands_for, decoder=decoder),
  )


@pytest.mark.slow
def test_the_layers_are_not_widened_at_once():
  """Not in either pass, nor kept from one for the other: temporaries are fewer
  bytes than the weights are in int8."""
  config = dataclasses.replace(
    NANO, num_layers=16, embed_dim=256, mlp_dim=1024, vocab_size=64
  )
  decoder = decoder_of(config, rematerialise="none")
  adapters, base = jax.eval_shape(
    lambda: (
      at_first(config, INT8),
      lora_lib.freeze(
        nn.unbox(decoder_lib.init(decoder, jax.random.key(0))), INT8
      ),
    )
  )
  ids = np.zeros((1, 3), np.int32)
  compiled = gradient.lower(adapters, base, ids, decoder=decoder).compile()
  kernels = sum(
    leaf.values.size
    for leaf in jax.tree.leaves(base, is_leaf=is_quantized)
    if is_quantized(leaf)
  )
  assert compiled.memory_analysis().temp_size_in_bytes < kernels


def test_sharded_equals_one_device(params):
  devices = mesh_lib.make(mesh_lib.ParallelConfig(data=2, fsdp=2, tensor=2))
  decoder = decoder_of(NANO)
  optimizer = optax.identity()
  _, whole = state_lib.shardings(
    functools.partial(decoder_lib.init, decoder), optimizer, devices
  )
  _, placed = state_lib.shardings(
    functools.partial(lora_lib.init, NANO, INT8), optimizer, devices
  )
  pair = placed.params["layers"]["attention"]["query"]
  assert pair["lora_a"].spec == jax.P(None, "fsdp", None)
  assert pair["lora_b"].spec == jax.P(None, None, "tensor")
  freeze = functools.partial(lora_lib.freeze, lora=INT8)
  base, adapters = jax.jit(freeze)(params), fresh(NANO, INT8)
  with jax.set_mesh(devices):
    spread = jax.jit(
      freeze, out_shardings=lora_lib.shardings(whole.params, INT8)
    )(jax.device_put(params, whole.params))
    kernel = spread["layers"]["mlp"]["down"]["kernel"]
    assert kernel.values.sharding.spec == jax.P(None, "fsdp", "tensor")
    assert kernel.scale_O.sharding.spec == jax.P(None, "fsdp")
    placed = jax.device_put(adapters, placed.params)
    got = jax.device_get(gradient(placed, spread, decoder=decoder))
  assert_alike(got, gradient(adapters, base, decoder=decoder))


def test_eight_billion_fit_one_gpu():
  """What is held from step to step, from the published shapes."""
  config = sizes.get("llama3.1-8b")
  lora = lora_lib.LoRA(16, 32, tuple(MODULES), "bfloat16")
  found = lora_lib.account(config, lora)
  L, D, F, K, V = 32, 4096, 14336, 1024, 128256
  into = 4 * D + 2 * D + F
  out = D + 2 * K + D + 2 * F + D
  adapters = 4 * L * 16 * (into + out)
  weights = L * (2 * D * D + 2 * D * K + 3 * D * F) + 2 * V * D
  norms = 4 * (2 * L + 1) * D
  assert found == {
    "base": 2 * weights + norms,
    "adapters": adapters,
    "gradients": adapters,
    "moments": 2 * adapters,
  }
  # 17 GB, or 10 with a base in int8; the rest is for activations.
  assert sum(found.values()) < 17e9
  int8_found = lora_lib.account(
    config, dataclasses.replace(lora, base_dtype="int8")
  )
  layers = weights - 2 * V * D
  assert int8_found["base"] == layers + 4 * V * D + norms + 4 * L * out
  assert sum(int8_found.values()) < 10e9


@pytest.mark.parametrize(
  "field, value",
  [
    ("rank", 0),
    ("rank", 4.0),
    ("rank", True),
    ("alpha", 0),
    ("alpha", float("nan")),
    ("targets", ()),
    ("targets", "query"),
    ("targets", ("query", "head")),
    ("base_dtype", "int4"),
  ],
)
def test_illegal_fields_are_named(field, value):
  with pytest.raises(errors.ConfigError, match=rf"lora\.{field}="):
    dataclasses.replace(LORA, **{field: value})


@pytest.mark.slow
@pytest.mark.parametrize("base_dtype, most", [("bfloat16", 40), ("int8", 34)])
def test_an_8b_trains_in_80_gb(tpu_topology, base_dtype, most):
  """A whole update of 4 x 4,096 tokens, compiled for one chip that has them.

  most, GB, is half of what there is: a GPU's compiler plans otherwise.
  """
  config = sizes.get("llama3.1-8b")
  lora = lora_lib.LoRA(16, 32.0, tuple(MODULES), base_dtype)
  decoder = decoder_lib.Decoder(
    config, dtype="bfloat16", attention="auto", rematerialise="full"
  )
  mesh = mesh_lib.make(
    mesh_lib.ParallelConfig(1, 1, 1), tpu_topology.devices[:1]
  )
  optimizer = optax.adamw(1e-4)

  def objective(adapters, batch, frozen):
    batch = dict(batch)
    weights = batch.pop("weights")
    total, _ = decoder.apply(
      {"params": lora_lib.join(frozen, adapters, lora)},
      **batch,
      weights_BT=weights,
      z_loss=0.0,
      method="loss_sum",
    )
    return total, (weights.sum(), {})

  def held():
    whole = nn.unbox(decoder_lib.init(decoder, jax.random.key(0)))
    adapters = nn.unbox(lora_lib.init(config, lora, jax.random.key(0)))
    names = ("ids_BT", "positions_BT", "segments_BT", "targets_BT")
    batch = {name: jnp.zeros((1, 4, 4096), jnp.int32) for name in names}
    batch["weights"] = jnp.zeros((1, 4, 4096))
    state = state_lib.create(adapters, optimizer)
    return state, batch, jnp.float32(0), lora_lib.freeze(whole, lora)

  with jax.set_mesh(mesh):
    program = (
      jax.jit(
        step_lib.make(objective, optimizer, 0.0),
        in_shardings=jax.NamedSharding(mesh, jax.P()),
        donate_argnums=0,
      )
      .lower(*jax.eval_shape(held))
      .compile()
    )
  memory = program.memory_analysis()
  kept = memory.argument_size_in_bytes
  told = sum(lora_lib.account(config, lora).values())
  told -= lora_lib.account(config, lora)["gradients"]
  # But for the batch, and what pads arrays to a chip's tiles.
  np.testing.assert_allclose(kept, told, rtol=0.02)
  assert kept + memory.temp_size_in_bytes < most * 1e9
  print(f"{kept / 1e9:.1f} + {memory.temp_size_in_bytes / 1e9:.1f} GB")
