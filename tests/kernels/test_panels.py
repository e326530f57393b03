"""Products with a matrix in panels equal those with the matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.kernels import panels

OUT, WIDE = 192, 40


@pytest.fixture(scope="module")
def matrix_OI():
  return np.random.default_rng(0).normal(size=(OUT, WIDE)).astype(np.float32)


def in_parts(matrix_OI, count):
  """Panels of a small matrix, in parts as those of a large one."""
  (whole_nIC,) = panels.cut(jnp.asarray(matrix_OI)).parts
  return panels.Panels(tuple(jnp.split(whole_nIC, count)))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 8, 33, 130])
def test_products(rows, count, matrix_OI):
  x_tI = np.random.default_rng(1).normal(size=(rows, WIDE)).astype(np.float32)
  got = jax.jit(panels.matmul)(x_tI, in_parts(matrix_OI, count))
  want = x_tI.astype(np.float64) @ matrix_OI.T.astype(np.float64)
  assert got.dtype == np.float32
  # Sums of 40 terms of order 1 in float32.
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_bfloat16_is_summed_in_float32(matrix_OI):
  matrix = jnp.asarray(matrix_OI, jnp.bfloat16)
  x_tI = jnp.ones((4, WIDE), jnp.bfloat16)
  got = jax.jit(panels.matmul)(x_tI, panels.cut(matrix))
  want = np.asarray(matrix, np.float64).sum(1)
  np.testing.assert_allclose(got, np.tile(want, (4, 1)), atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_rows_are_found_again(count, matrix_OI):
  rows = np.array([[0, 63, 64], [100, 191, 0]])
  got = panels.take(in_parts(matrix_OI, count), rows)
  np.testing.assert_array_equal(got, matrix_OI[rows])


def test_a_large_matrix_is_in_equal_parts():
  matrix_OI = jnp.arange(64 * 18 * 2000.0).reshape(-1, 2000)
  cut = panels.cut(matrix_OI)
  assert len({part.shape for part in cut.parts}) == 1
  assert len(cut.parts) > 8  # Fewer stay on one core.
  np.testing.assert_array_equal(
    panels.take(cut, np.arange(0, 64 * 18, 37)), matrix_OI[::37]
  )


@pytest.mark.parametrize("workers", [1, 2, 3, 16, 200])
def test_parts_are_equal_and_enough_or_one(workers):
  for count in range(1, 300):
    found = panels.part_count(count, workers)
    assert count % found == 0
    assert found == 1 or found > 8
  # Some cannot be divided so: a prime, or too few.
  assert panels.part_count(8, workers) == panels.part_count(211, workers) == 1
  assert panels.part_count(48, 2) == 12


def test_what_fits():
  assert panels.fits(np.zeros((128, 3)))
  assert not panels.fits(np.zeros((100, 3)))
  assert not panels.fits(np.zeros((64, 3, 2)))
  assert not panels.fits(np.zeros((64,)))


@pytest.mark.parametrize("axis", [1, 2])
def test_reductions_over_panels(axis):
  a = np.random.default_rng(0).normal(size=(3, 4, 5, 64)).astype(np.float32)
  for function, want in (
    (jnp.max, a.max((axis, 3))),
    (jnp.sum, a.sum((axis, 3))),
  ):
    got = jax.jit(lambda a, f=function: panels.reduce(f, a, axis))(a)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_neither_side_is_copied():
  """Beside its result as panels give it, a product needs no memory."""
  t, wide, out = 8, 64, 6400
  x_tI, matrix_OI = (
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in ((t, wide), (out, wide))
  )
  cut = jax.eval_shape(panels.cut, matrix_OI)
  program = jax.jit(panels.matmul).lower(x_tI, cut).compile()
  used = program.memory_analysis().temp_size_in_bytes
  # x for each panel would be as much again, the matrix eight times that.
  assert used <= 1.1 * 4 * t * out
