"""Checkpoints: bitwise, whole or not at all, on any mesh."""

import dataclasses
import functools
import json
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.checkpoint import names, store, weights
from llama_jax.model import decoder as decoder_lib
from llama_jax.model import sizes
from llama_jax.parallel import mesh
from llama_jax.training import optimizer as optimizer_lib
from llama_jax.training import state as state_lib

NANO = sizes.get("nano")
RECIPE = optimizer_lib.OptimizerConfig(
  peak_lr=1e-2,
  warmup_steps=2,
  final_lr_fraction=0.1,
  b1=0.9,
  b2=0.95,
  eps=1e-8,
  weight_decay=0.1,
  clip_norm=1.0,
)


def placed_on(*axes):
  """(shapes, shardings) of a whole nano state on a mesh."""
  return state_lib.shardings(
    functools.partial(decoder_lib.init, decoder_lib.Decoder(NANO)),
    optimizer_lib.make(RECIPE, 10),
    mesh.make(mesh.ParallelConfig(*axes)),
  )


def random_state(axes, seed=0):
  """Every leaf of params and optimizer random, NaNs and -0 among them."""
  shapes, shardings = placed_on(*axes)
  rng = np.random.default_rng(seed)

  def fill(shape, sharding):
    if not shape.shape:
      return jax.device_put(np.asarray(rng.integers(99), shape.dtype), sharding)
    leaf = rng.normal(size=shape.shape).astype(shape.dtype)
    leaf.flat[:3] = [np.nan, -0.0, np.inf]
    return jax.device_put(leaf, sharding)

  state = jax.tree.map(fill, shapes, shardings)
  return state.params, {"opt_state": state.opt_state, "skipped": state.skipped}


def targets(axes):
  shapes, shardings = placed_on(*axes)
  target = jax.tree.map(
    lambda shape, sharding: jax.ShapeDtypeStruct(
      shape.shape, shape.dtype, sharding=sharding
    ),
    shapes,
    shardings,
  )
  return target.params, {
    "opt_state": target.opt_state,
    "skipped": target.skipped,
  }


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def small(value=1.0):
  return {"kernel": np.full((2, 3), value, np.float32)}


def small_target():
  alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32, sharding=alone)}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
  """A folder with one whole step, 7, of a state on data=2, fsdp=2, tensor=2."""
  folder = tmp_path_factory.mktemp("run")
  store.write_model(folder, NANO, None)
  with store.Checkpoints(folder, keep=2) as checkpoints:
    checkpoints.save(7, *random_state((2, 2, 2)), {"step": 7})
  return folder


@pytest.fixture
def spoilt(run_folder, tmp_path):
  shutil.copytree(run_folder, tmp_path / "run")
  return tmp_path / "run"


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 8, 1), (8, 1, 1)], ids=str)
def test_a_state_comes_back_bitwise_on_any_mesh(run_folder, axes):
  params, rest = random_state((2, 2, 2))
  with store.Checkpoints(run_folder, keep=2) as checkpoints:
    assert checkpoints.latest() == 7
    got = checkpoints.restore(7, *targets(axes))
  assert got[2] == {"step": 7}
  for ours, want in zip(got[:2], (params, rest), strict=True):
    assert jax.tree.structure(ours) == jax.tree.structure(want)
    assert bits(ours) == bits(want)
  for leaf, target in zip(
    jax.tree.leaves(got[:2]), jax.tree.leaves(targets(axes)), strict=True
  ):
    assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)
    assert leaf.dtype == target.dtype


def test_arrays_may_change_while_a_save_is_under_way(tmp_path):
  params = {"kernel": jax.numpy.arange(1e6)}
  with store.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, params, small(), {"step": 1})
    change = jax.jit(lambda a: a * 0 - 1, donate_argnums=0)
    change(params["kernel"]).block_until_ready()
  store.write_model(tmp_path, NANO, None)
  read = store.read_params(tmp_path)
  np.testing.assert_array_equal(read["kernel"], np.arange(1e6, dtype="f4"))


def test_the_newest_few_are_kept(tmp_path):
  with store.Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest() is None
    for step in (1, 2, 5, 9):
      checkpoints.save(step, small(step), small(), {"step": step})
    checkpoints.wait()
    assert checkpoints.latest() == 9
    params, _, meta = checkpoints.restore(5, small_target(), small_target())
  assert meta == {"step": 5}
  np.testing.assert_array_equal(params["kernel"], 5)
  kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
  assert kept == ["5", "9"]


def test_an_unfinished_step_is_not_seen(spoilt):
  """As a kill in the middle of a save leaves it."""
  steps = spoilt / "checkpoints"
  shutil.copytree(steps / "7", steps / "8.orbax-checkpoint-tmp")
  with store.Checkpoints(spoilt, keep=2) as checkpoints:
    assert checkpoints.latest() == 7
    # And it does not stand in the way of the step's being saved again.
    checkpoints.save(8, small(8), small(), {"step": 8})
  assert store.locate(spoilt)[1].name == "8"
  assert not list(steps.glob("*tmp*"))


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 2 MB."""
  folder = tmp_path / "disk"
  folder.mkdir()
  command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
  try:
    subprocess.run(command, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("no right to mount a small file system here")
  yield folder
  subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_and_earlier_steps_stay(small_disk, random_params):
  large = {"kernel": np.random.default_rng(0).normal(size=2**20)}
  store.write_model(small_disk, NANO, None)
  with (
    pytest.raises(errors.UserError) as caught,
    store.Checkpoints(small_disk, keep=2) as checkpoints,
  ):
    checkpoints.save(1, small(1), small(), {"step": 1})
    checkpoints.save(2, large, small(), {"step": 2})
    checkpoints.wait()
  assert "could not be saved" in str(caught.value)
  assert "\n" not in str(caught.value)
  read = store.read_params(small_disk)
  np.testing.assert_array_equal(read["kernel"], 1)
  with pytest.raises(
    errors.UserError, match=r"(?i)no space left|could not be saved"
  ):
    wide = dataclasses.replace(NANO, mlp_dim=4096)
    store.write(small_disk / "new", wide, random_params(wide), None)
  assert not list(small_disk.glob("*new*"))


def test_leaving_tells_of_a_failed_save(tmp_path, monkeypatch):
  class Failed:
    def result(self):
      raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nat ...")

  with (
    pytest.raises(errors.UserError, match=r"(?i)no space left"),
    store.Checkpoints(tmp_path, keep=2) as checkpoints,
  ):
    monkeypatch.setattr(
      checkpoints._orbax, "save_checkpointables_async", lambda *a: Failed()
    )
    checkpoints.save(1, small(), small(), {"step": 1})


def largest_file(folder):
  files = [p for p in pathlib.Path(folder).rglob("*") if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def test_a_truncated_array_is_a_bad_file(spoilt):
  step = spoilt / "checkpoints" / "7"
  for array in (largest_file(step / "params"), largest_file(step / "training")):
    whole = array.read_bytes()
    array.write_bytes(whole[: len(whole) // 2])
    with (
      store.Checkpoints(spoilt, keep=2) as checkpoints,
      pytest.raises(errors.BadFileError) as caught,
    ):
      checkpoints.restore(7, *targets((8, 1, 1)))
    assert str(step) in str(caught.value) and "\n" not in str(caught.value)
    array.write_bytes(whole)


def test_reading_a_truncated_model_is_a_bad_file(spoilt):
  array = largest_file(spoilt / "checkpoints" / "7" / "params")
  array.write_bytes(array.read_bytes()[:100])
  with pytest.raises(errors.BadFileError, match="cannot be read"):
    store.read_params(spoilt)


def test_a_checkpoint_of_another_model_is_refused(run_folder):
  with (
    store.Checkpoints(run_folder, keep=2) as checkpoints,
    pytest.raises(errors.BadFileError, match="of this model"),
  ):
    checkpoints.restore(7, small_target(), small_target())


def test_write_and_read_a_model(tmp_path, random_params, tokenizer_folder):
  from llama_jax import text

  params = random_params(NANO)
  tokenizer = text.load_tokenizer(tokenizer_folder)
  folder = tmp_path / "new" / "model"
  store.write(folder, NANO, params, tokenizer)
  config, read, again = store.read(folder)
  assert config == NANO
  assert bits(read) == bits(params)
  assert names.flatten(read).keys() == names.flatten(params).keys()
  assert again.encode("def f(x):") == tokenizer.encode("def f(x):")
  # A step's own folder names that step.
  step = folder / "checkpoints" / "0"
  assert bits(store.read_params(step)) == bits(params)
  assert list(folder.parent.iterdir()) == [folder]


def test_write_refuses_what_holds_something(tmp_path, random_params):
  (tmp_path / "precious.txt").write_text("mine")
  with pytest.raises(errors.UserError, match="is not an empty folder"):
    store.write(tmp_path, NANO, random_params(NANO), None)
  assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_a_write_that_fails_leaves_nothing(tmp_path, random_params):
  class Broken:
    def save(self, folder):
      raise OSError(28, "No space left on device")

  with pytest.raises(errors.UserError, match="No space left on device"):
    store.write(tmp_path / "model", NANO, random_params(NANO), Broken())
  assert not list(tmp_path.iterdir())


def test_folders_that_are_no_checkpoint(tmp_path):
  with pytest.raises(errors.BadFileError, match="does not exist"):
    store.read_config(tmp_path / "nowhere")
  with pytest.raises(errors.BadFileError, match=r"has no model\.json"):
    store.read_config(tmp_path)
  store.write_model(tmp_path, NANO, None)
  with pytest.raises(errors.BadFileError, match="no complete checkpoint yet"):
    store.read_params(tmp_path)
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  with pytest.raises(errors.BadFileError, match="cannot be read"):
    store.read_params(tmp_path)
  for damaged in ("{", "[]", json.dumps({"vocab_size": 3}), '"text"', "3"):
    (tmp_path / "model.json").write_text(damaged)
    with pytest.raises(errors.BadFileError, match=r"model\.json"):
      store.read_config(tmp_path)


def test_one_leaf_is_read_slice_by_slice(tmp_path, random_params):
  """Of a converted model and of a run's checkpoint, which orbax keeps in
  another way; any rows equal those of the whole."""
  params = random_params(NANO)
  store.write(tmp_path / "converted", NANO, params, None)
  store.write_model(tmp_path / "run", NANO, None)
  with store.Checkpoints(tmp_path / "run", keep=1) as checkpoints:
    checkpoints.save(3, jax.tree.map(jnp.asarray, params), small(), {"step": 3})
  want = weights.from_params(NANO, params, "hf")
  for name in ("converted", "run"):
    config, source = store.open_tensors(tmp_path / name)
    assert config == NANO and source.tensors == want.tensors
    for key, tensor in source.tensors.items():
      for start, stop in ((0, tensor.shape[0]), (5, 9)):
        np.testing.assert_array_equal(
          source.rows(key, start, stop), want.rows(key, start, stop)
        )


def test_a_leaf_of_another_shape_is_refused(tmp_path, random_params):
  store.write(tmp_path / "m", NANO, random_params(NANO), None)
  other = dataclasses.replace(NANO, mlp_dim=96)
  (tmp_path / "m" / "model.json").write_text(other.to_json())
  with pytest.raises(errors.BadFileError, match=r"gate.*\[2, 64, 192\].*96"):
    store.open_tensors(tmp_path / "m")


def test_blocks_are_checked(tmp_path, random_params):
  """A flipped bit of a converted model does not load in silence."""
  store.write(tmp_path / "m", NANO, random_params(NANO), None)
  folder = tmp_path / "m/checkpoints/0/params/layers.mlp.up.kernel/c/0/0"
  (file,) = folder.iterdir()
  content = bytearray(file.read_bytes())
  content[1000] ^= 1
  file.write_bytes(content)
  with pytest.raises(errors.BadFileError, match="cannot be read"):
    store.read_params(tmp_path / "m")
