"""Damage of any kind to a committed checkpoint is seen before it is used."""

import dataclasses
import os
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.checkpoint import manifest, steps
from llama_jax.model import sizes


@pytest.fixture(scope="module")
def params(random_params):
  config = dataclasses.replace(sizes.get("nano"), vocab_size=64, num_layers=1)
  return jax.tree.map(jnp.asarray, random_params(config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, params):
  """Steps 10 and 20 of a nano model with two moments."""
  folder = tmp_path_factory.mktemp("saved")
  rest = {"mu": params, "nu": params, "count": jnp.int32(3)}
  with steps.Checkpoints(folder, keep=2) as checkpoints:
    for step in (10, 20):
      checkpoints.save(step, params, rest, {"step": step})
  return folder


@pytest.fixture
def run(saved, tmp_path):
  shutil.copytree(saved, tmp_path / "run")
  return tmp_path / "run"


def files_of(step: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in step.rglob("*") if p.is_file())


def resumes_from(run, params) -> int:
  """The step that a run goes on from; what it gets is what was saved."""
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding
    ),
    params,
  )
  count = jax.ShapeDtypeStruct(
    (), jnp.int32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
  )
  rest = {"mu": shapes, "nu": shapes, "count": count}
  with steps.Checkpoints(run, keep=2) as checkpoints:
    got = checkpoints.restore(shapes, rest)
  for tree in (got.params, got.rest["mu"], got.rest["nu"]):
    for one, other in zip(
      jax.tree.leaves(tree), jax.tree.leaves(params), strict=True
    ):
      assert np.array_equal(one, other)
  assert got.meta == {"step": got.step}
  return got.step


def flip(file: pathlib.Path, bit: int) -> None:
  content = bytearray(file.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  file.write_bytes(content)


def test_what_is_whole_passes(saved, params):
  step = saved / "checkpoints" / "20"
  manifest.check(step)
  manifest.check(step, part="params")
  manifest.check(step, part="training")
  listed = (step / manifest.NAME).read_text().splitlines()
  named = [line.split("  ", 1)[1] for line in listed]
  want = [str(p.relative_to(step)) for p in files_of(step)]
  assert sorted([*named, manifest.NAME]) == want
  assert resumes_from(saved, params) == 20


def test_three_hundred_flipped_bits(run, params, capsys):
  """R5: over all files in turn, so that the small ones are hit as often."""
  rng = random.Random(0)
  step = run / "checkpoints" / "20"
  files = [file for file in files_of(step) if file.stat().st_size]
  assert {"meta.json", manifest.NAME, "_METADATA", "manifest.ocdbt"} <= {
    file.name for file in files
  }
  seen = fallen_back = 0
  for number in range(300):
    file = files[number % len(files)]
    bit = rng.randrange(8 * file.stat().st_size)
    flip(file, bit)
    with pytest.raises(errors.BadFileError) as caught:
      manifest.check(step)
    seen += 1
    if file.name != manifest.NAME:
      assert str(file.relative_to(step)) in str(caught.value)
    if number < 2 * len(files):  # twice in each file, through a resume
      assert resumes_from(run, params) == 10
      said = capsys.readouterr().err
      assert said.startswith("warning: ") and "20.damaged" in said
      os.rename(run / "checkpoints" / "20.damaged", step)
      fallen_back += 1
    flip(file, bit)
  manifest.check(step)
  assert seen == 300
  with capsys.disabled():
    print(
      f"\nR5: {seen} of 300 flips in {len(files)} files seen;"
      f" {fallen_back} of {2 * len(files)} resumes fell back with a warning"
    )


def spoil(kind: str, step: pathlib.Path) -> str:
  """Damages a step in some way; what the error must name."""
  array = max(files_of(step / "params"), key=lambda p: p.stat().st_size)
  other = max(files_of(step / "training"), key=lambda p: p.stat().st_size)
  if kind == "cut off":
    os.truncate(array, array.stat().st_size - 1)
  elif kind == "emptied":
    os.truncate(array, 0)
  elif kind == "longer":
    with open(array, "ab") as file:
      file.write(b"\0")
  elif kind == "swapped":
    content = array.read_bytes()
    array.write_bytes(other.read_bytes())
    other.write_bytes(content)
  elif kind == "missing":
    array.unlink()
  elif kind == "missing empty":
    array = next(file for file in files_of(step) if not file.stat().st_size)
    array.unlink()
  elif kind == "extra":
    array = step / "params" / "d" / "0123"
    array.write_bytes(b"")
  elif kind == "link":
    content = array.read_bytes()
    (step.parent / "elsewhere").write_bytes(content)
    array.unlink()
    array.symlink_to(step.parent / "elsewhere")
  elif kind == "pipe":
    array.unlink()
    os.mkfifo(array)
  elif kind == "no manifest":
    array = step / manifest.NAME
    array.unlink()
  elif kind == "another step's":
    array = step / manifest.NAME
    shutil.copy(step.parent / "10" / manifest.NAME, array)
    return "files in all"
  elif kind == "lines in another order":
    array = step / manifest.NAME
    lines = array.read_text().splitlines(keepends=True)
    array.write_text("".join(lines[::-1]))
  elif kind == "a whole item":
    shutil.rmtree(step / "training")
    array = other
  return array.name


@pytest.mark.parametrize(
  "kind",
  [
    "cut off",
    "emptied",
    "longer",
    "swapped",
    "missing",
    "missing empty",
    "extra",
    "link",
    "pipe",
    "no manifest",
    "another step's",
    "lines in another order",
    "a whole item",
  ],
)
def test_other_damage(run, params, kind, capsys):
  named = spoil(kind, run / "checkpoints" / "20")
  if kind == "a whole item":
    named = "training/"
  with pytest.raises(errors.BadFileError) as caught:
    manifest.check(run / "checkpoints" / "20")
  assert named in str(caught.value) and "\n" not in str(caught.value)
  assert resumes_from(run, params) == 10
  assert named in capsys.readouterr().err


def test_a_part_is_checked_alone(run):
  step = run / "checkpoints" / "20"
  (file,) = (step / "training").glob("_METADATA")
  flip(file, 8)
  manifest.check(step, part="params")
  for part in (None, "training"):
    with pytest.raises(errors.BadFileError, match="training/_METADATA"):
      manifest.check(step, part=part)
  flip(file, 8)
  # What lies beside the parts belongs to each.
  flip(step / "meta.json", 3)
  with pytest.raises(errors.BadFileError, match=r"meta\.json does not match"):
    manifest.check(step, part="params")


def test_manifests_of_strangers(run):
  """Any bytes in its place are our error, whatever they name."""
  rng = random.Random(1)
  file = run / "checkpoints" / "20" / manifest.NAME
  whole = file.read_bytes()
  tries = [
    b"",
    b"\n" * 1000,
    b"\xff" * 1000,
    whole[:-1],
    whole + whole,
    whole.replace(b"params/", b"../../"),
    whole.replace(b"  ", b"  /"),
    b"0" * 64 + b"  \x1b[2J\x00\n",
  ]
  for _ in range(300):
    content = bytearray(whole)
    start = rng.randrange(len(content))
    content[start : start + rng.randrange(1, 200)] = rng.randbytes(
      rng.randrange(200)
    )
    tries.append(bytes(content))
  for content in tries:
    file.write_bytes(content)
    for part in (None, "params"):
      try:
        manifest.check(file.parent, part)
      except errors.BadFileError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
      else:  # what is read must still have been vouched for
        assert part == "params"
        kept = set(content.splitlines())
        assert {
          line
          for line in whole.splitlines()
          if b"  params/" in line or b"/" not in line
        } <= kept
