"""A run's checkpoints: whole or not at all, verified, pruned, told of."""

import errno
import json
import os
import pathlib
import resource
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.checkpoint import manifest, steps, store
from llama_jax.model import sizes


def small(value=1.0):
  return {"kernel": np.full((2, 3), value, np.float32)}


def small_target():
  alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32, sharding=alone)}


def save_small(checkpoints, step):
  checkpoints.save(step, small(step), small(-step), {"step": step})


def restore_small(checkpoints, step=None):
  """The step that came back, its content checked."""
  got = checkpoints.restore(small_target(), small_target(), step)
  np.testing.assert_array_equal(got.params["kernel"], got.step)
  np.testing.assert_array_equal(got.rest["kernel"], -got.step)
  assert got.meta == {"step": got.step}
  return got.step


def entries(folder):
  return sorted(p.name for p in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
  folder = tmp_path_factory.mktemp("three")
  with steps.Checkpoints(folder, keep=3) as checkpoints:
    for step in (10, 20, 30):
      save_small(checkpoints, step)
  return folder


@pytest.fixture
def run(three_steps, tmp_path):
  """A copy of a run's folder with steps 10, 20 and 30."""
  shutil.copytree(three_steps, tmp_path / "run")
  return tmp_path / "run"


def test_arrays_may_change_while_a_save_is_under_way(tmp_path):
  params = {"kernel": jnp.arange(1e6)}
  with steps.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, params, small(), {"step": 1})
    change = jax.jit(lambda a: a * 0 - 1, donate_argnums=0)
    change(params["kernel"]).block_until_ready()
  store.write_model(tmp_path, sizes.get("nano"), None)
  read = store.read_params(tmp_path)
  np.testing.assert_array_equal(read["kernel"], np.arange(1e6, dtype="f4"))


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
  with steps.Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.latest() is None
    assert checkpoints.restore(small_target(), small_target()) is None
    with pytest.raises(errors.BadFileError, match="no step 5; there are none"):
      checkpoints.restore(small_target(), small_target(), 5)


def test_what_stays(tmp_path):
  """The newest two, each tenth, the pinned; whatever the order of sums."""
  with steps.Checkpoints(
    tmp_path, keep=2, keep_every=10, pinned=[3, 14, 99]
  ) as checkpoints:
    for step in (1, 3, 5, 10, 14, 20, 21, 22, 23):
      save_small(checkpoints, step)
    checkpoints.wait()
    assert checkpoints.latest() == 23
    assert entries(tmp_path) == sorted(["3", "10", "14", "20", "22", "23"])
    for step in (14, 22):
      assert restore_small(checkpoints, step) == step


def test_an_old_checkpoint_that_cannot_go_is_told(run, monkeypatch, capsys):
  def stuck(path):
    raise OSError(errno.EIO, "Input/output error", str(path))

  with steps.Checkpoints(run, keep=1) as checkpoints:
    monkeypatch.setattr(steps.shutil, "rmtree", stuck)
    save_small(checkpoints, 40)
    checkpoints.wait()
    assert checkpoints.latest() == 40
  monkeypatch.undo()
  assert "10.deleting: an old checkpoint" in capsys.readouterr().err
  # Half removed is not a checkpoint, and it goes at the next start.
  assert "10.deleting" in entries(run)
  with steps.Checkpoints(run, keep=1):
    assert entries(run) == ["40"]


def test_a_step_is_saved_once(run):
  with (
    steps.Checkpoints(run, keep=3) as checkpoints,
    pytest.raises(errors.UserError, match="20 is there already"),
  ):
    save_small(checkpoints, 20)


def test_an_unfinished_step_is_not_seen(run):
  """As kills in the middle of a save and of pruning leave it."""
  folder = run / "checkpoints"
  for name in (
    "40.saving.orbax-checkpoint-tmp",
    "40.saving",
    "9.deleting",
    "8.damaged",
  ):
    shutil.copytree(folder / "30", folder / name)
  assert steps.list_steps(folder) == [10, 20, 30]
  with steps.Checkpoints(run, keep=3) as checkpoints:
    assert checkpoints.latest() == 30
    # And it does not stand in the way of the step's being saved again.
    save_small(checkpoints, 40)
  assert entries(run) == ["20", "30", "40", "8.damaged"]


# Failed saves: R3 and R4.


def fail_at(monkeypatch, name):
  """Makes one step of a commit fail, as a dying disk does."""

  def broken(*args):
    raise OSError(errno.EIO, "Input/output error")

  owner, attribute = {
    "manifest": (manifest, "write"),
    "meta": (steps.atomic, "write_text"),
    "rename": (steps.os, "rename"),
    "flush": (manifest.os, "fsync"),
  }[name]
  monkeypatch.setattr(owner, attribute, broken)


@pytest.mark.parametrize("name", ["manifest", "meta", "rename", "flush"])
@pytest.mark.parametrize("told_by", ["check", "save", "wait", "exit"])
def test_a_failed_save_is_told_once(run, monkeypatch, name, told_by):
  """By the first that is asked; earlier steps are whole, nothing is left, and
  the step can be saved again."""
  before = entries(run)
  checkpoints = steps.Checkpoints(run, keep=3)
  with monkeypatch.context() as patch:
    fail_at(patch, name)
    save_small(checkpoints, 40)
    while not checkpoints._pending.done():
      pass
  with pytest.raises(errors.UserError, match=r"could not be saved.*Input") as e:
    {
      "check": checkpoints.check,
      "save": lambda: save_small(checkpoints, 50),
      "wait": checkpoints.wait,
      "exit": lambda: checkpoints.__exit__(None),
    }[told_by]()
  assert "\n" not in str(e.value)
  assert entries(run) == before and checkpoints.latest() == 30
  checkpoints.check()
  checkpoints.wait()
  if told_by == "exit":
    return
  with checkpoints:
    save_small(checkpoints, 40)
    checkpoints.wait()
    assert restore_small(checkpoints) == 40


def test_leaving_with_another_error_tells_of_the_save_too(
  run, monkeypatch, capsys
):
  fail_at(monkeypatch, "rename")
  with (
    pytest.raises(ZeroDivisionError),
    steps.Checkpoints(run, keep=3) as checkpoints,
  ):
    save_small(checkpoints, 40)
    raise ZeroDivisionError
  assert "warning: " in (said := capsys.readouterr().err)
  assert "could not be saved" in said


def test_check_does_not_wait(run, monkeypatch):
  import threading

  go = threading.Event()
  write = manifest.write
  monkeypatch.setattr(
    manifest, "write", lambda folder: (go.wait(60), write(folder))
  )
  with steps.Checkpoints(run, keep=3) as checkpoints:
    save_small(checkpoints, 40)
    checkpoints.check()
    assert checkpoints.latest() == 30
    go.set()
  assert checkpoints.latest() == 40


@pytest.fixture
def small_files():
  """No file may grow beyond 1 MB: a full disk to those without the right to
  mount one."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_arrays_that_cannot_be_written(run, small_files):
  before = entries(run)
  large = {"kernel": np.random.default_rng(0).normal(size=2**20)}
  with steps.Checkpoints(run, keep=3) as checkpoints:
    with pytest.raises(errors.UserError, match="could not be saved"):
      checkpoints.save(40, large, small(), {"step": 40})
      checkpoints.wait()
    assert entries(run) == before
    save_small(checkpoints, 40)
    checkpoints.wait()
    assert restore_small(checkpoints) == 40


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 2 MB, and a way to make it read-only."""
  folder = tmp_path / "disk"
  folder.mkdir()

  def mount(*options):
    command = ["mount", "-t", "tmpfs", "-o", *options, "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)

  try:
    mount("size=2m")
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("no right to mount a small file system here")
  yield folder, mount
  subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_and_a_read_only_disk(small_disk):
  folder, mount = small_disk
  large = {"kernel": np.random.default_rng(0).normal(size=2**20)}
  with steps.Checkpoints(folder, keep=2) as checkpoints:
    save_small(checkpoints, 1)
    with pytest.raises(errors.UserError, match=r"(?i)no space left"):
      checkpoints.save(2, large, small(), {"step": 2})
      checkpoints.wait()
    assert entries(folder) == ["1"]
    mount("remount,ro")
    with pytest.raises(errors.UserError, match=r"could not be saved.*[Rr]ead"):
      save_small(checkpoints, 2)
      checkpoints.wait()
    assert restore_small(checkpoints) == 1
    mount("remount,rw")
    save_small(checkpoints, 2)
    checkpoints.wait()
    assert restore_small(checkpoints) == 2


# Damage: R5; each single flip is tried in test_manifest.py.


def damage(step: pathlib.Path) -> str:
  """Flips one bit of the largest file; its name."""
  files = [p for p in step.rglob("*") if p.is_file()]
  file = max(files, key=lambda p: p.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 3] ^= 16
  file.write_bytes(content)
  return file.name


def test_damaged_steps_are_passed_over_and_moved_aside(run, capsys):
  folder = run / "checkpoints"
  names = [damage(folder / "20"), damage(folder / "30")]
  with steps.Checkpoints(run, keep=3) as checkpoints:
    assert checkpoints.latest() == 30
    assert restore_small(checkpoints) == 10
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for step, name, line in zip((30, 20), names[::-1], lines, strict=True):
      assert line.startswith("warning: ") and name in line
      assert "from step 10 instead" in line and f"{step}.damaged" in line
    assert entries(run) == ["10", "20.damaged", "30.damaged"]
    assert checkpoints.latest() == 10
    for step in (20, 30):
      save_small(checkpoints, step)
    checkpoints.wait()
    assert restore_small(checkpoints) == 30
    # Damaged again: it does not take the first one's place.
    damage(folder / "30")
    assert restore_small(checkpoints) == 20
  assert "30.damaged-2" in entries(run)


def test_a_named_step_is_that_or_an_error(run):
  name = damage(run / "checkpoints" / "20")
  before = entries(run)
  with steps.Checkpoints(run, keep=3) as checkpoints:
    assert restore_small(checkpoints, 10) == 10
    with pytest.raises(errors.BadFileError, match=name):
      restore_small(checkpoints, 20)
    with pytest.raises(errors.BadFileError, match=r"no step 15.*10, 20, 30"):
      restore_small(checkpoints, 15)
  assert entries(run) == before


def test_nothing_sound_is_not_a_fresh_start(run):
  for step in (10, 20, 30):
    damage(run / "checkpoints" / str(step))
  before = entries(run)
  with (
    steps.Checkpoints(run, keep=3) as checkpoints,
    pytest.raises(errors.BadFileError, match=r"No step of .* is sound"),
  ):
    checkpoints.restore(small_target(), small_target())
  assert entries(run) == before


def test_a_checkpoint_of_another_model_is_refused(run):
  """And stays where it is: it is not damaged."""
  alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  other = {"bias": jax.ShapeDtypeStruct((7,), np.float32, sharding=alone)}
  with (
    steps.Checkpoints(run, keep=3) as checkpoints,
    pytest.raises(errors.BadFileError, match="of this model"),
  ):
    checkpoints.restore(other, small_target())
  assert entries(run) == ["10", "20", "30"]


def test_the_manifest_is_part_of_the_commit(tmp_path, monkeypatch):
  """Whenever a step has its name, its manifest is there and covers every file
  of it, orbax's own last ones too."""
  seen = []
  rename = os.rename

  def watch(source, target):
    if str(target).endswith("checkpoints/7"):
      manifest.check(pathlib.Path(source))
      seen.append(sorted(os.listdir(source)))
    rename(source, target)

  monkeypatch.setattr(os, "rename", watch)
  with steps.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(7, small(), small(), {"data": [1, 2]})
  (listed,) = seen
  assert {"params", "training", "meta.json", manifest.NAME} <= set(listed)
  step = tmp_path / "checkpoints" / "7"
  assert sorted(os.listdir(step)) == listed
  assert json.loads((step / "meta.json").read_text()) == {"data": [1, 2]}
  # Anyone's sha256sum agrees.
  if shutil.which("sha256sum"):
    subprocess.run(
      ["sha256sum", "-c", "--strict", "--quiet", manifest.NAME],
      cwd=step,
      check=True,
    )
