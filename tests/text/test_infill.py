"""Infilling as Code Llama's own code encodes it, and as other families do."""

import pathlib
import random
import re

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from llama_jax import errors
from llama_jax import text as text_lib
from llama_jax.text import infill, stream

_LLAMA2 = (
  pathlib.Path(__file__).parents[3]
  / "shared/data/tokenizers/llama2_tokenizer.model"
)
_PRE, _SUF, _MID, _EOT = 32007, 32008, 32009, 32010
_TEXTS = [
  "def f(x):\n    return x\n",
  "x",
  "",
  " leading",
  "\n\tline",
  "  two",
  "123 é 你好 👩‍👩‍👧‍👦",
  "☺☺",
  "a < b ▁ > c",
]


@pytest.fixture(scope="module")
def library():
  if not _LLAMA2.exists():
    pytest.skip(f"no {_LLAMA2}")
  return sentencepiece.SentencePieceProcessor(str(_LLAMA2))


@pytest.fixture(scope="module")
def code_llama_model(library):
  """Llama 2's pieces, and Code Llama's at their ids: common pieces, and those
  that merges reach them by, so that plain text spells <PRE>."""
  proto = model_pb2.ModelProto()
  proto.ParseFromString(_LLAMA2.read_bytes())
  names = ["▁<SU", "▁<SUF", "▁<PRE", "▁<M", "▁<MID", "▁<E", "▁<EOT"]
  names += ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
  for id, name in enumerate(names, start=32000):
    proto.pieces.add(piece=name, score=259 - id)
  return proto.SerializeToString()


@pytest.fixture(scope="module")
def code_llama(code_llama_model, tmp_path_factory):
  path = tmp_path_factory.mktemp("code_llama") / "tokenizer.model"
  path.write_bytes(code_llama_model)
  return text_lib.load_tokenizer(path)


def _bytes_and(names, eos="<|endoftext|>"):
  """A vocabulary of bytes, these special tokens after them."""
  import tokenizers

  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokens = [*letters, *names, eos]
  return text_lib.from_gguf_metadata(
    {
      "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.tokens": tokens,
      "tokenizer.ggml.token_type": [1] * 256 + [3] * (len(names) + 1),
      "tokenizer.ggml.merges": [],
      "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
  )


@pytest.mark.parametrize("prefix", _TEXTS)
@pytest.mark.parametrize("suffix", _TEXTS)
def test_prompts_are_as_code_llama_makes_them(
  code_llama, library, prefix, suffix
):
  """codellama, generation.py: the text after a ☺, without the two ids of it."""

  def inside(text):
    ids = library.encode("☺" + text)
    assert library.id_to_piece(ids[:2]) == ["▁", "☺"]
    return ids[2:]

  before, after = library.encode(prefix), inside(suffix)
  format = infill.Infill(code_llama)
  psm = format.prompt(prefix, suffix)
  assert psm.ids == [1, _PRE, *before, _SUF, *after, _MID]
  spm = format.prompt(prefix, suffix, suffix_first=True)
  assert spm.ids == [1, _PRE, _SUF, *after, _MID, *before]
  assert psm.stop_ids == spm.stop_ids == (_EOT, 2)
  document = format.document(prefix, "mid", suffix)
  assert document == [*psm.ids, *inside("mid"), _EOT]
  document = format.document(prefix, "mid", suffix, suffix_first=True)
  together = library.encode(prefix + "mid")
  assert document == [1, _PRE, _SUF, *after, _MID, *together, _EOT]


def test_the_middle_comes_back_with_its_spaces(code_llama):
  """What a model is to write after the prompt, streamed, is the middle."""
  format = infill.Infill(code_llama)
  pick = random.Random(0)
  text = "".join(_TEXTS)
  for _ in range(200):
    parts = infill.split(text, pick.randrange(60), pick.randrange(60))
    assert "".join(parts) == text
    ids = format.document(*parts)
    prompt = format.prompt(parts[0], parts[2])
    assert ids[: len(prompt.ids)] == prompt.ids
    assert ids[-1] in prompt.stop_ids
    new = stream.Detokenizer(code_llama, continues=True)
    written = new.push_many(ids[len(prompt.ids) : -1]) + new.flush()
    assert written == parts[1]
    # All of the document is there, and once.
    special = {1, _PRE, _SUF, _MID, _EOT}
    for order in (False, True):
      ids = format.document(*parts, suffix_first=order)
      assert [i for i in ids if i in special].count(_MID) == 1
      shown = code_llama.join_bytes(ids, True)[0].decode()
      # "▁" is a space to SentencePiece.
      shown, whole = (re.sub("[▁ ]", "", x) for x in (shown, text))
      assert sorted(shown) == sorted(whole)


@pytest.mark.parametrize(
  "names, end",
  [
    (("<PRE>", "<SUF>", "<MID>", "<EOT>"), "<EOT>"),
    (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "<|endoftext|>"),
    (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), "<|endoftext|>"),
    (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), "<|endoftext|>"),
    (("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"), "<|endoftext|>"),
  ],
)
def test_other_families_use_their_own_tokens(names, end):
  tok = _bytes_and(names)
  pre, suf, mid = (tok.special_tokens[name] for name in names[:3])
  format = infill.Infill(tok)
  a, b, c = (tok.encode(text) for text in ("a ", " b", "c"))
  assert format.prompt("a ", "c").ids == [pre, *a, suf, *c, mid]
  assert format.document("a ", " b", "c") == [
    *(pre, *a, suf, *c, mid, *b),
    tok.special_tokens[end],
  ]
  assert tok.eos_id in format.stop_ids
  if names[2].strip("<|｜>").endswith("end"):
    with pytest.raises(errors.UserError, match="suffix_first=True"):
      format.prompt("a", "c", suffix_first=True)
  else:
    spm = format.prompt("a ", "c", suffix_first=True).ids
    assert spm == [pre, suf, *c, mid, *a]


def test_a_tokenizer_without_such_tokens_says_what_it_needs():
  for names in ((), ("<fim_prefix>", "<fim_suffix>")):
    with pytest.raises(errors.UserError, match=r"fim_prefix.*Code Llama"):
      infill.Infill(_bytes_and(names))


def test_a_document_never_spells_the_tokens(code_llama, code_llama_model):
  raw = sentencepiece.SentencePieceProcessor()
  raw.LoadFromSerializedProto(code_llama_model)
  assert raw.encode("a <PRE> <SUF>")[1:] == [_PRE, _SUF]
  format = infill.Infill(code_llama)
  text = "▁<PRE> <PRE> <SUF> <MID> <EOT></s><s> ▁<EOT>" * 3
  for order in (False, True):
    ids = format.document(text, text, text, order)
    special = [i for i in ids if i in code_llama.special_tokens.values()]
    assert sorted(special) == [1, _PRE, _SUF, _MID, _EOT]
