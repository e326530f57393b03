"""SentencePiece tokenizers against the `sentencepiece` library itself."""

import io
import json
import pathlib
import random

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from llama_jax import errors
from llama_jax import text as text_lib
from llama_jax.text import byte_bpe

_ROOT = pathlib.Path(__file__).parents[2]
_LLAMA2 = _ROOT.parent / "shared/data/tokenizers/llama2_tokenizer.model"
_TEXTS = [
  "",
  " ",
  "Hello world",
  "  two  spaces  ",
  "tabs\tand\r\nCRLF\n\n\n",
  "def f(x):\n    return x ** 2\n",
  "1234567890",
  "السلام عليكم 你好 👩‍👩‍👧‍👦 e\u0301 \u00a0\u200b",
  "NUL \0 \x01",
  "<s></s><unk><0x41>[INST]",
  "x" * 5000,
]


def _train(**changes):
  """A model trained the way Llama's was, on the text of this repository."""
  lines = [
    line
    for path in sorted((_ROOT / "llama_jax/text").glob("*.py"))
    for line in path.read_text().splitlines()
    if line.strip()
  ]
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    **{
      "vocab_size": 600,
      "model_type": "bpe",
      "byte_fallback": True,
      "split_digits": True,
      "normalization_rule_name": "identity",
      "remove_extra_whitespaces": False,
      "allow_whitespace_only_pieces": True,
      "unk_id": 0,
      "bos_id": 1,
      "eos_id": 2,
      "pad_id": -1,
      "num_threads": 1,
      "minloglevel": 2,
      **changes,
    },
  )
  return model.getvalue()


@pytest.fixture(scope="module")
def small():
  return _train()


@pytest.fixture(params=["trained", "llama2"])
def model(request, small):
  if request.param == "trained":
    return small
  if not _LLAMA2.exists():
    pytest.skip(f"needs {_LLAMA2}")
  return _LLAMA2.read_bytes()


def _load(tmp_path, model, config=None, **files):
  (tmp_path / "tokenizer.model").write_bytes(model)
  if config:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  for name, content in files.items():
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
  return text_lib.load_tokenizer(tmp_path)


def _fields(model, **changes):
  proto = model_pb2.ModelProto.FromString(model)
  return {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [p.piece for p in proto.pieces],
    "tokenizer.ggml.scores": [p.score for p in proto.pieces],
    "tokenizer.ggml.token_type": [p.type for p in proto.pieces],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    **changes,
  }


def test_equals_the_library(tmp_path, model):
  tok = _load(tmp_path, model)
  library = sentencepiece.SentencePieceProcessor(model_proto=model)
  expected = [library.encode(text) for text in _TEXTS]
  assert tok.encode_batch(_TEXTS) == expected
  assert [tok.encode(text) for text in _TEXTS] == expected
  assert [tok.decode(ids) for ids in expected] == _TEXTS
  assert (tok.bos_id, tok.eos_id, tok.stop_ids) == (1, 2, (2,))
  assert tok.add_bos and tok.vocab_size == library.vocab_size()
  assert tok.encode("a", bos=True, eos=True) == [1, *library.encode("a"), 2]


def test_decode_equals_the_library_on_any_ids(tmp_path, model):
  tok = _load(tmp_path, model)
  library = sentencepiece.SentencePieceProcessor(model_proto=model)
  pick = random.Random(0)
  for _ in range(500):
    ids = [pick.randrange(pick.choice((259, tok.vocab_size))) for _ in range(6)]
    assert tok.decode(ids) == library.decode(ids)


def test_special_tokens_are_not_spelled(tmp_path, model):
  tok = _load(tmp_path, model)
  assert tok.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
  assert {0, 1, 2}.isdisjoint(tok.encode("<s>a</s><unk>"))
  assert tok.encode_with_special("<s>a</s>") == [1, *tok.encode("a"), 2]


def test_gguf_rebuild_equals_the_model(tmp_path, model, assert_same):
  assert_same(
    _load(tmp_path, model), text_lib.from_gguf_metadata(_fields(model)), _TEXTS
  )


def test_gguf_without_space_prefix(small):
  tok = text_lib.from_gguf_metadata(
    _fields(small, **{"tokenizer.ggml.add_space_prefix": False})
  )
  plain = text_lib.from_gguf_metadata(_fields(small))
  assert tok.encode(" self") == plain.encode("self")
  assert tok.decode(tok.encode(" self")) == " self"


def test_save_round_trip_and_its_json(tmp_path, model, assert_same):
  tok = _load(tmp_path, model)
  tok.chat_template = "{{ messages }}"
  tok.save(tmp_path / "saved")
  again = text_lib.load_tokenizer(tmp_path / "saved")
  assert_same(tok, again, _TEXTS)
  assert (tmp_path / "saved/tokenizer.model").read_bytes() == model
  # The file that transformers reads is another implementation of the same.
  twin = text_lib.load_tokenizer(tmp_path / "saved/tokenizer.json")
  assert isinstance(twin, byte_bpe.ByteBpe)
  assert_same(tok, twin, _TEXTS)
  for ids in tok.encode_batch(_TEXTS):
    assert twin.decode(ids) == tok.decode(ids)


def test_tokens_added_by_the_folder(tmp_path, small, assert_same):
  entry = {"lstrip": False, "rstrip": False, "special": True}
  tok = _load(
    tmp_path,
    small,
    {
      "eos_token": "<|im_end|>",
      "added_tokens_decoder": {
        "600": {**entry, "content": "<|im_start|>"},
        "603": {**entry, "content": "<|im_end|>"},
      },
    },
    added_tokens={"<tool>": 601},
    generation_config={"eos_token_id": [603, 2]},
  )
  assert tok.vocab_size == 604
  assert tok.special_tokens["<|im_start|>"] == 600
  assert (tok.eos_id, tok.stop_ids) == (603, (603, 2))
  assert 600 not in tok.encode("<|im_start|>")
  assert tok.encode("a<tool>b") == [*tok.encode("a"), 601, *tok.encode("b")]
  ids = tok.encode_with_special("<|im_start|>user<|im_end|>")
  assert (ids[0], ids[-1]) == (600, 603)
  assert tok.decode(ids) == "user"
  tok.save(tmp_path / "saved")
  assert_same(tok, text_lib.load_tokenizer(tmp_path / "saved"), _TEXTS)
  twin = text_lib.load_tokenizer(tmp_path / "saved/tokenizer.json")
  assert twin.encode("a<tool>b") == tok.encode("a<tool>b")
  assert twin.stop_ids == tok.stop_ids


def test_a_user_defined_piece_named_special_is_not_spelled(tmp_path):
  model = _train(user_defined_symbols=["<|im_end|>", "<|plain|>"])
  tok = _load(tmp_path, model, {"eos_token": "<|im_end|>"})
  piece = sentencepiece.SentencePieceProcessor(model_proto=model).piece_to_id
  assert tok.eos_id == piece("<|im_end|>")
  assert tok.eos_id not in tok.encode("a <|im_end|>")
  assert piece("<|plain|>") in tok.encode("a <|plain|>")


def test_refusals(tmp_path, small):
  with pytest.raises(errors.BadFileError, match="different tokenizers"):
    _load(
      tmp_path,
      small,
      {"added_tokens_decoder": {"5": {"content": "<|x|>", "special": True}}},
    )
  (tmp_path / "tokenizer_config.json").unlink()
  for content in (small[:-100], small[:50], b"\n"):
    with pytest.raises(errors.BadFileError, match=r"tokenizer\.model"):
      _load(tmp_path, content)
  with pytest.raises(errors.BadFileError, match="scores"):
    text_lib.from_gguf_metadata(
      _fields(small, **{"tokenizer.ggml.scores": [0.0]})
    )
  with pytest.raises(errors.UserError, match="surrogate"):
    text_lib.from_gguf_metadata(_fields(small)).encode("\udc00")
