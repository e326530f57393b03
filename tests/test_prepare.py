"""The verb as a process: what it writes, prints, shows and refuses."""

import gzip
import json

import pytest

from llama_jax import text as text_lib
from llama_jax.data import prepared


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


def _prepare(out, *flags, config="folder"):
  return [
    "llama_jax.prepare",
    f"--config=configs/data/{config}.py",
    f"--out={out}",
    "--config.workers=1",
    *flags,
  ]


def test_a_folder_is_prepared_and_shown(
  run_verbs, corpus, tmp_path, tokenizer_folder
):
  folder, lines = corpus
  out = tmp_path / "new" / "out"
  command = _prepare(
    out,
    f"--config.tokenizer={tokenizer_folder}",
    f"--config.sources.text.paths={_text(folder)}",
    "--config.row_length=64",
    "--config.heldout=0.2",
  )
  show = ["llama_jax.prepare", f"--show={out}", "--rows=2"]
  (code, said, err), second, shown, again, other = run_verbs(
    command, command, show, show, [*show, "--seed=1"]
  )
  assert code == 0, err
  data = prepared.read(out)
  counted = data.report["sources"]["text"]
  head, train, heldout, passed, last = said.splitlines()
  assert head.split()[:2] == ["source", "documents"]
  cells = train.replace(",", "").split()
  own = counted["train"]
  assert cells[:5] == [
    "text",
    *(str(n) for n in (own["documents"], counted["duplicates"])),
    *("0", "0"),
  ]
  assert cells[6] == str(own["tokens"])
  assert cells[8] == str(len(data.sources["text"]))
  fill = own["used"] / (own["rows"] * 65)
  assert cells[9] == f"{fill:.2%}"
  assert heldout.split()[:2] == ["held", "out"]
  assert passed == "text: 1 files that are no text"
  assert last == f"written to {out}"
  unique = {*lines, *(f"document {i}: é 你 12345\n" * 9 for i in range(12))}
  held = counted["heldout"]["documents"]
  assert own["documents"] + held == len(unique)
  assert second[0] == 0 and "was there already" in second[1]

  code, said, err = shown
  assert code == 0, err
  assert shown == again and said != other[1]
  assert said.count("=== text: row ") == 2 and "\x1b" not in said
  assert said.count("=== text, held out: row ") == 2
  tokenizer = text_lib.load_tokenizer(tokenizer_folder)
  titles = [x for x in said.splitlines() if x.startswith("=== text: row")]
  row = data.sources["text"][int(titles[0].split()[3])]
  assert f"{len(row['documents'])} document" in titles[0]
  for number, document in enumerate(row["documents"], start=1):
    where = row["segments"] == number
    assert f"--- document {document}, {where.sum()} tokens" in said
    ids = [i for i in row["tokens"][where].tolist()[1:] if i > 1]
    assert tokenizer.decode(ids).rstrip("\n") in said
  assert "[</s>]" in said
  assert not [p for p in out.parent.iterdir() if p.name != "out"]


def test_four_domains_by_the_name_of_a_folder(
  run_verbs, tmp_path, tokenizer_folder, python_source
):
  for number, domain in enumerate(("general", "maths", "code", "multilingual")):
    (tmp_path / domain).mkdir()
    for i, one in enumerate(python_source):
      (tmp_path / domain / f"{i}.txt").write_text(f"{number}\n{one}")
  command = _prepare(tmp_path / "out", f"--config.tokenizer={tokenizer_folder}")
  command[1] = f"--config=configs/data/pretrain.py:llama3:{tmp_path}"
  [(code, _, err)] = run_verbs(command)
  assert code == 0, err
  data = prepared.read(tmp_path / "out")
  assert set(data.sources) == {"general", "maths", "code", "multilingual"}
  assert data.row_length == 8192


def test_preparing_refuses(run_verbs, corpus, tmp_path, tokenizer_folder):
  folder, _ = corpus
  words = f"--config.tokenizer={tokenizer_folder}"
  text = f"--config.sources.text.paths={_text(folder)}"
  out = tmp_path / "out"
  taken = tmp_path / "taken"
  taken.mkdir()
  (taken / "mine").write_text("mine")
  bad = tmp_path / "bad.jsonl"
  bad.write_text('{"text": "x"}\n{"txet": "y"}\n')
  broken = f"--config.sources.text.paths={bad}"
  cases = {
    "the nearest is --config.row_length": _prepare(
      out, words, text, "--config.row_lenght=9"
    ),
    "config.row_length=1 must be 2": _prepare(
      out, words, text, "--config.row_length=1"
    ),
    "config.tokenizer='' must be": _prepare(out, text),
    "config.sources.text.paths is empty": _prepare(out, words),
    "paths=/no/where does not exist": _prepare(
      out, words, "--config.sources.text.paths=/no/where"
    ),
    "has no tokens for infilling": _prepare(
      out, words, text, "--config.infill_rate=0.5"
    ),
    f"{bad}, line 2: needs an object": _prepare(out, words, broken),
    "not an empty folder": _prepare(taken, words, text),
    "--out needs --config": ["llama_jax.prepare", f"--out={out}"],
    "is no prepared folder": ["llama_jax.prepare", f"--show={taken}"],
    "give one of": ["llama_jax.prepare"],
  }
  for said, result in zip(cases, run_verbs(*cases.values()), strict=True):
    code, _, err = result
    assert code == 2 and err.startswith("error: ") and said in err, err
    assert err.count("\n") == 1
  assert [p.name for p in taken.iterdir()] == ["mine"] and not out.exists()


def test_training_a_tokenizer_refuses(run_verbs, corpus):
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
    "give one of --out=DIR": ["llama_jax.prepare", text],
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
