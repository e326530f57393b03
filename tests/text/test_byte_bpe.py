"""Byte-level BPE against transformers' ids and the library's own decoding."""

import json
import pathlib
import random
import struct

import pytest
import tokenizers

from llama_jax import errors
from llama_jax import text as text_lib
from llama_jax.text import byte_bpe, gguf_header

_GOLDEN = json.loads(
  (pathlib.Path(__file__).parent / "golden/smollm2_ids.json").read_text()
)
_PROSE = (pathlib.Path(__file__).parents[2] / "setup.cfg").read_text()
_TEXTS = [entry["text"] for entry in _GOLDEN["texts"]]


@pytest.fixture(scope="module")
def smol(smollm2):
  return text_lib.load_tokenizer(smollm2)


def _trained(specials=("<s>", "</s>"), pre="ByteLevel"):
  """A small real tokenizer.json, trained here; not what we rebuild."""
  library = tokenizers.Tokenizer(tokenizers.models.BPE())
  library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  library.decoder = tokenizers.decoders.ByteLevel()
  library.train_from_iterator(
    [_PROSE],
    tokenizers.trainers.BpeTrainer(
      vocab_size=500,
      special_tokens=list(specials),
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  return library


def _fields(library, **changes):
  """GGUF metadata of a trained tokenizer."""
  spec = json.loads(library.to_str())
  vocab = spec["model"]["vocab"]
  tokens = sorted(vocab, key=vocab.get)
  special = {t["content"] for t in spec["added_tokens"]}
  return {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": [3 if t in special else 1 for t in tokens],
    "tokenizer.ggml.merges": [" ".join(m) for m in spec["model"]["merges"]],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    **changes,
  }


@pytest.mark.parametrize("entry", _GOLDEN["texts"], ids=lambda e: e["text"][:9])
def test_ids_equal_transformers(smol, entry):
  assert smol.encode(entry["text"]) == entry["ids"]


def test_decode_is_the_inverse_and_batch_equals_single(smol):
  batch = smol.encode_batch(_TEXTS)
  assert batch == [smol.encode(text) for text in _TEXTS]
  assert [smol.decode(ids) for ids in batch] == _TEXTS


def test_smollm2_conventions(smol):
  assert (smol.vocab_size, smol.bos_id, smol.eos_id) == (49152, 1, 2)
  assert smol.stop_ids == (2, 0)
  assert not smol.add_bos
  assert len(smol.special_tokens) == 17
  assert smol.encode("a", bos=True, eos=True) == [1, *smol.encode("a"), 2]


def test_text_that_spells_special_tokens_stays_text(smol):
  spelled = "".join(smol.special_tokens)
  assert set(smol.encode(spelled)).isdisjoint(smol.special_tokens.values())
  assert smol.encode_with_special(spelled) == list(smol.special_tokens.values())
  assert smol.decode(smol.encode_with_special(spelled)) == ""
  assert smol.decode(smol.encode_with_special(spelled), False) == spelled


def test_a_merge_that_spells_a_special_token_is_never_taken():
  # Llama-2 style files hold "<s>" in their vocabulary, and may merge up to it.
  library = _trained()
  spec = json.loads(library.to_str())
  vocab = spec["model"]["vocab"]
  for pair in (["<", "s"], ["<s", ">"]):
    vocab.setdefault("".join(pair), len(vocab))
    spec["model"]["merges"].insert(0, pair)
  spec["model"]["ignore_merges"] = True
  tok = byte_bpe.from_spec(
    json.dumps(spec).encode(), "tokenizer.json", pathlib.Path("/nowhere")
  )
  assert 0 not in tok.encode("<s> x<s>")
  assert tok.decode(tok.encode("<s> x<s>")) == "<s> x<s>"


def test_added_tokens_that_are_not_special_are_one_id_in_any_text():
  library = _trained()
  library.add_tokens(["<tool>"])
  library.add_special_tokens(["<|eot_id|>"])
  tok = byte_bpe.from_spec(
    library.to_str().encode(), "tokenizer.json", pathlib.Path("/nowhere")
  )
  ids = [library.token_to_id(t) for t in ("<tool>", "<|eot_id|>")]
  assert tok.encode("<tool>") == ids[:1]
  assert tok.decode(ids) == "<tool>"
  assert tok.vocab_size == ids[1] + 1
  assert ids[1] in tok.stop_ids
  assert ids[1] not in tok.encode("<|eot_id|>")


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe"])
def test_gguf_rebuild_and_save_round_trip(tmp_path, pre, assert_same):
  fields = _fields(
    _trained(),
    **{
      "tokenizer.ggml.pre": pre,
      "tokenizer.ggml.eot_token_id": 7,
      "tokenizer.chat_template": "{{ messages }}\n",
    },
  )
  tok = text_lib.from_gguf_metadata(fields)
  assert tok.stop_ids == (1, 7)
  assert tok.add_bos == (pre == "llama-bpe")
  assert [tok.decode(i) for i in tok.encode_batch(_TEXTS)] == _TEXTS
  tok.save(tmp_path)
  again = text_lib.load_tokenizer(tmp_path)
  assert_same(tok, again, _TEXTS)
  for id in range(tok.vocab_size):
    assert tok.decode([id], False) == again.decode([id], False)
  # As others read the file: bos comes by itself where the model wants it.
  other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  other.encode_special_tokens = True
  for text in _TEXTS:
    assert other.encode(text).ids == tok.encode(text, bos=tok.add_bos)


def test_gguf_rebuild_equals_the_trained_tokenizer():
  library = _trained()
  tok = text_lib.from_gguf_metadata(_fields(library))
  library.encode_special_tokens = True
  assert tok.encode_batch(_TEXTS) == [library.encode(t).ids for t in _TEXTS]


def test_llama3_cut_keeps_three_digits_and_line_ends_together():
  tok = text_lib.from_gguf_metadata(
    _fields(_trained(), **{"tokenizer.ggml.pre": "llama-bpe"})
  )
  cut = tok._library.pre_tokenizer.pre_tokenize_str("I'LL pay 12345.\n\n ok")
  assert [w for w, _ in cut] == ["I", "'LL", "Ġpay", "Ġ", "123", "45"] + [
    ".ĊĊ",
    "Ġok",
  ]


def test_decode_equals_the_library_on_any_ids(smol, tmp_path):
  # Random ids spell broken UTF-8 often; both must show it alike.
  smol.save(tmp_path)
  library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  pick = random.Random(0)
  for _ in range(300):
    ids = [pick.choice((pick.randrange(300), pick.randrange(49152)))] * 2
    ids += [pick.randrange(300) for _ in range(5)]
    for skip in (True, False):
      assert smol.decode(ids, skip) == library.decode(ids, skip)


@pytest.mark.parametrize("kind", ["first", "always", "prepend", "unigram"])
def test_text_between_special_tokens_equals_the_library(kind, tmp_path):
  # Llama-2 style files; a few put a space before the first word only.
  parts = tokenizers
  specials = [
    tokenizers.AddedToken("<unk>", special=True, normalized=False),
    tokenizers.AddedToken("<s>", special=True, normalized=False),
    tokenizers.AddedToken("<l>", special=True, normalized=False, lstrip=True),
    tokenizers.AddedToken("<r>", special=True, normalized=False, rstrip=True),
  ]
  if kind == "unigram":
    library = parts.Tokenizer(parts.models.Unigram())
    trainer = parts.trainers.UnigramTrainer(
      vocab_size=200,
      special_tokens=specials,
      unk_token="<unk>",
      show_progress=False,
    )
  else:
    library = parts.Tokenizer(parts.models.BPE(unk_token="<unk>"))
    trainer = parts.trainers.BpeTrainer(
      vocab_size=300, special_tokens=specials, show_progress=False
    )
  scheme = "always" if kind == "unigram" else kind
  if kind == "prepend":
    library.normalizer = parts.normalizers.Sequence(
      [
        parts.normalizers.Prepend("▁"),
        parts.normalizers.Replace(" ", "▁"),
      ]
    )
    library.decoder = parts.decoders.Sequence(
      [
        parts.decoders.Replace("▁", " "),
        parts.decoders.ByteFallback(),
        parts.decoders.Fuse(),
        parts.decoders.Strip(" ", 1, 0),
      ]
    )
  else:
    library.pre_tokenizer = parts.pre_tokenizers.Metaspace(
      prepend_scheme=scheme
    )
    library.decoder = parts.decoders.Metaspace(prepend_scheme=scheme)
  library.train_from_iterator(_PROSE.split("\n"), trainer)
  library.save(str(tmp_path / "tokenizer.json"))
  tok = text_lib.load_tokenizer(tmp_path)
  for text in (
    "name jax",
    "<s>name<s> jax  <l>  name <r>  jax<r>",
    " <l> <l><r> <s>  a",
    "<r>   ",
    "a<s>",
  ):
    ids = library.encode(text, add_special_tokens=False).ids
    assert tok.encode_with_special(text) == ids
    assert tok.decode(ids) == library.decode(ids)
    assert set(tok.encode(text)).isdisjoint({1, 2, 3})
  tok.save(tmp_path / "saved")
  again = text_lib.load_tokenizer(tmp_path / "saved")
  assert again.encode_with_special("a <l> b") == library.encode("a <l> b").ids


def test_truncation_in_the_file_does_not_cut_texts():
  library = _trained()
  library.enable_truncation(4)
  tok = byte_bpe.from_spec(
    library.to_str().encode(), "tokenizer.json", pathlib.Path("/nowhere")
  )
  assert tok.decode(tok.encode(_PROSE)) == _PROSE


def test_folder_files_decide(tmp_path, assert_same):
  library = _trained(("<s>", "</s>", "<|im_end|>", "<pad>"))
  library.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "bos_token": {"content": "</s>"},
        "eos_token": "<s>",
        "add_bos_token": True,
        "chat_template": "old",
      }
    )
  )
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
  (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
  (tmp_path / "chat_template.jinja").write_text("new")
  tok = text_lib.load_tokenizer(tmp_path)
  assert (tok.bos_id, tok.eos_id, tok.add_bos) == (1, 0, True)
  assert tok.stop_ids == (0, 1, 2, 3)
  assert tok.chat_template == "new"
  tok.save(tmp_path)
  again = text_lib.load_tokenizer(tmp_path)
  assert_same(tok, again, _TEXTS)
  for id in range(tok.vocab_size):
    assert tok.decode([id], False) == again.decode([id], False)


def test_refusals(tmp_path, smol):
  with pytest.raises(errors.UserError, match="surrogate"):
    smol.encode("a\ud800")
  with pytest.raises(errors.UserError, match="string"):
    smol.encode(b"bytes")
  with pytest.raises(errors.UserError, match="list"):
    smol.encode_batch("one")
  with pytest.raises(errors.UserError, match="jais-2"):
    text_lib.from_gguf_metadata(
      _fields(_trained(), **{"tokenizer.ggml.pre": "jais-2"})
    )
  with pytest.raises(errors.UserError, match="t5"):
    text_lib.from_gguf_metadata({"tokenizer.ggml.model": "t5"})
  with pytest.raises(errors.BadFileError, match="eos_token_id=9999"):
    text_lib.from_gguf_metadata(
      _fields(_trained(), **{"tokenizer.ggml.eos_token_id": 9999})
    )
  with pytest.raises(errors.BadFileError, match="wrong type"):
    text_lib.from_gguf_metadata(
      _fields(_trained(), **{"tokenizer.ggml.merges": [1, 2]})
    )
  assert text_lib.find_tokenizer(tmp_path) is None
  with pytest.raises(errors.BadFileError, match="holds no tokenizer"):
    text_lib.load_tokenizer(tmp_path)
  with pytest.raises(errors.BadFileError, match="cannot read"):
    text_lib.load_tokenizer(tmp_path / "absent.gguf")
  path = tmp_path / "tokenizer.json"
  for content in (
    b"",
    b"{",
    b"{}",
    b'{"model": {"vocab": {"a": "b"}}}',
    b"\x89PNG",
    b"GGUF",
    b"GGUF\x03\0\0\0" + b"\xff" * 16,
    b"IQ== 0\nIg== 1\n",
  ):
    path.write_bytes(content)
    with pytest.raises(errors.BadFileError, match=r"tokenizer\.json"):
      text_lib.find_tokenizer(tmp_path)


@pytest.mark.parametrize(
  "name, content",
  [
    ("tokenizer_config.json", "{"),
    ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"a": {}}}'),
    ("tokenizer_config.json", '{"chat_template": [1]}'),
    ("added_tokens.json", '{"a": "b"}'),
    ("generation_config.json", "\x00"),
  ],
)
def test_damaged_files_beside_are_named(tmp_path, name, content):
  _trained().save(str(tmp_path / "tokenizer.json"))
  (tmp_path / name).write_text(content)
  with pytest.raises(errors.BadFileError, match=r"_(config|tokens)\.json"):
    text_lib.load_tokenizer(tmp_path)


def test_gguf_header_cut_anywhere_is_refused(tmp_path):
  def string(text):
    return struct.pack("<Q", len(text)) + text.encode()

  whole = b"GGUF" + struct.pack("<IQQ", 3, 0, 3)
  whole += string("a") + struct.pack("<If", 6, 0.5)
  whole += (
    string("b") + struct.pack("<IIQ", 9, 8, 2) + string("x") + string("é")
  )
  whole += string("c") + struct.pack("<IIQ3?", 9, 7, 3, True, False, True)
  path = tmp_path / "x.gguf"
  # "é" is two bytes and says so nowhere else: mend the count written above.
  whole = whole.replace(
    struct.pack("<Q", 1) + "é".encode(), struct.pack("<Q", 2) + "é".encode()
  )
  path.write_bytes(whole)
  assert gguf_header.read(path).metadata == {
    "a": 0.5,
    "b": ["x", "é"],
    "c": [True, False, True],
  }
  for size in range(len(whole)):
    path.write_bytes(whole[:size])
    with pytest.raises(errors.BadFileError):
      gguf_header.read(path)


def test_gguf_metadata_of_smollm2_is_the_files_own(smol, smollm2):
  own = gguf_header.read(smollm2).metadata
  made = smol.gguf_metadata()
  for key in own:
    if key.startswith("tokenizer."):
      assert made[key] == own[key], key


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "smaug-bpe"])
def test_gguf_metadata_is_the_same_tokenizer(pre, assert_same):
  fields = _fields(
    _trained(),
    **{
      "tokenizer.ggml.pre": pre,
      "tokenizer.ggml.eot_token_id": 7,
      "tokenizer.ggml.add_bos_token": pre == "gpt-2",
      "tokenizer.chat_template": "{{ messages }}\n",
    },
  )
  tok = text_lib.from_gguf_metadata(fields)
  made = tok.gguf_metadata()
  assert_same(tok, text_lib.from_gguf_metadata(made), _TEXTS)
  assert {key: made[key] for key in fields} == fields


def test_gguf_metadata_of_added_tokens_holes_and_many_stops(
  tmp_path, assert_same
):
  library = _trained(("<s>", "</s>", "<a>", "<b>", "<c>"))
  library.add_tokens(["<tool>"])
  spec = json.loads(library.to_str())
  # Two ids that nothing has.
  spec["added_tokens"][-1]["id"] += 2
  (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
  (tmp_path / "generation_config.json").write_text(
    '{"eos_token_id": [1, 2, 3, 4]}'
  )
  tok = text_lib.load_tokenizer(tmp_path)
  fields = tok.gguf_metadata()
  assert len(fields["tokenizer.ggml.tokens"]) == tok.vocab_size == 503
  assert fields["tokenizer.ggml.token_type"][500:] == [5, 5, 4]
  again = text_lib.from_gguf_metadata(fields)
  assert again.stop_ids == (1, 2, 3, 4)
  assert_same(tok, again, [*_TEXTS, "a<tool>b [PAD500]"])
  # As a writer pads the tokens to the rows of the embedding.
  fields["tokenizer.ggml.tokens"] += ["[PAD503]", "[PAD504]"]
  fields["tokenizer.ggml.token_type"] += [5, 5]
  assert_same(tok, text_lib.from_gguf_metadata(fields), ["[PAD503]"])


def test_gguf_metadata_refuses_what_llama_cpp_cannot_do(tmp_path):
  library = _trained()
  model = json.loads(library.to_str())["model"]
  for change, match in (
    ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ({"normalizer": {"type": "NFC"}}, "normalizer"),
    ({"pre_tokenizer": None}, "None"),
    ({"model": {**model, "byte_fallback": True}}, r"tokenizer\.model"),
  ):
    spec = {**json.loads(library.to_str()), **change}
    tok = byte_bpe.from_spec(
      json.dumps(spec).encode(), "tokenizer.json", pathlib.Path("/nowhere")
    )
    with pytest.raises(errors.UserError, match=match):
      tok.gguf_metadata()
    assert tok.model_file() is None


def test_ten_thousand_messages_never_yield_a_special_id(smol):
  names = list(smol.special_tokens)
  pick = random.Random(0)
  bits = (*names, "<|", "|>", "im_end", " ", "\n", "user", "a", "<", "\0")
  messages = [
    "".join(pick.choice(bits) for _ in range(pick.randrange(1, 8)))
    for _ in range(10_000)
  ]
  ids = smol.encode_batch(messages)
  assert {i for found in ids for i in found}.isdisjoint(
    smol.special_tokens.values()
  )
  assert [smol.decode(found) for found in ids] == messages


@pytest.mark.parametrize("unit", ["x", " ", "é", "👩‍👩‍👧‍👦", "\r\n", "!a1"])
def test_100_kb_without_a_break_equals_the_library(smol, tmp_path, unit):
  smol.save(tmp_path)
  library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  text = unit * (100_000 // len(unit.encode()))
  ids = smol.encode(text)
  assert ids == library.encode(text, add_special_tokens=False).ids
  assert smol.decode(ids) == text


def test_what_the_library_cannot_encode_is_our_error():
  # A word that the vocabulary lacks, and no token for the unknown.
  spec = {
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "decoder": {"type": "Fuse"},
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"},
  }
  tok = byte_bpe.from_spec(
    json.dumps(spec).encode(), "tokenizer.json", pathlib.Path("/nowhere")
  )
  assert tok.encode("a a") == [0, 0]
  with pytest.raises(errors.UserError, match="fails at a text"):
    tok.encode("b")
