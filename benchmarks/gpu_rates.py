"""What a device can do at best: the other half of MFU, SOL and MBU.

Each rate is measured beside the work it is held against, after `soak` seconds
of the same load: a card that is limited by its power does less than in the
first second.
"""

import statistics
import time

# So many in a row, that no launch shows.
_TOGETHER = 10


def matmul(size: int, soak: float, repeats: int) -> float:
  """bfloat16 FLOP/s: median of products [size, size]^2."""
  import jax
  import jax.numpy as jnp

  keys = jax.random.split(jax.random.key(0))
  a, b = (jax.random.normal(k, (size, size), jnp.bfloat16) for k in keys)
  b = b * jnp.bfloat16(size**-0.5)  # what comes out is spread as what went in

  @jax.jit
  def many(a):
    return jax.lax.fori_loop(0, _TOGETHER, lambda _, x: x @ b, a)

  return _TOGETHER * 2 * size**3 / _median(many, a, soak, repeats)


def copy(size: int, soak: float, repeats: int) -> float:
  """Bytes/s of memory, read and written counted: of `size` random bytes."""
  import jax
  import jax.numpy as jnp

  words = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
  # Not in one program, which would do all in one pass.
  once = jax.jit(lambda words: ~words)

  def many(words):
    for _ in range(_TOGETHER):
      words = once(words)
    return words

  return _TOGETHER * 2 * words.nbytes / _median(many, words, soak, repeats)


def _median(call, x, soak, repeats):
  """Seconds of a call on what the last one gave."""
  began = time.perf_counter()
  x = call(x).block_until_ready()
  while time.perf_counter() - began < soak:
    x = call(x).block_until_ready()
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    x = call(x).block_until_ready()
    times.append(time.perf_counter() - start)
  return statistics.median(times)
