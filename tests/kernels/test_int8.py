"""kernels/int8.py against the same numbers in NumPy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.kernels import int8

WIDTHS = {8: jax.jit(int8.quantize), 4: jax.jit(int8.quantize4)}


def weights(out, into, seed=0):
  """Normally distributed, but for rows of zeros and of one large number."""
  w = np.random.default_rng(seed).normal(size=(out, into)).astype(np.float32)
  w[1] = 0
  w[2, 5] = -40
  return w


def stored(matrix):
  """float64 [O, I], by the layout that Quantized documents."""
  if matrix.step_OG is None:
    whole = np.asarray(matrix.values, np.float64)
  else:
    bytes_OGi = np.asarray(matrix.values).reshape(*matrix.step_OG.shape, 16)
    codes = np.concatenate([bytes_OGi % 16, bytes_OGi // 16], axis=-1)
    step, low = (np.asarray(x, int)[..., None] for x in matrix[2:])
    whole = (low + step * codes).reshape(len(codes), -1)
  assert np.abs(whole).max() <= 127
  return whole * np.asarray(matrix.scale_O, np.float64)[:, None]


def test_eight_bits_are_off_by_half_a_step_at_most():
  w = weights(48, 80)
  matrix = WIDTHS[8](w)
  assert matrix.values.dtype == jnp.int8 and matrix.values.shape == w.shape
  np.testing.assert_allclose(
    matrix.scale_O, np.maximum(np.abs(w).max(1), 2.0**-100) / 127, 1e-6
  )
  off = np.abs(stored(matrix) - w)
  assert (off <= (0.5 + 1e-4) * np.asarray(matrix.scale_O)[:, None]).all()


def best_codes(group):
  """The least squared error of any step and low, by trying them all."""
  least = np.inf
  for step in range(1, 17):
    low = np.arange(-127, 128 - 15 * step)[:, None]
    codes = np.clip(np.round((group - low) / step), 0, 15)
    off = ((low + step * codes - group) ** 2).sum(-1)
    least = min(least, off.min())
  return least


def test_four_bits_are_near_the_best_there_are():
  w = weights(16, 64)
  matrix = WIDTHS[4](w)
  assert matrix.values.dtype == jnp.uint8 and matrix.values.shape == (16, 32)
  assert matrix.step_OG.dtype == matrix.low_OG.dtype == jnp.int8
  scale = np.asarray(matrix.scale_O, np.float64)[:, None]
  off = ((stored(matrix) - w) / scale) ** 2
  best = [best_codes(group) for group in (w / scale).reshape(-1, 32)]
  ours = off.reshape(-1, 32).sum(-1)
  # Float32's rounding at a tie; the few pairs that are tried nearly suffice.
  assert (ours >= np.asarray(best) - 1e-3).all()
  assert ours.sum() <= 1.05 * np.sum(best)


def test_four_bits_keep_what_four_bits_can_say():
  """Numbers on a grid, each group's own, come back exactly."""
  rng = np.random.default_rng(1)
  codes = rng.integers(0, 16, (24, 3, 32))
  codes[..., 0], codes[..., 9] = 0, 15  # each group spans its grid
  step = rng.integers(1, 17, (24, 3, 1))
  low = rng.integers(-127, 128 - 15 * step)
  step[:, 0], low[:, 0] = 16, -113  # and each row the whole range
  whole = (low + step * codes).reshape(24, 96)
  w = (whole * 2.0**-9).astype(np.float32)
  np.testing.assert_array_equal(stored(WIDTHS[4](w)), w)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows", (1, 3, 40, 128))
def test_products_equal_numpy(bits, rows):
  matrix = WIDTHS[bits](weights(48, 96))
  rng = np.random.default_rng(2)
  x = rng.normal(size=(rows, 96)).astype(np.float32)
  x[0, 7] = 300  # as activations have them
  want = x.astype(np.float64) @ stored(matrix).T
  got = jax.jit(int8.integer_product)(x, matrix)
  assert got.dtype == jnp.float32
  # x's second row is in steps of 1/254 of the first's, half of which is lost.
  step = np.abs(x).max(1, keepdims=True) / 127 / 254
  sums = np.abs(stored(matrix)).sum(1)[None]
  assert (np.abs(got - want) <= 0.5 * step * sums + 1e-5).all()
  # Weight-only: rounded as a float32 product is.
  widened = jax.jit(int8.widened_product)(x, matrix)
  np.testing.assert_allclose(widened, want, 1e-5, 1e-3)
  # And here, on CPU, the first is taken but for many rows.
  np.testing.assert_array_equal(
    jax.jit(int8.matmul)(x, matrix), widened if rows == 128 else got
  )


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_whole_matrix_and_its_rows(bits):
  matrix = WIDTHS[bits](weights(48, 96))
  exact = stored(matrix).astype(np.float32)
  np.testing.assert_array_equal(int8.dequantize(matrix), exact)
  if bits == 8:
    ids = np.asarray([[3, 0], [47, 3]])
    np.testing.assert_array_equal(int8.take(matrix, ids), exact[ids])


def test_rows_that_are_zero_or_not_finite():
  matrix = WIDTHS[8](weights(8, 32))
  x = np.zeros((3, 32), np.float32)
  x[1, 3], x[2, 4] = np.nan, np.inf
  y = np.asarray(int8.integer_product(x, matrix))
  assert (y[0] == 0).all()
  # Damage is not hidden behind whole numbers.
  assert not np.isfinite(y[1:, 3:]).any()


@pytest.mark.parametrize("bits", WIDTHS)
def test_matrices_are_widened_one_after_another(bits):
  """Not all before the first product, in memory that 8 bits were to save."""
  matrices = [WIDTHS[bits](weights(256, 256, seed)) for seed in range(12)]
  x = jnp.ones((128, 256))

  @jax.jit
  def chain(x, matrices):
    for matrix in matrices:
      x = int8.matmul(x, matrix) / 16
    return x

  memory = chain.lower(x, matrices).compile().memory_analysis()
  # One or two at once, and x twice.
  assert memory.temp_size_in_bytes < 4 * 256 * 256 * 4


def test_the_product_on_cpu_is_of_int8():
  """And of two rows or more: the only form that XLA has a fast path for."""
  matrix = WIDTHS[4](weights(48, 96))
  x = jnp.ones((1, 96), jnp.bfloat16)
  program = jax.jit(int8.matmul).lower(x, matrix).as_text()
  dots = [line for line in program.splitlines() if "dot_general" in line]
  assert len(dots) == 2  # one a half
  for line in dots:
    types = line[line.rindex("(") :]
    assert types.count("xi8>") == 2 and "2xi32>" in line and "x2xi" in line
