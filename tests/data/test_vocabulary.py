"""A tokenizer trained on domains of text: what is read, left out, counted."""

import gzip
import json

import pytest

from llama_jax import errors
from llama_jax import text as text_lib
from llama_jax.data import vocabulary


@pytest.fixture
def corpus(tmp_path, python_source):
  """Two domains: JSONL rows, and a folder of text with a binary in it."""
  lines = [x for text in python_source for x in text.split("\n") if x]
  rows = "".join(json.dumps({"text": line}) + "\n" for line in lines)
  (tmp_path / "code.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
  words = tmp_path / "words"
  words.mkdir()
  for i in range(12):
    (words / f"{i:02}.txt").write_text(f"document {i}: é 你 12345\n" * 9)
  (words / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
  return tmp_path, lines


def _text(folder):
  return f"{folder / 'code.jsonl.gz'},{folder / 'words'}"


def test_it_trains_and_reports(corpus, capsys):
  folder, lines = corpus
  out = folder / "new" / "out.model"
  vocabulary.train(out, _text(folder), 500, 10**9, 0)
  assert [p.name for p in out.parent.iterdir()] == ["out.model"]
  tok = text_lib.load_tokenizer(out)
  assert tok.vocab_size == 500 and (tok.bos_id, tok.eos_id) == (1, 2)
  for text in ("def f(x):\n\treturn 2**10  # é 🦙\r\n", " a  b "):
    assert tok.decode(tok.encode(text)) == text
  # The report, counted again by hand.
  _, head, code, words, _ = capsys.readouterr().out.splitlines()
  assert head.split()[:2] == ["domain", "documents"]
  heldout = lines[9::100]
  tokens = sum(map(len, tok.encode_batch(heldout)))
  sizes = [sum(len(x.encode()) for x in some) for some in (lines, heldout)]
  assert code.replace(",", "").split()[1:] == [
    *(str(len(lines)), str(sizes[0]), str(sizes[1])),
    f"{sizes[1] / tokens:.3f}",
  ]
  assert words.split()[1] == "12"


def test_held_out_documents_are_not_trained_on(corpus):
  folder, lines = corpus
  seen = list(vocabulary.sample(str(folder / "code.jsonl.gz"), 1.0, 0))
  assert seen == [x for i, x in enumerate(lines) if i % 100 != 9]


def test_a_sample_is_a_share_of_the_lines(corpus):
  folder, _ = corpus
  text = str(folder / "code.jsonl.gz")
  whole = list(vocabulary.sample(text, 1.0, 0))
  some = list(vocabulary.sample(text, 0.3, 0))
  assert 0.2 < len(some) / len(whole) < 0.4
  assert set(some) <= set(whole)
  assert some == list(vocabulary.sample(text, 0.3, 0))
  assert some != list(vocabulary.sample(text, 0.3, 1))


def test_domains_are_what_was_named(corpus):
  folder, lines = corpus
  two = vocabulary.count(_text(folder))
  assert list(two) == _text(folder).split(",")
  one = vocabulary.count(str(folder))
  assert [d.documents for d in one.values()] == [len(lines), 12]
  assert list(one) == ["code.jsonl.gz", "words"]
  assert list(vocabulary.count(str(folder / "words"))) == ["words"]


def test_a_text_of_nothing_is_refused(tmp_path):
  (tmp_path / "empty.txt").write_text("")
  with pytest.raises(errors.BadFileError, match="holds no text"):
    vocabulary.count(str(tmp_path / "empty.txt"))
