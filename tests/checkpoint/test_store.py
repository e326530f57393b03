"""A model's folder: bitwise, whole or not at all, and undamaged."""

import dataclasses
import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.checkpoint import manifest, names, steps, store, weights
from llama_jax.model import sizes

NANO = sizes.get("nano")


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def small():
  return {"kernel": np.ones((2, 3), np.float32)}


def save(folder, step, params):
  with steps.Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(step, params, small(), {"step": step})


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


def test_a_full_disk_is_told_and_nothing_is_left(small_disk, random_params):
  with pytest.raises(
    errors.UserError, match=r"(?i)no space left|could not be saved"
  ):
    wide = dataclasses.replace(NANO, mlp_dim=4096)
    store.write(small_disk / "new", wide, random_params(wide), None)
  assert not list(small_disk.glob("*new*"))


def test_damage_is_named_before_an_array_is_read(tmp_path, random_params):
  """Of a run's checkpoint; in the optimizer's part it does not matter here."""
  params = random_params(NANO)
  store.write_model(tmp_path, NANO, None)
  save(tmp_path, 3, params)
  step = tmp_path / "checkpoints" / "3"
  for part in ("training", "params"):
    file = max(
      (p for p in (step / part).rglob("*") if p.is_file()),
      key=lambda p: p.stat().st_size,
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    if part == "training":
      assert bits(store.read_params(tmp_path)) == bits(params)
      continue
    for read in (store.read_params, store.open_tensors):
      with pytest.raises(errors.BadFileError, match=manifest.NAME) as caught:
        read(tmp_path)
      assert file.name in str(caught.value)


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
  save(tmp_path / "run", 3, jax.tree.map(jnp.asarray, params))
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
