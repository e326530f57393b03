"""Documents out of files, exactly, and errors that name file and line."""

import gzip
import json

import pytest

from llama_jax import errors
from llama_jax.data import sources

# Every mark at which str.splitlines cuts and JSONL does not.
ODD = "one\u2028two\u2029three\x85four\x0bfive\x1csix\rseven"


def jsonl(*texts):
  rows = [json.dumps({"text": t, "n": 1}, ensure_ascii=False) for t in texts]
  return "".join(row + "\n" for row in rows).encode()


def test_jsonl_rows_are_documents(tmp_path):
  file = tmp_path / "a.jsonl"
  file.write_bytes(jsonl("first", ODD, "last") + b"\n  \n")
  assert sources.documents(str(file)) == ["first", ODD, "last"]


def test_gzip_and_text_and_no_last_newline(tmp_path):
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl("x", "y")[:-1]))
  (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"gz\ntext\n"))
  (tmp_path / "c.txt").write_bytes("line\r\nwith é\n".encode())
  for name, want in (
    ("a.jsonl.gz", ["x", "y"]),
    ("b.txt.gz", ["gz\ntext\n"]),
    ("c.txt", ["line\r\nwith é\n"]),
  ):
    assert sources.documents(str(tmp_path / name)) == want


def test_a_folder_is_its_files_by_name(tmp_path):
  (tmp_path / "sub").mkdir()
  (tmp_path / "z.txt").write_text("z")
  (tmp_path / "a.jsonl").write_bytes(jsonl("a1", "a2"))
  (tmp_path / "sub" / "m.py").write_text("m")
  (tmp_path / ".hidden").write_text("no")
  (tmp_path / ".git").mkdir()
  (tmp_path / ".git" / "config").write_text("no")
  assert sources.documents(str(tmp_path)) == ["a1", "a2", "m", "z"]


def test_several_paths(tmp_path):
  first, second = tmp_path / "1.txt", tmp_path / "2.txt"
  first.write_text("one")
  second.write_text("two")
  assert sources.documents(f"{second},{first}") == ["two", "one"]
  assert sources.documents([str(first), str(second)]) == ["one", "two"]
  assert sources.documents((str(first),)) == ["one"]
  comma = tmp_path / "a,b.txt"
  comma.write_text("comma")
  assert sources.documents(str(comma)) == ["comma"]


@pytest.mark.parametrize(
  "line",
  [
    b'{"text": "cut',
    b"[1, 2]",
    b'{"txet": "x"}',
    b'{"text": 3}',
    b'{"text": "\xff"}',
    b"[" * 100_000,
  ],
)
def test_a_bad_row_is_named(tmp_path, line):
  file = tmp_path / "a.jsonl"
  file.write_bytes(jsonl("good", "good") + line + b"\n" + jsonl("good"))
  with pytest.raises(errors.BadFileError) as caught:
    sources.documents(str(file))
  assert f"{file}, line 3" in str(caught.value)
  assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_damaged_gzip(tmp_path, name):
  whole = gzip.compress(jsonl(*(str(n) * 50 for n in range(200))))
  file = tmp_path / name
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 0xFF
  for damaged in (whole[: len(whole) // 2], whole[:-4], bytes(flipped), b"no"):
    file.write_bytes(damaged)
    with pytest.raises(errors.BadFileError, match="a\\."):
      sources.documents(str(file))


def test_binary_files_in_a_folder_are_passed_over(tmp_path):
  (tmp_path / "a.txt").write_text("text")
  (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\xff\xfe\x00")
  assert sources.documents(str(tmp_path)) == ["text"]
  # But a JSONL that is damaged is not passed over.
  (tmp_path / "c.jsonl").write_bytes(jsonl("x") + b'{"text": "\xff"}\n')
  with pytest.raises(errors.BadFileError, match=r"c\.jsonl, line 2"):
    sources.documents(str(tmp_path))


def test_a_named_binary_is_refused(tmp_path):
  text, binary = tmp_path / "a.txt", tmp_path / "b.bin"
  text.write_text("text")
  binary.write_bytes(b"abc\xff")
  with pytest.raises(errors.BadFileError, match=r"b\.bin: byte 3"):
    sources.documents(str(binary))
  with pytest.raises(errors.BadFileError, match=r"b\.bin: byte 3"):
    sources.documents([str(text), str(binary)])


def test_a_named_binary_is_refused_between_commas(tmp_path):
  text, binary = tmp_path / "a.txt", tmp_path / "b.bin"
  text.write_text("text")
  binary.write_bytes(b"abc\xff")
  with pytest.raises(errors.BadFileError, match=r"b\.bin: byte 3"):
    sources.documents(f"{text},{binary}")


def test_nothing_there(tmp_path):
  with pytest.raises(
    errors.BadFileError, match=r"--text=.*nope does not exist"
  ):
    sources.documents(str(tmp_path / "nope"), knob="--text")
  with pytest.raises(errors.BadFileError, match="is an empty folder"):
    sources.documents(str(tmp_path))
  (tmp_path / "empty.txt").write_text("")
  with pytest.raises(errors.BadFileError, match="holds no text"):
    sources.documents(str(tmp_path))
