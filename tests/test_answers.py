"""A file of answers in its parts: cut, damaged, of another run, on a full disk.

That processes share it and go on after a kill: test_batch.py.
"""

import contextlib
import json
import resource

import pytest

from llama_jax import answers, errors

ROWS = 20


@pytest.fixture
def output(tmp_path):
  """settings -> the same file, as one more process has it."""

  def make(**settings):
    return answers.Output(tmp_path / "out.jsonl", ROWS, {"n": 1} | settings)

  return make


@pytest.fixture
def parts(output, tmp_path):
  output().begin()
  return tmp_path / "out.jsonl.parts"


def answered(row):
  return {"row": row, "text": "é" * row}


def fill(output):
  for block in output.blocks():
    for row in sorted(block.missing, reverse=True):
      block.add(row, answered(row))


def content(tmp_path):
  file = tmp_path / "out.jsonl"
  return [json.loads(line) for line in file.read_text().splitlines()]


def test_joined_in_order_once_all_are_there(output, parts, tmp_path):
  assert not output().join() and output().done() == 0
  fill(output())
  assert output().done() == ROWS
  assert output().join() and output().whole
  assert content(tmp_path) == [answered(row) for row in range(ROWS)]
  assert not parts.exists()
  assert output().join()


def test_a_whole_file_tells_how_it_was_made(output, parts, tmp_path):
  fill(output())
  assert output().join()
  file, note = (tmp_path / f"out.jsonl{end}" for end in ("", ".settings.json"))
  with pytest.raises(errors.UserError, match=r"other n, top_k .*settings"):
    output(n=2, top_k=4).whole  # noqa: B018
  file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
  with pytest.raises(errors.UserError, match=r"there with 19 rows.* these 20"):
    output().whole  # noqa: B018
  # Somebody's own file of as many rows.
  file.write_text("{}\n" * ROWS)
  note.unlink()
  with pytest.raises(errors.UserError, match="was not made of these 20"):
    output().whole  # noqa: B018
  # What is left of a file that is gone is in nobody's way.
  note.write_text('{"n": 7}')
  file.unlink()
  assert not output().whole


def test_parts_of_another_run_are_not_gone_on_with(output):
  output().check()
  output(ckpt="a").begin()
  output(ckpt="a").begin()
  with pytest.raises(errors.UserError, match="other n; give"):
    output(ckpt="a", n=2).check()
  with pytest.raises(errors.UserError, match="other ckpt; give"):
    output(ckpt="b").begin()
  assert not output().whole


def test_a_line_that_was_cut_is_done_again(tmp_path):
  path = tmp_path / "00000.jsonl"
  path.write_bytes(b'[0, {}]\n[2, {}]\n[1, {"comp')
  block = answers.Block(path, range(4))
  assert block.hold()
  assert block.missing == {1, 3}
  # Nobody else gets it meanwhile.
  assert not answers.Block(path, range(4)).hold()
  block.add(3, {})
  block.add(1, {})
  assert not answers.Block(path, range(4)).hold()
  rows = [json.loads(line)[0] for line in path.open()]
  assert rows == [0, 2, 3, 1]


@pytest.mark.parametrize(
  "line",
  ['[1, {"a', "[1]", "[1, 2]", "[9, {}]", "[0, {}]", "7", "\0", "[[], {}]"],
)
def test_a_damaged_line_is_named_and_the_others_stay(tmp_path, line):
  path = tmp_path / "00000.jsonl"
  before = f"[0, {{}}]\n{line}\n[2, {{}}]\n"
  path.write_text(before)
  block = answers.Block(path, range(4))
  with pytest.raises(errors.BadFileError, match=r"00000\.jsonl, line 2 is dam"):
    block.hold()
  assert path.read_text() == before
  # As it says: taken out.
  path.write_text("[0, {}]\n[2, {}]\n")
  block = answers.Block(path, range(4))
  assert block.hold() and block.missing == {1, 3}


def test_damage_after_the_last_answer(output, parts, tmp_path):
  fill(output())
  file = parts / "00001.jsonl"
  sound = file.read_text()
  file.write_text(sound.replace("[17,", "[16,"))
  with pytest.raises(errors.BadFileError, match=r"00001\.jsonl, line 4"):
    output().join()
  assert parts.exists() and not output().whole
  file.write_text(sound)
  assert output().join()
  assert content(tmp_path) == [answered(row) for row in range(ROWS)]


@contextlib.contextmanager
def full_disk(size):
  """No file of this process grows beyond so many bytes."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_what_is_there_stays(output, parts, tmp_path):
  block = next(output().blocks())
  block.add(5, answered(5))
  refused = pytest.raises(
    errors.UserError, match=r"00000\.jsonl cannot be written .*goes on"
  )
  with full_disk((parts / "00000.jsonl").stat().st_size + 9), refused:
    block.add(6, answered(6))
  block._file.close()  # As the end of the process does.
  again = next(output().blocks())
  assert again.missing == set(range(16)) - {5}
  again._file.close()
  fill(output())
  refused = pytest.raises(errors.UserError, match=r"out\.jsonl cannot be")
  with full_disk(9), refused:
    output().join()
  assert not output().whole
  assert output().join()
  assert content(tmp_path) == [answered(row) for row in range(ROWS)]
