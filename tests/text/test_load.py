"""One door for every form of a tokenizer, told apart by what a file holds."""

import json
import pathlib
import shutil

import pytest

from llama_jax import errors
from llama_jax import text as text_lib
from llama_jax.text import byte_bpe, llama2c, sentencepiece_bpe, tiktoken_bpe

_DATA = pathlib.Path(__file__).parents[3] / "shared/data/tokenizers"
_TEXTS = ["Hello world", "\ttabs\r\n 12 é 你好 👩‍👩‍👧‍👦", "once upon a time"]


def _data(name):
  if not (_DATA / name).exists():
    pytest.skip(f"needs {_DATA / name}")
  return _DATA / name


@pytest.mark.parametrize(
  "name, family, size",
  [
    ("llama2_tokenizer.model", sentencepiece_bpe.SentencePieceBpe, 32000),
    ("llama3_tokenizer.tiktoken", tiktoken_bpe.TiktokenBpe, 128256),
    ("tok512.model", sentencepiece_bpe.SentencePieceBpe, 512),
    ("tok512.bin", sentencepiece_bpe.SentencePieceBpe, 512),
  ],
)
def test_a_file_is_told_by_its_content(tmp_path, name, family, size):
  path = tmp_path / "weights.pth"
  shutil.copy(_data(name), path)
  found = text_lib.load_tokenizer(path)
  assert type(found) is family
  assert found.vocab_size == size
  assert found.decode(found.encode(_TEXTS[0])) == _TEXTS[0]


def test_gguf_under_any_name(tmp_path, smollm2):
  path = tmp_path / "tokenizer.json"
  path.symlink_to(smollm2)
  assert type(text_lib.load_tokenizer(path)) is byte_bpe.ByteBpe


@pytest.mark.parametrize(
  "name", ["llama2_tokenizer.model", "llama3_tokenizer.tiktoken"]
)
def test_a_folder_of_metas(tmp_path, name, assert_same):
  # params.json and the weights beside it say nothing of the tokenizer.
  (tmp_path / "params.json").write_text('{"dim": 64, "vocab_size": -1}')
  (tmp_path / "consolidated.00.pth").write_bytes(b"PK")
  assert text_lib.find_tokenizer(tmp_path) is None
  shutil.copy(_data(name), tmp_path / "tokenizer.model")
  alone = text_lib.load_tokenizer(_data(name))
  assert_same(alone, text_lib.load_tokenizer(tmp_path), _TEXTS)


def test_llama2c_is_the_model_it_was_made_of(tmp_path):
  model = text_lib.load_tokenizer(_data("tok512.model"))
  found = text_lib.load_tokenizer(_data("tok512.bin"))
  # The model removes extra spaces, of which the file does not speak.
  single = [" ".join(text.split()) for text in _TEXTS]
  assert found.encode_batch(single) == model.encode_batch(single)
  assert found.special_tokens == model.special_tokens
  assert (found.bos_id, found.stop_ids) == (model.bos_id, model.stop_ids)
  fields = model.gguf_metadata()
  for key in ("tokens", "scores", "token_type"):
    key = f"tokenizer.ggml.{key}"
    assert found.gguf_metadata()[key] == fields[key], key
  content = _data("tok512.bin").read_bytes()
  for size in (0, 3, 4, 100, len(content) - 1):
    assert not llama2c.is_vocabulary(content[:size])
  found.save(tmp_path)
  assert text_lib.load_tokenizer(tmp_path).encode("a b") == found.encode("a b")


def test_what_is_no_tokenizer_is_refused(tmp_path):
  path = tmp_path / "tokenizer.model"
  for content in (b"", b"PK\3\4", b"\x89PNG", b"hello world 3\n", b"\0" * 100):
    path.write_bytes(content)
    with pytest.raises(errors.BadFileError, match=r"tokenizer\.model"):
      text_lib.load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.model").unlink()
  with pytest.raises(errors.BadFileError, match="holds no tokenizer"):
    text_lib.load_tokenizer(tmp_path)


def test_a_document_beside_what_is_no_model_is_read(tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(b"a git-lfs pointer")
  spec = {
    "added_tokens": [],
    "decoder": {"type": "Fuse"},
    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
  }
  (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
  assert text_lib.load_tokenizer(tmp_path).encode("a") == [0]
