"""How the programs of decoding are compiled."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from llama_jax import kernels

# XLA on CPU gives products to a library of kernels, and whatever adds up beside
# them too: norms, the softmax. For the few rows of decoding each such sum then
# takes longer than the product it stands beside, and one that is joined with a
# product spoils that (8 rows of a 135M model: 68 ms a token, and 54 with
# products alone; a prompt of 512 tokens from panels takes half the time).
# Training is a little faster as XLA would have it.
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

  def _jitted(self):
    platform = kernels.platform()
    if platform not in self._made:
      self._made[platform] = jax.jit(
        self.__wrapped__,
        compiler_options=_options(platform),
        **self._settings,
      )
    return self._made[platform]

  def __call__(self, *args, **kwargs):
    return self._jitted()(*args, **kwargs)

  def lower(self, *args, **kwargs):
    """As that of what jax.jit gives; eval_shape likewise."""
    return self._jitted().lower(*args, **kwargs)

  def eval_shape(self, *args, **kwargs):
    return self._jitted().eval_shape(*args, **kwargs)


def jit(**settings) -> Callable[[Callable], Jitted]:
  """A decorator; settings are jax.jit's."""
  return lambda function: Jitted(function, settings)
