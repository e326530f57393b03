"""A real Llama from its GGUF says what transformers says of it.

golden/make_smollm2.py made the numbers. Two float32 programs that sum in other
orders stay far below 1e-3; a wrong RoPE layout moves the loss by nats.
"""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

import llama_jax
from llama_jax.decoding import loop, sampling
from llama_jax.text import chat

GOLDEN = pathlib.Path(__file__).parent / "golden"
IDS = json.loads((GOLDEN / "smollm2.json").read_text())
NUMBERS = np.load(GOLDEN / "smollm2.npz")


@pytest.fixture(scope="module")
def llama(smollm2):
  return llama_jax.load(f"gguf:{smollm2}")


@pytest.fixture(scope="module")
def logits(llama):
  return np.asarray(llama.logits([IDS["text_ids"]])[0])


def losses(logits):
  ids = IDS["text_ids"]
  logits = logits[:-1].astype(np.float64)
  log_sums = np.log(np.exp(logits).sum(-1))
  return log_sums - logits[np.arange(len(ids) - 1), ids[1:]]


def flip_rope(params, head_dim):
  """Queries and keys as if read in the other layout: pairs for halves."""

  def flip(kernel):
    L, D, width = kernel.shape
    heads = np.asarray(kernel).reshape(L, D, -1, 2, head_dim // 2)
    return heads.swapaxes(-1, -2).reshape(L, D, width)

  attention = params["layers"]["attention"]
  flipped = {
    name: {"kernel": flip(attention[name]["kernel"])}
    for name in ("query", "key")
  }
  layers = params["layers"] | {"attention": attention | flipped}
  return params | {"layers": layers}


def test_logits_and_mean_loss_equal_transformers(logits):
  want = NUMBERS["logits"]
  assert np.abs(want).max() > 10
  np.testing.assert_allclose(logits[:, NUMBERS["words"]], want, atol=1e-3)
  ours, theirs = losses(logits), NUMBERS["nll"]
  assert abs(ours.mean() - theirs.mean()) < 1e-3
  np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_the_wrong_rope_layout_is_seen(llama):
  wrong = dataclasses.replace(
    llama, params=flip_rope(llama.params, llama.config.head_dim)
  )
  flipped = losses(np.asarray(wrong.logits([IDS["text_ids"]])[0]))
  assert flipped.mean() - NUMBERS["nll"].mean() > 0.1


def test_greedy_chat_equals_transformers(llama):
  decoder, params = llama.unrolled
  (row,) = loop.generate(
    decoder,
    params,
    [IDS["chat_ids"]],
    max_new_tokens=64,
    sampling_config=sampling.SamplingConfig(),
    stop_ids=llama.tokenizer.stop_ids,
  )
  assert row == IDS["new_ids"]


def test_the_ids_are_those_of_the_template(llama):
  """So that the golden ids are what a user's chat begins with."""
  shown = llama.tokenizer.decode(IDS["chat_ids"])
  said = shown.split("user\n")[1].split("\nassistant")[0]
  messages = [{"role": "user", "content": said}]
  assert chat.render(llama.tokenizer, messages).ids == IDS["chat_ids"]
