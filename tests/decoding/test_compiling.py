"""Programs of decoding are jax.jit's, compiled as suits them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.decoding import compiling


@compiling.jit(static_argnames="power", donate_argnames="gone")
def program(x, gone, *, power):
  """What it does."""
  return x.astype(jnp.float32) ** power + gone


def test_it_is_what_jit_makes():
  assert program.__doc__ == "What it does."
  gone = jnp.ones(3)
  np.testing.assert_array_equal(program(jnp.full(3, 2.0), gone, power=3), 9)
  assert gone.is_deleted()
  shapes = jax.ShapeDtypeStruct((3,), jnp.float32)
  assert program.eval_shape(shapes, shapes, power=2).shape == (3,)
  assert program.lower(shapes, shapes, power=2).compile()(
    jnp.ones(3), jnp.ones(3)
  ).tolist() == [2, 2, 2]


@pytest.fixture
def asked(monkeypatch):
  """What compiler_options jax.jit was given, call by call."""
  found, jit = [], jax.jit

  def spy(function, **settings):
    found.append(settings.get("compiler_options"))
    return jit(function, **settings)

  monkeypatch.setattr(jax, "jit", spy)
  compiling._options.cache_clear()
  yield found
  compiling._options.cache_clear()


def run(x):
  return compiling.jit()(lambda x: x + x)(x)


def test_products_of_whole_numbers_are_left_to_xla(asked):
  run(jnp.ones(2))
  assert asked[-1] == compiling._OPTIONS["cpu"]
  run(jnp.ones(2, jnp.int8))
  assert asked[-1] is None


def test_an_option_that_xla_does_not_know_is_left_out(asked, monkeypatch):
  monkeypatch.setattr(compiling, "_OPTIONS", {"cpu": {"xla_no_such": "x"}})
  np.testing.assert_array_equal(run(jnp.ones(2)), 2)
  assert asked[-1] is None
