"""A SentencePiece model trained here has the properties of Llama 2's."""

import random

import pytest
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from llama_jax import errors
from llama_jax import text as text_lib
from llama_jax.text import train_sentencepiece

_NASTY = [
  "",
  " ",
  "  two  spaces  ",
  "tabs\tand\r\nCRLF\n\n\nlines\n",
  "1234567890 and 3.14",
  "你好，世界 👩‍👩‍👧‍👦 ﬁ Å e\u0301",
  "NUL \0 ▅ \u2028 \ufeff",
  "x" * 5000,
]


@pytest.fixture(scope="module")
def model(python_source):
  lines = [
    line
    for text in python_source
    for line in train_sentencepiece.sentences(text)
  ]
  return train_sentencepiece.train(lines, 600)


@pytest.fixture(scope="module")
def tok(model, tmp_path_factory):
  path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
  path.write_bytes(model)
  return text_lib.load_tokenizer(path)


def test_the_settings_are_those_of_llama_2(model):
  proto = model_pb2.ModelProto()
  proto.ParseFromString(model)
  trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
  assert trainer.model_type == model_pb2.TrainerSpec.BPE
  assert trainer.byte_fallback and trainer.split_digits
  assert trainer.allow_whitespace_only_pieces
  assert normalizer.name == "identity" and not normalizer.precompiled_charsmap
  assert normalizer.add_dummy_prefix
  assert not normalizer.remove_extra_whitespaces
  names = [piece.piece for piece in proto.pieces]
  assert len(names) == 600
  assert names[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
  # A digit stands alone, a line end in no piece.
  pieces = names[259:]
  assert not [p for p in pieces if len(p) > 1 and any(map(str.isdigit, p))]
  assert not [p for p in pieces if "\n" in p]


def test_it_loses_nothing(tok, python_source):
  assert (tok.bos_id, tok.eos_id, tok.vocab_size) == (1, 2, 600)
  for text in [*_NASTY, *python_source]:
    assert tok.decode(tok.encode(text)) == text
  # Letters that it never saw are their bytes.
  assert tok.encode("你")[-3:] == [3 + b for b in "你".encode()]


def test_it_compresses_what_it_was_trained_on(tok, python_source):
  text = "".join(python_source)
  assert len(tok.encode(text)) < 0.6 * len(text.encode())


def test_sentences_lose_nothing_but_what_they_are_cut_at():
  pick = random.Random(0)
  limit = train_sentencepiece.MAX_SENTENCE_BYTES
  letters = ["a" * 50, "é" * 50, "🦙" * 500, " ", "\n", "\0", "▅", "\t", "\r"]
  for _ in range(50):
    text = "".join(pick.choices(letters, k=pick.randrange(200)))
    parts = list(train_sentencepiece.sentences(text))
    assert all(0 < len(part.encode()) <= limit for part in parts)
    for letter in "\n\0▅":
      text = text.replace(letter, "")
    # Spaces are gone only where a long line was cut.
    assert "".join(parts).replace(" ", "") == text.replace(" ", "")
    if all(len(part.encode()) < limit / 2 for part in parts):
      assert "".join(parts) == text


def test_bad_sizes_and_texts_are_refused():
  with pytest.raises(errors.UserError, match=r"vocab_size=5000.*too high"):
    train_sentencepiece.train(["some words"], 5000)
  with pytest.raises(errors.UserError, match="vocab_size=200"):
    train_sentencepiece.train(["some words"], 200)
  with pytest.raises(errors.UserError, match="no text"):
    train_sentencepiece.train([], 300)


def test_a_fault_of_the_text_comes_through():
  def lines():
    yield "some words"
    raise errors.BadFileError("line 2 is damaged")

  with pytest.raises(errors.BadFileError, match="line 2 is damaged"):
    train_sentencepiece.train(lines(), 300)
