"""Meshes from flags: what is filled in, and what is refused with advice."""

import jax
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.parallel import hosts, mesh


def resolved(*sizes, devices=8):
  parallel = mesh.ParallelConfig(*sizes).resolve(devices)
  return parallel.data, parallel.fsdp, parallel.tensor


@pytest.mark.parametrize(
  "given, devices, want",
  [
    ((-1, 1, 1), 8, (8, 1, 1)),
    ((2, -1, 2), 8, (2, 2, 2)),
    ((2, 2, -1), 8, (2, 2, 2)),
    ((1, -1, 1), 1, (1, 1, 1)),
    ((-1, 3, 1), 6, (2, 3, 1)),
    ((2, 2, 2), 8, (2, 2, 2)),
  ],
)
def test_minus_one_takes_what_is_left(given, devices, want):
  assert resolved(*given, devices=devices) == want


@pytest.mark.parametrize(
  "given, said",
  [
    ((-1, -1, 1), ["parallel.data=-1", "parallel.fsdp=-1"]),
    ((0, 1, 1), ["parallel.data=0", "1 or more"]),
    ((1, -2, 1), ["parallel.fsdp=-2", "-1"]),
  ],
)
def test_illegal_sizes(given, said):
  with pytest.raises(errors.ConfigError) as caught:
    mesh.ParallelConfig(*given)
  assert all(word in str(caught.value) for word in said)


def test_a_mesh_that_does_not_fit_the_devices():
  with pytest.raises(errors.ConfigError) as caught:
    resolved(-1, 3, 1)
  assert "parallel.fsdp=3" in str(caught.value)
  assert "[1, 2, 4, 8]" in str(caught.value)
  with pytest.raises(
    errors.ConfigError, match="need 4 devices and there are 8"
  ):
    resolved(2, 2, 1)


@pytest.mark.parametrize(
  "sizes, dimensions, said",
  [
    (
      (1, 1, 8),
      {"tensor": {"model.num_kv_heads": 2, "model.num_heads": 4}},
      ["parallel.tensor=8", "model.num_kv_heads=2", "1, 2."],
    ),
    (
      (1, 8, 1),
      {"fsdp": {"model.embed_dim": 36}},
      ["parallel.fsdp=8", "model.embed_dim=36", "1, 2, 3, 4, 6."],
    ),
    (
      (2, 4, 1),
      {"batch": {"training.batch_size": 4}},
      ["parallel.data=2 x parallel.fsdp=4", "training.batch_size=4", "1, 2, 4"],
    ),
  ],
)
def test_check_names_the_legal_values(sizes, dimensions, said):
  with pytest.raises(errors.ConfigError) as caught:
    mesh.check(mesh.ParallelConfig(*sizes), dimensions)
  for word in said:
    assert word in str(caught.value)


def test_check_passes_what_divides():
  mesh.check(
    mesh.ParallelConfig(2, 2, 2),
    {
      "tensor": {"model.num_kv_heads": 2},
      "fsdp": {"model.embed_dim": 64},
      "batch": {"training.batch_size": 4},
    },
  )


def test_make_uses_every_device_once():
  made = mesh.make(mesh.ParallelConfig(2, -1, 2))
  assert dict(made.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert set(made.devices.flat) == set(jax.devices())


def test_a_batch_lies_in_rows():
  made = mesh.make(mesh.ParallelConfig(2, 2, 2))
  whole = np.arange(2 * 8 * 3).reshape(2, 8, 3)
  put = hosts.put_batch({"tokens": whole}, made, axis=1)["tokens"]
  np.testing.assert_array_equal(put, whole)
  assert {s.data.shape for s in put.addressable_shards} == {(2, 2, 3)}
  starts = {s.index[1].start for s in put.addressable_shards}
  assert starts == {0, 2, 4, 6}
  assert hosts.local_rows(8) == slice(0, 8)
