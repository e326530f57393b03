"""Products of few rows with a matrix that lies in panels, for decoding on CPU.

A weight [O, I] is cut into panels of WIDTH outputs, each stored as [I, WIDTH]:
the form in which XLA's CPU kernels read the second matrix of a product. Given
any other they bring it into this one at every call, which for few rows costs
as much as the product: with SmolLM2's matrices 8 rows take 1.3 to 2.2 times as
long, and 2 rows 1.4 to 2.1 times. One row, or hundreds, take as long with any.

Those kernels share the columns and rows of one panel among cores, but not the
panels: a product of few rows has one core. So a large matrix is in parts, each
with a product of its own that waits for nothing but x, and what waits together
XLA does hand to several cores (SmolLM2's gate and up with 16 rows: 0.75 ms on
one of two cores, 0.47 on both; with 8 or fewer there is little to gain).

t tokens, I in, O out, n panels of C outputs, p parts of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax import cores

# Outputs of a panel. 32 is as fast for few rows and slower for hundreds; 16 and
# more than 64 are slower for few.
WIDTH = 64

# Weights of a matrix that is worth parting. Another core is 0.05 ms away, and
# each part is an operation more to make ready in every process (0.7 ms): of
# SmolLM2 that leaves gate and up and the head, with which a prompt takes 0.75 s
# and not 0.83.
_LARGE = 1_500_000
# XLA keeps so many operations that are ready for one core, and of more it gives
# half away.
_KEPT = 8
# About the most parts, whatever the cores.
_MOST = 24
# The least rows of a product in parts: fewer take as long or longer.
_ROWS = 4


class Panels(NamedTuple):
  """A matrix [O, I].

  Attributes:
    parts: p of them with equally many panels, [n / p, I, C]; output o is column
      o % C of panel o // C.
  """

  parts: tuple[jax.Array, ...]


def fits(matrix: jax.Array) -> bool:
  """Whether it is [O, I] and of whole panels."""
  return matrix.ndim == 2 and matrix.shape[0] % WIDTH == 0


def cut(matrix_OI: jax.Array) -> Panels:
  """A matrix that fits, in panels."""
  panels_nCI = matrix_OI.reshape(-1, WIDTH, matrix_OI.shape[1])
  count = 1
  if matrix_OI.size >= _LARGE:
    count = part_count(len(panels_nCI), cores.usable())
  return Panels(tuple(jnp.split(panels_nCI.swapaxes(1, 2), count)))


def part_count(panels: int, workers: int) -> int:
  """In how many equal parts so many panels keep so many cores busy; or 1."""
  wanted = min(max(6 * workers, _KEPT + 1), _MOST)
  counts = range(min(wanted, panels), 2 * _MOST + 1)
  whole = [count for count in counts if panels % count == 0]
  return whole[0] if panels > _KEPT and whole else 1


def product(x_tI: jax.Array, matrix: Panels) -> jax.Array:
  """x @ matrix.T as the panels give it, float32 [n, t, C]; of one dtype."""
  t, several = len(x_tI), len(matrix.parts) > 1
  if several:
    x_tI = jnp.pad(x_tI, ((0, max(_ROWS - t, 0)), (0, 0)))
    # Formed once, not for each part.
    x_tI = jax.lax.optimization_barrier(x_tI)
  # Batched over panels, with x as it is for each: XLA copies no matrix.
  found = [
    jnp.einsum(
      "ntI,nIC->ntC",
      jnp.broadcast_to(x_tI, (len(part_nIC), *x_tI.shape)),
      part_nIC,
      preferred_element_type=jnp.float32,
    )
    for part_nIC in matrix.parts
  ]
  if not several:
    return found[0]
  # Alone, joining is copying; within what follows, a choice for each number.
  return jax.lax.optimization_barrier(jnp.concatenate(found))[:, :t]


def join(y_ntC: jax.Array) -> jax.Array:
  """[t, n * C]: a product's panels side by side."""
  return y_ntC.swapaxes(0, 1).reshape(y_ntC.shape[1], -1)


def matmul(x_tI: jax.Array, matrix: Panels) -> jax.Array:
  """x @ matrix.T, float32 [t, O]; both of one dtype."""
  return join(product(x_tI, matrix))


def take(matrix: Panels, rows: jax.Array) -> jax.Array:
  """[..., I]: rows of the matrix, as an embedding gives them."""
  each, _, C = matrix.parts[0].shape
  panel, column = rows // C, rows % C
  found, *others = (part[panel % each, :, column] for part in matrix.parts)
  for index, one in enumerate(others, start=1):
    found = jnp.where((panel // each == index)[..., None], one, found)
  return found


def reduce(function, a: jax.Array, axis: int) -> jax.Array:
  """jnp.max or jnp.sum of an array over an axis of panels, then the last one.

  Along the last alone XLA goes one word after the other, and it would make one
  reduction of the two.
  """
  return function(jax.lax.optimization_barrier(function(a, axis=axis)), axis=-1)
