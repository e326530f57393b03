"""A run's checkpoints on other meshes and in several processes (R6)."""

import dataclasses
import functools
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint import steps
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes
from llama_jax.objectives import next_token
from llama_jax.parallel import hosts, mesh
from llama_jax.training import optimizer as optimizer_lib
from llama_jax.training import state as state_lib
from llama_jax.training import step as step_lib

NANO = sizes.get("nano")
RECIPE = optimizer_lib.OptimizerConfig(
  peak_lr=1e-2,
  schedule="constant",
  warmup_steps=2,
  final_lr_fraction=0.1,
  decay_fraction=0.1,
  b1=0.9,
  b2=0.95,
  eps=1e-8,
  weight_decay=0.1,
  clip_norm=1.0,
  moments_dtype="float32",
)
# data, fsdp, tensor on 1, 2, 4 and 8 devices.
MESHES = [
  (1, 1, 1),
  (2, 1, 1),
  (1, 2, 1),
  (1, 1, 2),
  (2, 2, 1),
  (1, 2, 2),
  (2, 2, 2),
  (1, 8, 1),
]


def mesh_of(axes):
  count = int(np.prod(axes))
  return mesh.make(mesh.ParallelConfig(*axes), jax.devices()[:count])


@functools.cache
def placed_on(axes):
  """(shapes, shardings) of a whole nano state on a mesh."""
  return state_lib.shardings(
    functools.partial(decoder_lib.init, decoder_lib.Decoder(NANO)),
    optimizer_lib.make(RECIPE),
    mesh_of(axes),
  )


def parts(state):
  """(params, everything else) of a state."""
  rest = {
    field.name: getattr(state, field.name)
    for field in dataclasses.fields(state)
    if field.name != "params"
  }
  return state.params, rest


def random_state(axes, seed=0):
  """Every leaf of params and optimizer random, NaNs and -0 among them."""
  shapes, shardings = placed_on(axes)
  rng = np.random.default_rng(seed)

  def fill(shape, sharding):
    if not shape.shape:
      return jax.device_put(np.asarray(rng.integers(99), shape.dtype), sharding)
    leaf = rng.normal(size=shape.shape).astype(shape.dtype)
    leaf.flat[:3] = [np.nan, -0.0, np.inf]
    return jax.device_put(leaf, sharding)

  return parts(jax.tree.map(fill, shapes, shardings))


def targets(axes):
  shapes, shardings = placed_on(axes)
  return parts(
    jax.tree.map(
      lambda shape, sharding: jax.ShapeDtypeStruct(
        shape.shape, shape.dtype, sharding=sharding
      ),
      shapes,
      shardings,
    )
  )


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_state_comes_back_bitwise_on_any_mesh(tmp_path, capsys):
  """R6: saved on each mesh, restored on each other; optimizer too."""
  pairs = 0
  for number, axes in enumerate(MESHES):
    params, rest = random_state(axes, seed=number)
    with steps.Checkpoints(tmp_path, keep=1) as checkpoints:
      checkpoints.save(number, params, rest, {"step": number})
      checkpoints.wait()
      others = [other for other in MESHES if other != axes]
      # All pairs take a minute; these are each mesh with two others, of
      # another number of devices and not.
      for other in (others[number % 7], others[(number + 3) % 7]):
        wanted = targets(other)
        got = checkpoints.restore(*wanted)
        assert got.step == number and got.meta == {"step": number}
        for ours, want in zip(got[1:3], (params, rest), strict=True):
          assert jax.tree.structure(ours) == jax.tree.structure(want)
          assert bits(ours) == bits(want)
        for leaf, target in zip(
          jax.tree.leaves(got[1:3]), jax.tree.leaves(wanted), strict=True
        ):
          assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)
          assert leaf.dtype == target.dtype
        pairs += 1
  assert pairs >= 12
  with capsys.disabled():
    print(f"\nR6: {pairs} pairs of meshes, all leaves bitwise equal")


@pytest.mark.parametrize(
  "meshes",
  [
    [(2, 2, 2)],
    pytest.param([(2, 1, 1), (1, 2, 2), (1, 8, 1)], marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_the_next_losses_on_another_mesh(meshes, tmp_path, capsys):
  """R6: after a restore, 20 steps of training as on the mesh it came from."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 64, (24, 1, 8, 33)).astype(np.int32)
  decoder = decoder_lib.Decoder(NANO)
  optimizer = optimizer_lib.make(RECIPE)

  def loss_sum(params, *args):
    return decoder.apply({"params": params}, *args, 0.0, method="loss_sum")

  update = step_lib.make(next_token.make(loss_sum, 1), optimizer, 0.0)

  @functools.cache
  def compiled(axes):
    return jax.jit(update, out_shardings=(placed_on(axes)[1], None))

  def go_on(state, axes, numbers):
    losses = []
    devices = mesh_of(axes)
    for number in numbers:
      ids = tokens[number]
      shape = ids[..., :-1].shape
      batch = {
        "tokens": ids[..., :-1],
        "targets": ids[..., 1:],
        "positions": np.broadcast_to(np.arange(32, dtype=np.int32), shape),
        "segments": np.ones(shape, np.int32),
        "loss_mask": np.ones(shape, np.float32),
      }
      batch = hosts.put_batch(batch, devices, axis=1)
      batch["sources"] = jnp.zeros(shape[:2], jnp.int32)
      state, values = compiled(axes)(state, batch, jnp.float32(1e-3))
      losses.append(float(values["loss"]))
    return state, losses

  one = (1, 1, 1)
  with jax.set_mesh(mesh_of(one)):
    _, placed = placed_on(one)

    def first():
      params = nn.unbox(decoder_lib.init(decoder, jax.random.key(0)))
      return state_lib.create(params, optimizer)

    state = jax.jit(first, out_shardings=placed)()
    state, _ = go_on(state, one, range(4))
    with steps.Checkpoints(tmp_path, keep=1) as checkpoints:
      checkpoints.save(4, *parts(state), {"step": 4})
    _, want = go_on(state, one, range(4, 24))
  assert want[-1] < want[0]
  furthest = 0.0
  for axes in meshes:
    with (
      jax.set_mesh(mesh_of(axes)),
      steps.Checkpoints(tmp_path, keep=1) as checkpoints,
    ):
      got = checkpoints.restore(*targets(axes))
      again = state_lib.TrainState(params=got.params, **got.rest)
      _, losses = go_on(again, axes, range(4, 24))
    furthest = max(furthest, np.max(np.abs(np.divide(losses, want) - 1)))
  with capsys.disabled():
    print(
      f"\nR6: 20 losses on {len(meshes)} other meshes differ by {furthest:.1e}"
    )
  assert furthest < 1e-5


PROCESS = """
import sys
import jax, numpy as np
from llama_jax import shell
shell.simulate_devices(4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
number, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, number)
from llama_jax import errors
from llama_jax.checkpoint import manifest, steps
from llama_jax.parallel import mesh
devices = mesh.make(mesh.ParallelConfig(1, 8, 1))
rows = jax.NamedSharding(devices, jax.P("fsdp"))
target = {"w": jax.ShapeDtypeStruct((16, 4), np.float32, sharding=rows)}

def array(value):
  whole = np.full((16, 4), value, np.float32)
  return jax.make_array_from_callback(whole.shape, rows, whole.__getitem__)

with steps.Checkpoints(folder, 2) as checkpoints:
  got = checkpoints.restore(target, target)
  start = got.step if got else 0
  for step in range(start + 1, start + 4):
    checkpoints.save(step, {"w": array(step)}, {"w": array(-step)}, {"a": step})
  checkpoints.wait()
  got = checkpoints.restore(target, target)
  for shard in got.params["w"].addressable_shards:
    assert (np.asarray(shard.data) == got.step).all()
  assert got.meta == {"a": got.step}
  if number == 0:
    def broken(folder):
      raise OSError(5, "Input/output error")
    manifest.write = broken
  try:
    checkpoints.save(99, {"w": array(1)}, {"w": array(1)}, {})
    checkpoints.wait()
  except errors.UserError:
    print(start, got.step, checkpoints.latest())
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
  """They save one checkpoint, pass over a damaged one together, and both know
  of a commit that failed in one."""

  def both():
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-c", PROCESS]
    processes = [
      subprocess.Popen(
        [*command, str(number), str(port), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for number in range(2)
    ]
    done = [process.communicate(timeout=200) for process in processes]
    for out, err in done:
      assert out, err
    return [out.splitlines()[-1] for out, _ in done], done[0][1]

  def names(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())

  said, _ = both()
  assert said == ["0 3 3"] * 2 and names(tmp_path) == ["2", "3"]
  file = next((tmp_path / "checkpoints" / "3").rglob("_METADATA"))
  file.write_bytes(file.read_bytes()[:-1])
  said, warned = both()
  assert said == ["2 5 5"] * 2 and "3.damaged" in warned
  assert names(tmp_path) == ["3.damaged", "4", "5"]
