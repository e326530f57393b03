"""How the programs of decoding are compiled."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import kernels

# XLA on CPU gives products to a library of kernels, and whatever adds up beside
# them too: norms, the softmax. For the few rows of decoding such sums are slow
# there, and so is a product that cannot be given together with what its result
# is turned into (8 rows of a 135M model: 74 ms a step, and 58 with this kind
# alone; a prompt of 512 tokens from panels: 1.25 s and 0.95). It leaves out
# products of whole numbers, which nothing else is fast at. Training and prompts
# of plain matrices are a little faster as XLA would have it.
_OPTIONS = {
  "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
}


@functools.cache
def _options(platform: str) -> dict[str, Any] | None:
  """What jax.jit takes as compiler_options; None where there is nothing."""
  wanted = _OPTIONS.get(platform)
  if wanted is None:
    return None
  try:
    jax.jit(lambda x: x, compiler_options=wanted).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return None  # Of an XLA that calls it otherwise: slower, and right.
  return wanted


class Jitted:
  """jax.jit of a function, with what suits the platform it is called on.

  Made when it is first called, since importing asks for no device. Not to be
  called within another's trace, where JAX refuses such options.
  """

  def __init__(self, function: Callable, settings: dict[str, Any]):
    functools.update_wrapper(self, function)
    self._settings = settings
    self._made: dict[str, Any] = {}

  def _jitted(self, *args, **kwargs):
    platform = kernels.platform()
    if platform in _OPTIONS and _has_whole_numbers((args, kwargs)):
      platform = ""
    if platform not in self._made:
      self._made[platform] = jax.jit(
        self.__wrapped__,
        compiler_options=_options(platform),
        **self._settings,
      )
    return self._made[platform]

  def __call__(self, *args, **kwargs):
    return self._jitted(*args, **kwargs)(*args, **kwargs)

  def lower(self, *args, **kwargs):
    """As that of what jax.jit gives; eval_shape likewise."""
    return self._jitted(*args, **kwargs).lower(*args, **kwargs)

  def eval_shape(self, *args, **kwargs):
    return self._jitted(*args, **kwargs).eval_shape(*args, **kwargs)


def _has_whole_numbers(tree) -> bool:
  """Whether weights are quantized (kernels/int8.py)."""
  return any(
    getattr(leaf, "dtype", None) == jnp.int8 for leaf in jax.tree.leaves(tree)
  )


def jit(**settings) -> Callable[[Callable], Jitted]:
  """A decorator; settings are jax.jit's."""
  return lambda function: Jitted(function, settings)
