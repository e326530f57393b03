"""Streamed text equals decoded text, whatever the ids and the cuts."""

import random
import time

import pytest

from llama_jax import text as text_lib
from llama_jax.text import byte_bpe, stream

_TEXT = " Hé  👩‍👩‍👧‍👦 你好\n السلام 🇫🇷\t1234"


def _bytes_first(model):
  """GGUF metadata of a vocabulary of single bytes, of either family."""
  if model == "gpt2":
    letters = sorted(byte_bpe._LETTERS, key=byte_bpe._LETTERS.get)
    tokens = ["<s>", "</s>", *letters, "Ġw"]
    kinds = [3, 3] + [1] * 257
    return {
      "tokenizer.ggml.merges": ["Ġ w"],
      "tokenizer.ggml.tokens": tokens,
      "tokenizer.ggml.token_type": kinds,
    }
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
  tokens += ["▁", "w", "▁w", "é"]
  return {
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -9.0, -1.0, -2.0],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 4,
  }


@pytest.fixture(params=["gpt2", "llama"])
def tok(request):
  fields = {
    "tokenizer.ggml.model": request.param,
    "tokenizer.ggml.bos_token_id": 0 if request.param == "gpt2" else 1,
    "tokenizer.ggml.eos_token_id": 1 if request.param == "gpt2" else 2,
    **_bytes_first(request.param),
  }
  return text_lib.from_gguf_metadata(fields)


def test_text_comes_whole_and_never_in_halves(tok):
  ids = tok.encode(_TEXT)
  assert len(ids) > 40  # most characters come in several ids
  detokenizer = stream.Detokenizer(tok)
  parts = [detokenizer.push(i) for i in ids]
  assert "".join(parts) + detokenizer.flush() == tok.decode(ids) == _TEXT
  assert "\ufffd" not in "".join(parts)


@pytest.mark.parametrize("skip_special", [True, False])
def test_any_ids_equal_decode(tok, skip_special):
  pick = random.Random(0)
  for _ in range(500):
    size = pick.randrange(12)
    ids = [pick.randrange(tok.vocab_size + 3) for _ in range(size)]
    detokenizer = stream.Detokenizer(tok, skip_special=skip_special)
    streamed = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert streamed == tok.decode(ids, skip_special)
    assert detokenizer.push_many(ids) + detokenizer.flush() == streamed


def test_invalid_bytes_are_not_held(tok):
  # A lead byte of four, then no continuation: three bytes wait at the most.
  first = tok.encode("\U00010348")[-4:]
  detokenizer = stream.Detokenizer(tok)
  assert detokenizer.push_many(first[:3]) == ""
  assert detokenizer.push(first[0]) == tok.decode(first[:3])
  detokenizer.flush()
  shown = [detokenizer.push(first[1]) for _ in range(50)]
  assert shown == ["\ufffd"] * 50


def test_continued_text_keeps_its_space(tok):
  prompt, whole = tok.encode("w"), tok.encode("w w")
  new = whole[len(prompt) :]
  detokenizer = stream.Detokenizer(tok, continues=True)
  assert detokenizer.push_many(new) + detokenizer.flush() == " w"


def test_time_is_linear(tok):
  def seconds(count):
    detokenizer = stream.Detokenizer(tok)
    start = time.perf_counter()
    for i in [5] * count:
      detokenizer.push(i)
    return time.perf_counter() - start

  seconds(1000)
  few, many = (min(seconds(n) for _ in range(3)) for n in (2000, 20000))
  # Ten times the ids; a quadratic way would take a hundred times as long.
  assert many < 40 * few
