"""Streamed text equals decoded text, whatever the ids and the cuts."""

import random

import pytest
import tokenizers

from llama_jax import errors
from llama_jax import text as text_lib
from llama_jax.text import stream

_TEXT = " Hé  👩‍👩‍👧‍👦 你好\n السلام 🇫🇷\t1234"


def _bytes_first(model):
  """GGUF metadata of a vocabulary of single bytes, of either family."""
  if model == "gpt2":
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
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


def _cut(text, stops):
  """By definition: the first stop string to be complete, the longest of those
  that are so together."""
  for end in range(len(text) + 1):
    found = [stop for stop in stops if text[:end].endswith(stop)]
    if found:
      longest = max(found, key=len)
      return text[: end - len(longest)], longest
  return text, None


def test_stop_strings_cut_wherever_tokens_lie(tok):
  pick = random.Random(0)
  met = 0
  for _ in range(3000):
    letters = pick.choice(["ab", "ab \n", "aé\ufffd👩🇫"])
    text = "".join(pick.choices(letters, k=pick.randrange(12)))
    stops = [
      "".join(pick.choices(letters, k=pick.randrange(1, 5)))
      for _ in range(pick.randrange(4))
    ]
    ids = tok.encode(text)
    if pick.random() < 0.3:
      ids.insert(pick.randrange(len(ids) + 1), pick.randrange(tok.vocab_size))
    detokenizer = stream.Detokenizer(tok, stop_strings=stops)
    want, stop = _cut(tok.decode(ids), stops)
    # In groups of any size, and twice: a flushed one is as new.
    for _ in range(2):
      parts, at = [], 0
      while at < len(ids):
        size = pick.randrange(1, 4)
        parts.append(detokenizer.push_many(ids[at : at + size]))
        at += size
        assert want.startswith("".join(parts))
      seen = detokenizer.stopped
      parts.append(detokenizer.flush())
      assert "".join(parts) == want
      # Only the flush may complete one, with an unfinished letter's U+FFFD.
      assert seen == stop or (seen is None and "\ufffd" in stop)
      assert detokenizer.stopped is None
    met += stop is not None
  assert 500 < met < 2500


def test_no_more_is_held_back_than_a_stop_string_asks(tok):
  def ids(letters):
    return [tok.encode(letter)[-1] for letter in letters]

  detokenizer = stream.Detokenizer(tok, stop_strings=["</end>", "<x"])
  shown = [detokenizer.push_many(ids(c)) for c in "a</b</en"]
  assert shown == ["a", "", "", "</b", "", "", "", ""]
  assert detokenizer.push_many(ids("d")) == ""
  assert detokenizer.stopped is None
  assert detokenizer.push_many(ids(">more")) == ""
  assert detokenizer.stopped == "</end>"
  assert detokenizer.push_many(ids("more")) == ""
  assert detokenizer.flush() == ""
  detokenizer.push_many(ids("a</en"))
  assert detokenizer.flush() == "</en"


@pytest.mark.parametrize("stops", ["\n", [""], ["a", ""], [1], [None]])
def test_stop_strings_that_cannot_stop_are_refused(tok, stops):
  with pytest.raises(errors.UserError, match="stop="):
    stream.Detokenizer(tok, stop_strings=stops)
