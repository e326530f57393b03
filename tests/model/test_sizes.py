"""The table of sizes against what was published."""

import math

import numpy as np
import pytest

from llama_jax import errors
from llama_jax.model import decoder, rope, sizes

# Parameters as the releases' model cards and weight indices count them.
PUBLISHED = {
  "llama-7b": 6_738_415_616,
  "llama-13b": 13_015_864_320,
  "llama-33b": 32_528_943_616,
  "llama-65b": 65_285_660_672,
  "llama2-7b": 6_738_415_616,
  "llama2-13b": 13_015_864_320,
  "llama2-70b": 68_976_648_192,
  "codellama-7b": 6_738_546_688,
  "codellama-13b": 13_016_028_160,
  "codellama-34b": 33_743_970_304,
  "llama3-8b": 8_030_261_248,
  "llama3.1-8b": 8_030_261_248,
  "llama3.1-70b": 70_553_706_496,
  "llama3.1-405b": 405_853_388_800,
  "llama3.2-1b": 1_235_814_400,
  "llama3.2-3b": 3_212_749_824,
  "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_published(name):
  assert decoder.count_parameters(sizes.get(name)) == PUBLISHED[name]


def test_shapes_that_share_a_count():
  """Variants whose count follows from another's by the vocabulary alone."""
  more = 16 * 8192 * 2
  assert (
    decoder.count_parameters(sizes.get("codellama-70b"))
    == PUBLISHED["llama2-70b"] + more
  )
  for one, other in (
    ("codellama-7b-python", "llama2-7b"),
    ("codellama-13b-python", "llama2-13b"),
    ("llama2-34b", "codellama-34b"),
    ("codellama-70b-python", "codellama-70b"),
    ("llama3-70b", "llama3.1-70b"),
  ):
    assert decoder.count_parameters(sizes.get(one)) == decoder.count_parameters(
      sizes.get(other)
    )


def meta_mlp_dim(width, multiplier, multiple_of):
  """The rule in words of RECIPES: 2/3 of 4 d, times, rounded up."""
  hidden = int(2 * 4 * width / 3)
  hidden = int(multiplier * hidden)
  return multiple_of * math.ceil(hidden / multiple_of)


@pytest.mark.parametrize(
  ("name", "multiplier", "multiple_of"),
  [
    ("llama-7b", 1, 256),
    ("llama-13b", 1, 256),
    ("llama-33b", 1, 256),
    ("llama-65b", 1, 256),
    ("llama2-70b", 1.3, 4096),
    ("llama3.1-8b", 1.3, 1024),
    ("llama3.1-70b", 1.3, 4096),
    ("llama3.1-405b", 1.2, 4096),
    ("llama3.2-1b", 1.5, 256),
    ("llama3.2-3b", 1.0, 256),
  ],
)
def test_widths_follow_metas_rule(name, multiplier, multiple_of):
  config = sizes.get(name)
  found = meta_mlp_dim(config.embed_dim, multiplier, multiple_of)
  assert config.mlp_dim == found


@pytest.mark.parametrize(
  ("name", "factor", "theta"),
  [
    ("llama-7b", None, 1e4),
    ("llama2-70b", None, 1e4),
    ("codellama-34b-python", None, 1e6),
    ("codellama-70b", None, 1e6),
    ("codellama-70b-python", None, 1e4),
    ("codellama-70b-instruct", None, 1e4),
    ("llama3-8b", None, 5e5),
    ("llama3.1-8b", 8, 5e5),
    ("llama3.1-405b", 8, 5e5),
    ("llama3.3-70b", 8, 5e5),
    ("llama3.2-1b", 32, 5e5),
    ("llama3.2-3b", 32, 5e5),
  ],
)
def test_rope_tables(name, factor, theta):
  """inv_freq one by one, by the bands of the paper, in Python's floats."""
  config = sizes.get(name)
  H = config.head_dim
  expected = []
  for i in range(H // 2):
    plain = math.exp(-(2 * i / H) * math.log(theta))
    turns = 8192 * plain / (2 * math.pi)  # in the original context
    if factor is None or turns > 4:
      expected.append(plain)
    elif turns < 1:
      expected.append(plain / factor)
    else:
      s = (turns - 1) / 3
      expected.append((1 - s) * plain / factor + s * plain)
  np.testing.assert_allclose(rope.frequencies(config), expected, rtol=1e-12)


@pytest.mark.parametrize(
  ("typed", "means"),
  [
    ("llama2-70b", "llama2-70b"),
    ("llama2-70b-chat", "llama2-70b"),
    ("codellama-34b-python", "codellama-34b"),
    ("codellama-70b-instruct", "codellama-70b-instruct"),
    ("codellama-7b-instruct", "codellama-7b"),
    ("llama3.3-70b", "llama3.3-70b"),
    ("llama3.2-1b-instruct", "llama3.2-1b"),
    ("meta-llama/Llama-3.2-1B-Instruct", "llama3.2-1b"),
    ("meta-llama/Llama-2-7b-chat-hf", "llama2-7b"),
    ("meta-llama/Meta-Llama-3.1-8B", "llama3.1-8b"),
    ("codellama/CodeLlama-13b-Python-hf", "codellama-13b-python"),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
    ("llama-30b", "llama-33b"),
    ("Llama-1-7B", "llama-7b"),
  ],
)
def test_names_as_users_type_them(typed, means):
  assert sizes.resolve(typed) == means


def test_an_unknown_name_is_refused_with_the_nearest():
  with pytest.raises(errors.ConfigError, match=r"nearest are .*llama2-7b"):
    sizes.get("llama2-7c")


def test_nearest_names_the_fields_that_differ():
  import dataclasses

  config = sizes.get("llama3.2-1b")
  assert sizes.nearest(config) == ("llama3.2-1b", {})
  longer = dataclasses.replace(config, rope_theta=1e6)
  assert sizes.nearest(longer) == ("llama3.2-1b", {"rope_theta": (1e6, 5e5)})
