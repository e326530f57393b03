"""What people see of rows: every token, its kind, and nothing that acts."""

import re

import pytest

from llama_jax import text
from llama_jax.data import display, packing, prepared

COLOURS = re.compile(r"\x1b\[\d+m")


@pytest.fixture
def data(tmp_path, tokenizer_folder):
  """One source of rows of 20 tokens: a document goes on, two share a row."""
  tokenizer = text.load_tokenizer(tokenizer_folder)
  texts = ["import json, os, sys  # " + "é" * 9, "return None", "x = 1"]
  documents = [
    packing.Document(tokenizer.encode(one, bos=True, eos=True), index)
    for index, one in enumerate(texts)
  ]
  rows = list(packing.pack(documents, 20))
  assert len(rows) > 1
  out = tmp_path / "out"
  report = {"row_length": 20, "vocab_size": 500, "sources": {}}
  with prepared.unfinished(out) as folder:
    tokenizer.save(folder / prepared.TOKENIZER)
    path = folder / prepared.shard_name("code", 0)
    prepared.write_shard(path, rows)
    shard = {"rows": len(rows), "bytes": path.stat().st_size}
    sides = {"train": {"shards": [shard]}, "heldout": {"shards": []}}
    report["sources"]["code"] = sides
    prepared.finish(folder, {"code": [len(rows)]}, report)
  return prepared.read(out), rows, texts


def test_all_of_a_row_with_signs(data):
  opened, rows, texts = data
  shown = "\n".join(display.lines(opened, 99, 0, colours=False))
  assert "\x1b" not in shown
  for index, row in enumerate(rows):
    title = f"=== code: row {index} of {len(rows)}: 21 tokens, "
    masks = packing.inputs(row, 0, 20, separate=True)["loss_mask"]
    assert f"{title}{int(masks.sum())} in the loss" in shown
  # A document's BOS is never a target; EOS is.
  assert shown.count("([<s>])") == len(texts)
  assert shown.count("[</s>]") == len(texts)
  assert "= 1[</s>]" in shown
  assert rows[1]["documents"][0] == 0
  assert shown.count("--- document 0, ") == len(
    [row for row in rows if 0 in row["documents"]]
  )


def test_colours_say_the_same(data):
  opened, _, _ = data
  colours = "\n".join(display.lines(opened, 99, 0, colours=True))
  signs = "\n".join(display.lines(opened, 99, 0, colours=False))
  assert colours.count("\x1b[36m<s>") == signs.count("[<s>]")
  plain = COLOURS.sub("", colours)
  for sign in ("=== ", "--- ", "[", "]", "(", ")"):
    signs = signs.replace(sign, "")
    plain = plain.replace(sign, "")
  assert plain == signs


def test_rows_are_drawn_by_the_seed(data):
  opened, _, _ = data

  def shown(rows, seed):
    return "\n".join(display.lines(opened, rows, seed, False))

  assert shown(1, 0) == shown(1, 0)
  assert len({shown(1, seed) for seed in range(20)}) > 1
  assert shown(1, 0).count("=== ") == 1


def test_text_cannot_steer_the_terminal():
  assert display.printable("a\x1b[2Jb\x07\u202ec\n\td é 你") == (
    "a\\x1b[2Jb\\x07\\u202ec\n\td é 你"
  )
