"""The verb that makes tokenizers: what it writes, reports and refuses."""

import gzip
import json

import pytest

from llama_jax import errors, prepare
from llama_jax import text as text_lib


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
  prepare.train_tokenizer(out, _text(folder), 500, 10**9, 0)
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
  seen = list(prepare.sample(str(folder / "code.jsonl.gz"), 1.0, 0))
  assert seen == [x for i, x in enumerate(lines) if i % 100 != 9]


def test_a_sample_is_a_share_of_the_lines(corpus):
  folder, _ = corpus
  text = str(folder / "code.jsonl.gz")
  whole = list(prepare.sample(text, 1.0, 0))
  some = list(prepare.sample(text, 0.3, 0))
  assert 0.2 < len(some) / len(whole) < 0.4
  assert set(some) <= set(whole)
  assert some == list(prepare.sample(text, 0.3, 0))
  assert some != list(prepare.sample(text, 0.3, 1))


def test_domains_are_what_was_named(corpus):
  folder, lines = corpus
  two = prepare.count(_text(folder))
  assert list(two) == _text(folder).split(",")
  one = prepare.count(str(folder))
  assert [d.documents for d in one.values()] == [len(lines), 12]
  assert list(one) == ["code.jsonl.gz", "words"]
  assert list(prepare.count(str(folder / "words"))) == ["words"]


def test_it_refuses(run_verbs, corpus):
  folder, _ = corpus
  taken = folder / "taken.model"
  taken.write_text("mine")
  bad = folder / "bad.jsonl"
  bad.write_text('{"text": "x"}\n{"text": "\\ud800"}\n')
  new = folder / "new.model"

  def verb(*flags, out=new):
    return ["llama_jax.prepare", f"--train_tokenizer={out}", *flags]

  text = f"--text={_text(folder)}"
  cases = {
    "taken.model exists": verb(text, out=taken),
    "/no/where does not exist": verb("--text=/no/where"),
    "half a surrogate pair": verb(f"--text={bad}"),
    "--text=PATHS": verb(),
    "--train_tokenizer=OUT.model": ["llama_jax.prepare", text],
    "vocab_size=90000": verb(text, "--vocab_size=90000"),
    "vocab_size": verb(text, "--vocab_size=5"),
  }
  for said, result in zip(cases, run_verbs(*cases.values()), strict=True):
    code, _, err = result
    assert code == 2 and err.startswith("error: ") and said in err, err
    assert err.count("\n") == 1
  assert taken.read_text() == "mine" and not new.exists()
  # No half-written file beside it either.
  assert not [p for p in folder.iterdir() if p.name.startswith("new.model")]


def test_a_text_of_nothing_is_refused(tmp_path):
  (tmp_path / "empty.txt").write_text("")
  with pytest.raises(errors.BadFileError, match="holds no text"):
    prepare.count(str(tmp_path / "empty.txt"))
