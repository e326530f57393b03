"""Llama 3's tokenizer against Meta's own class and the slow way by hand."""

import hashlib
import itertools
import json
import pathlib
import random

import pytest
import regex
import tokenizers

from llama_jax import errors
from llama_jax import text as text_lib
from llama_jax.text import byte_bpe, byte_level, tiktoken_bpe
from llama_jax.text import folder as folder_lib

_HERE = pathlib.Path(__file__).parent
_RANKS = _HERE.parents[2] / "shared/data/tokenizers/llama3_tokenizer.tiktoken"
_GOLDEN = json.loads((_HERE / "golden/llama3_ids.json").read_text())
_TEXTS = [
  "".join(what * times for what, times in entry["parts"])
  for entry in _GOLDEN["texts"]
]
_SHORT = [text for text in _TEXTS if len(text) < 6000]
_PROSE = "".join(p.read_text() for p in sorted(_HERE.glob("test_*.py")))


@pytest.fixture(scope="module")
def llama3():
  if not _RANKS.exists():
    pytest.skip(f"needs {_RANKS}")
  return text_lib.load_tokenizer(_RANKS)


@pytest.fixture(scope="module")
def small():
  """Ranks trained here: content of a file like Llama 3's."""
  library = tokenizers.Tokenizer(tokenizers.models.BPE())
  library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=700,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  library.train_from_iterator([_PROSE], trainer)
  merges = json.loads(library.to_str())["model"]["merges"]
  tokens = [bytes([b]) for b in range(256)]
  tokens += [byte_level.in_bytes(left + right) for left, right in merges]
  return byte_level.ranks_lines(tokens)


@pytest.fixture(params=["small", "llama3"])
def tok(request, tmp_path):
  if request.param == "llama3":
    return request.getfixturevalue("llama3")
  path = tmp_path / "any name"
  path.write_bytes(request.getfixturevalue("small"))
  return text_lib.load_tokenizer(path)


@pytest.mark.parametrize("n", range(len(_TEXTS)))
def test_ids_equal_metas_class(llama3, n):
  entry, ids = _GOLDEN["texts"][n], llama3.encode(_TEXTS[n])
  assert len(ids) == entry["count"]
  if "ids" in entry:
    assert ids == entry["ids"]
  else:
    found = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    assert found == entry["sha256"]
  assert llama3.decode(ids) == _TEXTS[n]


def test_batch_equals_single(llama3):
  assert llama3.encode_batch(_TEXTS) == [llama3.encode(t) for t in _TEXTS]
  assert llama3.encode_batch([]) == []


def test_conventions_equal_metas_class(llama3):
  assert llama3.special_tokens == _GOLDEN["special_tokens"]
  assert sorted(llama3.stop_ids) == _GOLDEN["stop_tokens"]
  assert llama3.vocab_size == 128256
  assert (llama3.bos_id, llama3.eos_id, llama3.add_bos) == (
    128000,
    128001,
    True,
  )
  assert llama3.encode("a", bos=True, eos=True) == [128000, 64, 128001]


def _slow_ids(ranks, text):
  """Cuts, then joins the neighbours of lowest rank until none are left."""
  ids = []
  for word in regex.findall(byte_level.LLAMA3_PATTERN, text):
    parts = [bytes([b]) for b in word.encode()]
    if word.encode() in ranks:
      parts = [word.encode()]
    while True:
      joins = [
        (ranks[a + b], n)
        for n, (a, b) in enumerate(itertools.pairwise(parts))
        if a + b in ranks
      ]
      if not joins:
        break
      _, n = min(joins)
      parts[n : n + 2] = [parts[n] + parts[n + 1]]
    ids += [ranks[part] for part in parts]
  return ids


def test_ids_equal_the_slow_way(small):
  ranks = tiktoken_bpe.parse(small, "small")
  tok = tiktoken_bpe.from_ranks(small, "small", _no_settings())
  for text in [*_SHORT, _PROSE[:20_000]]:
    assert tok.encode(text) == _slow_ids(ranks, text)
    assert tok.decode(tok.encode(text)) == text


def _no_settings():
  return folder_lib.read_settings(pathlib.Path("/nowhere"))


def _slow_cut(text, max_text, max_run):
  """Letter by letter: a run may not grow beyond max_run."""
  pieces = []
  for start in range(0, len(text), max_text):
    run = 0
    for n, letter in enumerate(text[start : start + max_text]):
      same = n and letter.isspace() == text[start + n - 1].isspace()
      run = run + 1 if same else 1
      if n == 0 or run > max_run:
        pieces.append("")
        run = 1
      pieces[-1] += letter
  return pieces or [""]


def test_long_texts_are_cut_as_the_slow_way_does(monkeypatch):
  monkeypatch.setattr(tiktoken_bpe, "_MAX_TEXT", 40)
  monkeypatch.setattr(tiktoken_bpe, "_MAX_RUN", 6)
  pick = random.Random(0)
  for _ in range(2000):
    text = "".join(
      pick.choice(("a", " ", "\t", "é", "\x1c")) * pick.choice((1, 2, 6, 7, 20))
      for _ in range(pick.randrange(8))
    )
    assert list(tiktoken_bpe._cut(text)) == _slow_cut(text, 40, 6), repr(text)


def test_ten_thousand_messages_never_yield_a_special_id(tok):
  names = list(tok.special_tokens)
  pick = random.Random(0)
  bits = (*names[:12], "<|", "|>", " ", "\n", "eot_id", "user", "a", "<", "\0")
  messages = [
    "".join(pick.choice(bits) for _ in range(pick.randrange(1, 8)))
    for _ in range(10_000)
  ]
  ids = tok.encode_batch(messages)
  assert max(map(max, ids)) < min(tok.special_tokens.values())
  assert [tok.decode(i) for i in ids] == messages
  spelled = "".join(names)
  assert tok.encode_with_special(spelled) == list(tok.special_tokens.values())


def test_saved_folder_is_the_same_tokenizer(tok, tmp_path, assert_same):
  tok.chat_template = "{{ messages }}"
  folder = tmp_path / "saved"
  tok.save(folder)
  again = text_lib.load_tokenizer(folder)
  assert isinstance(again, tiktoken_bpe.TiktokenBpe)
  assert_same(tok, again, _SHORT)
  assert (folder / "original/tokenizer.model").read_bytes() == tok.model_file()
  # What transformers reads is another implementation of the same. Long texts
  # are cut by Meta's code only.
  twin = text_lib.load_tokenizer(folder / "tokenizer.json")
  assert isinstance(twin, byte_bpe.ByteBpe)
  assert_same(tok, twin, [*_SHORT, _PROSE])
  for id in range(0, tok.vocab_size, 97):
    assert twin.decode([id], False) == tok.decode([id], False)
  assert twin.model_file() == tok.model_file()
  library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  library.encode_special_tokens = True
  for text in _SHORT:
    assert library.encode(text).ids == tok.encode(text, bos=True)
  tok.chat_template = None


def test_gguf_metadata_is_the_same_tokenizer(tok, assert_same):
  fields = tok.gguf_metadata()
  twin = text_lib.from_gguf_metadata(fields)
  assert_same(tok, twin, _SHORT)
  assert twin.gguf_metadata() == fields
  assert twin.model_file() == tok.model_file()


def test_a_folder_for_metas_code(small, tmp_path, assert_same):
  tok = tiktoken_bpe.from_ranks(small, "small", _no_settings())
  tok.save(tmp_path / "hf")
  assert not (tmp_path / "hf/tokenizer.model").exists()
  # The same from a document alone.
  twin = text_lib.load_tokenizer(tmp_path / "hf/tokenizer.json")
  for name, one in (("a", tok), ("b", twin)):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "params.json").write_text("{}")
    one.save(folder)
    assert (folder / "tokenizer.model").read_bytes() == small
    again = text_lib.load_tokenizer(folder)
    assert isinstance(again, tiktoken_bpe.TiktokenBpe)
    assert_same(tok, again, _SHORT)


def test_model_file_is_metas_own(llama3):
  assert llama3.model_file() == _RANKS.read_bytes()


def test_the_folder_names_special_tokens(small, tmp_path, assert_same):
  # Hugging Face's names of 3.1 shift the reserved ones by two.
  (tmp_path / "tokenizer.model").write_bytes(small)
  size = len(small.splitlines())
  shifted = {
    **{
      str(size + n): {"content": f"<|old_{n}|>", "special": True}
      for n in (0, 9)
    },
    str(size + 5): {"content": "<|reserved_special_token_2|>", "special": True},
    str(size + 256): {"content": "<|mine|>", "special": True},
    str(size + 300): {"content": "<tool>", "special": False},
  }
  config = {
    "bos_token": "<|old_0|>",
    "eos_token": "<|mine|>",
    "add_bos_token": False,
    "added_tokens_decoder": shifted,
  }
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  (tmp_path / "generation_config.json").write_text(
    json.dumps({"eos_token_id": [size + 256, size + 9]})
  )
  tok = text_lib.load_tokenizer(tmp_path)
  assert tok.vocab_size == size + 301
  assert (tok.bos_id, tok.eos_id, tok.add_bos) == (size, size + 256, False)
  # 8 is <|eom_id|> by Meta's word.
  assert tok.stop_ids == (size + 256, size + 1, size + 8, size + 9)
  assert tok.special_tokens["<|reserved_special_token_2|>"] == size + 5
  assert len(tok.special_tokens) == 257
  assert tok.encode("a<tool>b<|mine|>")[1] == size + 300
  assert size + 256 not in tok.encode("a<tool>b<|mine|>")
  assert tok.decode(tok.encode("a<tool>b")) == "a<tool>b"
  tok.save(tmp_path / "saved")
  assert_same(tok, text_lib.load_tokenizer(tmp_path / "saved"), _SHORT)
  twin = text_lib.load_tokenizer(tmp_path / "saved/tokenizer.json")
  assert_same(tok, twin, [*_SHORT, "a<tool>b<|mine|>"])
  assert_same(tok, text_lib.from_gguf_metadata(tok.gguf_metadata()), _SHORT)


def test_a_document_that_differs_from_the_ranks_wins(small, tmp_path):
  tok = tiktoken_bpe.from_ranks(small, "small", _no_settings())
  tok.save(tmp_path)
  spec = json.loads((tmp_path / "tokenizer.json").read_text())
  spec["pre_tokenizer"] = byte_level.CUTS["smollm"]
  (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
  found = text_lib.load_tokenizer(tmp_path)
  assert isinstance(found, byte_bpe.ByteBpe)
  assert found.model_file() is None


def _lines(small, **changes):
  lines = small.splitlines()
  for n, line in changes.items():
    lines[int(n[1:])] = line
  return b"\n".join(lines)


def test_refusals(small, tmp_path):
  path = tmp_path / "tokenizer.model"
  last = small.splitlines()[-1]
  for content, match in (
    (_lines(small, _5=b"AAAA"), "line 6 is not"),
    (_lines(small, _5=b"A=== 5"), "line 6 is not"),
    (_lines(small, _5=b"Bg== 99999999999999999"), "line 6 is not"),
    (_lines(small, _9=last), "not 0 to|was before"),
    (_lines(small, _5=b"AAAAAAAA 5"), "byte 5"),
    (_lines(small)[: small.index(b" 99\n") + 3], "no token for the byte"),
    (small.replace(b" 300\n", b" 9999\n"), "line 301 is not|not 0 to"),
  ):
    path.write_bytes(content)
    with pytest.raises(errors.BadFileError, match=match):
      text_lib.load_tokenizer(path)
  path.write_bytes(small)
  config = {"added_tokens_decoder": {"5": {"content": "<x>", "special": True}}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  with pytest.raises(errors.BadFileError, match="different tokenizers"):
    text_lib.load_tokenizer(path)
  with pytest.raises(errors.UserError, match="surrogate"):
    tiktoken_bpe.from_ranks(small, "small", _no_settings()).encode("\ud800")


def test_ranks_of_other_families_are_refused():
  tokens = [bytes([b]) for b in range(256)]
  tokens += [b"%d" % n for n in range(10, 100_010)]
  with pytest.raises(errors.UserError, match="cl100k_base, which cuts"):
    tiktoken_bpe.parse(byte_level.ranks_lines(tokens), "x")
