"""The reference forward."""

import dataclasses
import pathlib

import numpy as np
import pytest

from llama_jax import errors
from llama_jax.checkpoint import gguf, hugging_face, names, proof, weights
from llama_jax.model import config as config_lib

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(params=["grouped", "stretched"])
def tiny(request):
  """(config, source, ids, logits) of a model that transformers ran."""
  config, source = hugging_face.open_tensors(GOLDEN / request.param)
  golden = np.load(GOLDEN / request.param / "golden.npz")
  return config, source, golden["ids"], golden["logits"]


@pytest.mark.parametrize("scheme", names.SCHEMES)
def test_reference_equals_transformers(tiny, scheme):
  """In every format's own names and RoPE layout."""
  config, source, ids, logits = tiny
  source = weights.as_scheme(config, source, scheme)
  (ours,) = proof.reference_logits(config, source, ids)
  # Logits reach 10; two float32 forwards differ in the order of sums.
  np.testing.assert_allclose(ours, logits, atol=5e-5)


def test_a_forgotten_permutation_shows(tiny):
  config, source, ids, logits = tiny
  origin = {
    after.name: before.name
    for before, after in zip(
      names.places(config, "hf"), names.places(config, "gguf"), strict=True
    )
  }
  wrong = weights.Source(
    "wrong",
    "gguf",
    {new: source.tensors[old] for new, old in origin.items()},
    lambda name, start, stop: source.rows(origin[name], start, stop),
  )
  (found,) = proof.reference_logits(config, wrong, ids)
  difference, loss, golden_loss = proof.compare(found, logits, ids)
  assert difference > 0.5
  assert abs(loss - golden_loss) > 1e-3


def test_a_wrong_scaling_shows_beyond_the_original_context():
  config, source = hugging_face.open_tensors(GOLDEN / "stretched")
  golden = np.load(GOLDEN / "stretched" / "golden.npz")
  plain = dataclasses.replace(config, rope_scaling=None)
  (wrong,) = proof.reference_logits(plain, source, golden["ids"])
  assert np.abs(wrong - golden["logits"]).max() > 0.1


def test_only_distances_between_positions_matter(tiny):
  config, source, ids, _ = tiny
  here = np.arange(len(ids))
  near, far = proof.reference_logits(
    config, source, ids, positions=[here, here + 1000], dtype=np.float64
  )
  np.testing.assert_allclose(near, far, atol=1e-8)


def test_compare_by_hand():
  logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
  worst, loss_a, loss_b = proof.compare(logits, logits * 0, [0, 1])
  assert worst == pytest.approx(np.log(10))
  assert loss_a == pytest.approx(np.log(4))  # token 1 under the first row
  assert loss_b == pytest.approx(np.log(3))


def test_vocabulary_must_fit_the_embedding(tiny):
  config = tiny[0]
  Vocabulary = dataclasses.make_dataclass("Vocabulary", ["vocab_size"])
  proof.check_vocabulary(config, Vocabulary(config.vocab_size), "m")
  proof.check_vocabulary(config, Vocabulary(config.vocab_size - 1), "m")
  with pytest.raises(errors.BadFileError, match=r"41 ids.*vocab_size=40"):
    proof.check_vocabulary(config, Vocabulary(config.vocab_size + 1), "m")


def test_inverse_frequencies_of_llama31():
  """The three bands of RECIPES.md 1, each computed by its own words."""
  config = config_lib.LlamaConfig(
    vocab_size=1,
    embed_dim=128,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=128,
    mlp_dim=1,
    norm_eps=1e-5,
    rope_theta=5e5,
    rope_scaling=config_lib.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    context_length=131072,
    tied_embeddings=False,
  )
  found = proof.inverse_frequencies(config)
  bands = set()
  for i, frequency in enumerate(found):
    plain = 5e5 ** (-2 * i / 128)
    wavelength = 2 * np.pi / plain
    if wavelength > 8192:
      bands.add("slowed")
      expected = plain / 8
    elif wavelength < 8192 / 4:
      bands.add("kept")
      expected = plain
    else:
      bands.add("between")
      s = (8192 / wavelength - 1) / (4 - 1)
      expected = (1 - s) * plain / 8 + s * plain
    assert frequency == pytest.approx(expected, rel=1e-12)
  assert len(bands) == 3


def test_smollm2_speaks(smollm2):
  """Read in the right layout the real weights know English and Python."""
  from llama_jax import text

  config, source = gguf.open_tensors(smollm2)
  tokenizer = text.load_tokenizer(smollm2)
  ids = tokenizer.encode(proof.TEXT)
  assert 80 <= len(ids) <= 180
  (logits,) = proof.reference_logits(config, source, ids)
  # 3.39 nats; 5.59 with query and key in the other layout.
  assert 3 < proof.mean_loss(logits, ids) < 4
