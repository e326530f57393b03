"""SentencePiece tokenizers against the `sentencepiece` library itself."""

import io
import json
import pathlib
import pickle
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


def test_another_process_gets_the_same_tokenizer(tmp_path, model, assert_same):
  """As finetuning's readers do."""
  before = _load(tmp_path, model)
  assert_same(before, pickle.loads(pickle.dumps(before)), _TEXTS)


def test_gguf_metadata_is_the_same_tokenizer(tmp_path, model, assert_same):
  tok = _load(tmp_path, model)
  tok.chat_template = "{{ messages }}"
  made = tok.gguf_metadata()
  again = text_lib.from_gguf_metadata(made)
  assert_same(tok, again, _TEXTS)
  assert again.gguf_metadata() == made
  fields = _fields(model)
  assert {key: made[key] for key in fields} == fields
  # As a writer pads the tokens to the rows of the embedding.
  made["tokenizer.ggml.tokens"].append(f"[PAD{tok.vocab_size}]")
  made["tokenizer.ggml.scores"].append(-1e4)
  made["tokenizer.ggml.token_type"].append(5)
  assert text_lib.from_gguf_metadata(made).vocab_size == tok.vocab_size


@pytest.mark.parametrize("scheme", ["prepend", "first", "always", "never"])
def test_gguf_metadata_of_a_document_is_the_same_tokenizer(
  tmp_path, model, assert_same, scheme
):
  config = {"added_tokens_decoder": {"32000": {"content": "<tool>"}}}
  _load(tmp_path, model, config).save(tmp_path / "saved")
  path = tmp_path / "saved/tokenizer.json"
  (tmp_path / "saved/tokenizer.model").unlink()
  if scheme != "prepend":
    # As transformers writes it.
    spec = json.loads(path.read_text())
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {
      "type": "Metaspace",
      "replacement": "\u2581",
      "prepend_scheme": scheme,
      "split": False,
    }
    if scheme == "never":
      spec["decoder"]["decoders"].pop()
    path.write_text(json.dumps(spec))
  tok = text_lib.load_tokenizer(tmp_path / "saved")
  assert isinstance(tok, byte_bpe.ByteBpe)
  fields = tok.gguf_metadata()
  again = text_lib.from_gguf_metadata(fields)
  same = ("prepend", "never")  # the others put no second space before one
  texts = [t for t in _TEXTS if scheme in same or not t.startswith(" ")]
  assert_same(tok, again, [*texts, "a<tool>"])
  assert [again.decode(i) for i in again.encode_batch(_TEXTS)] == _TEXTS


def test_added_tokens_of_a_gguf_that_are_pieces_stay_pieces(small, assert_same):
  fields = _fields(small)
  said = {"tokenizer.ggml.added_tokens": [fields["tokenizer.ggml.tokens"][300]]}
  assert_same(
    text_lib.from_gguf_metadata(fields),
    text_lib.from_gguf_metadata({**fields, **said}),
    _TEXTS,
  )


def test_gguf_metadata_refuses_unigram(tmp_path):
  tok = _load(tmp_path, _train(model_type="unigram", vocab_size=400))
  with pytest.raises(errors.UserError, match="not BPE"):
    tok.gguf_metadata()


def test_model_file_is_the_model(tmp_path, model):
  assert _load(tmp_path, model).model_file() == model


def test_ten_thousand_messages_never_yield_a_special_id(tmp_path, model):
  entries = [
    {"content": f"<|{name}|>", "special": True} for name in ("im_end", "x")
  ]
  size = len(model_pb2.ModelProto.FromString(model).pieces)
  tok = _load(
    tmp_path,
    model,
    {"added_tokens_decoder": {str(size + n): e for n, e in enumerate(entries)}},
  )
  assert len(tok.special_tokens) == 5
  pick = random.Random(0)
  bits = (*tok.special_tokens, "<|", "|>", "<", "s>", " ", "\u2581", "\n", "\0")
  messages = [
    "".join(pick.choice(bits) for _ in range(pick.randrange(1, 8)))
    for _ in range(10_000)
  ]
  ids = tok.encode_batch(messages)
  assert {i for found in ids for i in found}.isdisjoint(
    tok.special_tokens.values()
  )
  # The mark of a space is the one character that the scheme does not keep.
  assert [tok.decode(found) for found in ids] == [
    message.replace("\u2581", " ") for message in messages
  ]


@pytest.mark.parametrize("unit", ["x", " ", "é", "👩‍👩‍👧‍👦", "\r\n", "!a1"])
def test_100_kb_without_a_break_equals_the_library(tmp_path, model, unit):
  tok = _load(tmp_path, model)
  library = sentencepiece.SentencePieceProcessor(model_proto=model)
  text = unit * (100_000 // len(unit.encode()))
  ids = tok.encode(text)
  assert ids == library.encode(text)
  assert tok.decode(ids) == text


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
  again = text_lib.from_gguf_metadata(tok.gguf_metadata())
  assert_same(tok, again, [*_TEXTS, "a<tool>b", "<tool> <tool><|im_end|>"])
  assert tok.encode_batch(["a<tool>b", "", "<tool>"]) == [
    tok.encode("a<tool>b"),
    [],
    [601],
  ]


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
