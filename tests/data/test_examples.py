"""Rows of conversations and preferences: what is trained, what is beside it."""

import gzip
import json
import os

import jax
import numpy as np
import pytest

from llama_jax import cores, errors, text
from llama_jax.data import batches, dialogs, examples, packing

TEMPLATE = (
  "{% for message in messages %}<s>{{ message.role }}\n"
  "{{ message.content }}</s>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
  tokenizer = text.load_tokenizer(tokenizer_folder)
  tokenizer.chat_template = TEMPLATE
  return tokenizer


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def data_config(paths, form, **changes):
  fields = {
    "text": paths,
    "prepared": "",
    "mixture": {},
    "later_mixtures": (),
    "separate_documents": True,
    "sequence_length": 64,
    "heldout": 0.0,
    "infill_rate": 0.0,
    "workers": 1,
    "seed": 0,
    "tokenizer": "",
    "form": form,
  }
  return batches.DataConfig(**(fields | changes))


def conversation(number, answer="yes it is"):
  asked = {"role": "user", "content": f"is {number} a number?"}
  return {"messages": [asked, {"role": "assistant", "content": answer}]}


def said(tokenizer, row):
  """The targets that are trained, as text, by segment."""
  length = len(row["tokens"]) - 1
  inputs = packing.inputs(row, 0, length, True)
  found = []
  for segment in range(1, inputs["segments"].max() + 1):
    of = (inputs["segments"] == segment) & (inputs["loss_mask"] > 0)
    ids = inputs["targets"][of].tolist()
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    found.append(
      "".join(
        names[i] if i in names else tokenizer.join_bytes([i], True)[0].decode()
        for i in ids
      )
    )
  return found


def test_only_what_the_assistant_says_is_trained(tokenizer, tmp_path):
  rows = [conversation(n, f"yes, {n} is") for n in range(6)]
  path = write(tmp_path / "a.jsonl", rows)
  found = examples.read(
    data_config(path, batches.CONVERSATIONS), tokenizer, 100
  )
  texts = [one for row in found.rows["text"] for one in said(tokenizer, row)]
  assert sorted(texts) == [f"yes, {n} is</s>" for n in range(6)]
  counts = found.counts["text"]
  assert counts.kept == 6 and not counts.skipped
  trained = sum(
    packing.inputs(row, 0, 100, True)["loss_mask"].sum()
    for row in found.rows["text"]
  )
  assert counts.trained == trained
  assert "the model is to say" in str(counts)


def test_without_formatting_the_end_of_the_turn_is_left_out(
  tokenizer, tmp_path
):
  path = write(tmp_path / "a.jsonl", [conversation(1)])
  found = examples.read(
    data_config(path, batches.CONVERSATIONS), tokenizer, 60, formatting=False
  )
  assert said(tokenizer, found.rows["text"][0]) == ["yes it is"]


def test_padded_rows_hold_the_same_examples(tokenizer, tmp_path):
  path = write(tmp_path / "a.jsonl", [conversation(n) for n in range(5)])
  config = data_config(path, batches.CONVERSATIONS, packed=False)
  found = examples.read(config, tokenizer, 150)
  assert [row["segments"].max() for row in found.rows["text"]] == [1] * 5


def test_rehearsed_text_is_trained_whole(tokenizer, tmp_path):
  path = write(tmp_path / "a.jsonl", [{"text": "def f(): pass"}])
  found = examples.read(data_config(path, batches.CONVERSATIONS), tokenizer, 30)
  (row,) = found.rows["text"]
  mask = packing.inputs(row, 0, 30, True)["loss_mask"]
  assert mask.sum() == (row["segments"] > 0).sum() - 1


def test_a_conversation_with_its_rendered_text_is_a_conversation(
  tokenizer, tmp_path
):
  row = {"instruction": "is it?", "output": "yes it is"}
  found = [
    examples.read(
      data_config(write(tmp_path / name, [one]), batches.CONVERSATIONS),
      tokenizer,
      60,
    ).rows["text"][0]["tokens"]
    for name, one in (
      ("a.jsonl", row),
      ("b.jsonl", row | {"text": "### is it?\n### yes it is"}),
    )
  ]
  np.testing.assert_array_equal(*found)


def test_sources_by_name_and_arrays_of_json(tokenizer, tmp_path):
  (tmp_path / "a.json").write_text(
    json.dumps([conversation(n) for n in range(3)])
  )
  lines = "".join(json.dumps(conversation(n)) + "\n" for n in range(3, 5))
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
  paths = {"one": str(tmp_path / "a.json"), "two": str(tmp_path / "b.jsonl.gz")}
  config = data_config(paths, batches.CONVERSATIONS, mixture="one:1,two:3")
  found = examples.read(config, tokenizer, 60)
  assert {n: c.kept for n, c in found.counts.items()} == {"one": 3, "two": 2}
  assert list(found.rows) == ["one", "two"]


@pytest.mark.parametrize("form", [batches.CONVERSATIONS, batches.PREFERENCES])
def test_several_processes_read_what_one_does(
  tokenizer, tmp_path, monkeypatch, form
):
  of = conversation if form == batches.CONVERSATIONS else pair
  rows = [of(n) if n % 7 else {"what": n} for n in range(40)]
  path = write(tmp_path / "a.jsonl", rows)
  config = data_config(path, form, heldout=0.2, max_skipped=0.5)
  alone = examples.read(config, tokenizer, 200)
  monkeypatch.setattr(examples, "_ALONE", 3)
  monkeypatch.setattr(examples, "_CHUNK", 4)
  monkeypatch.setattr(cores, "usable", lambda: 2)
  several = examples.read(config, tokenizer, 200)
  assert several.counts == alone.counts
  assert alone.counts["text"].skipped.total() == 6
  for ours, want in (
    (several.rows, alone.rows),
    (several.heldout, alone.heldout),
  ):
    jax.tree.map(np.testing.assert_array_equal, ours, want)


def test_a_killed_process_is_one_line(tokenizer, tmp_path, monkeypatch):
  path = write(tmp_path / "a.jsonl", [conversation(n) for n in range(40)])
  monkeypatch.setattr(examples, "_ALONE", 3)
  monkeypatch.setattr(examples, "_CHUNK", 4)
  monkeypatch.setattr(cores, "usable", lambda: 2)
  monkeypatch.setattr(examples, "_convert_all", _die)
  with pytest.raises(errors.UserError, match="a worker process was killed"):
    examples.read(data_config(path, batches.CONVERSATIONS), tokenizer, 60)


def _die(*given):
  os._exit(9)


def pair(number, **more):
  return {
    "prompt": f"is {number} a number?",
    "chosen": f"yes, {number} is",
    "rejected": "no",
    **more,
  }


def test_each_answer_is_a_segment_and_pairs_name_them(tokenizer, tmp_path):
  rows = [
    pair(1, rating="better", chosen_safe=True, rejected_safe=False),
    pair(2, edited="oh yes"),
    pair(3, rating="unsure"),
  ]
  path = write(tmp_path / "a.jsonl", rows)
  found = examples.read(data_config(path, batches.PREFERENCES), tokenizer, 400)
  (row,) = found.rows["text"]
  texts = said(tokenizer, row)
  assert sorted(texts) == sorted(
    ["yes, 1 is</s>", "no</s>", "oh yes</s>", "yes, 2 is</s>", "no</s>"]
    + ["yes, 3 is</s>", "no</s>"]
  )
  extra = row["extra"]
  told = {
    (texts[better - 1], texts[other - 1], int(rating))
    for (better, other), rating in zip(
      extra["pairs"], extra["ratings"], strict=True
    )
    if better
  }
  assert told == {
    ("yes, 1 is</s>", "no</s>", 1),
    ("oh yes</s>", "yes, 2 is</s>", -1),
    ("oh yes</s>", "no</s>", -1),
    ("yes, 2 is</s>", "no</s>", -1),
    ("yes, 3 is</s>", "no</s>", 3),
  }
  # The last token of each segment is an input, and it ends the turn.
  for segment, place in enumerate(extra["last"], 1):
    assert row["segments"][place] == segment and place < 400
    assert row["tokens"][place] == tokenizer.eos_id
    assert place + 1 == 401 or row["segments"][place + 1] != segment
  safe = dict(zip(texts, extra["safe"].tolist(), strict=True))
  assert safe["yes, 1 is</s>"] == 1 and safe["oh yes</s>"] == -1


def test_earlier_answers_of_a_preference_are_not_trained(tokenizer, tmp_path):
  before = "\n\nHuman: hello\n\nAssistant: what?\n\nHuman: is it?\n\nAssistant:"
  row = {"chosen": f"{before} yes", "rejected": f"{before} no"}
  path = write(tmp_path / "a.jsonl", [row])
  found = examples.read(data_config(path, batches.PREFERENCES), tokenizer, 120)
  assert said(tokenizer, found.rows["text"][0]) == ["yes</s>", "no</s>"]


def test_extras_have_one_size_in_all_rows(tokenizer, tmp_path):
  rows = [pair(n, **({"edited": "oh"} if n % 3 else {})) for n in range(20)]
  path = write(tmp_path / "a.jsonl", rows)
  config = data_config(path, batches.PREFERENCES, heldout=0.3)
  found = examples.read(config, tokenizer, 160)
  every = [*found.rows["text"], *found.heldout["text"]]
  assert len(every) > 3
  for name in ("pairs", "ratings", "last", "safe"):
    assert len({row["extra"][name].shape for row in every}) == 1
  assert found.counts["text"].kept + found.counts["text"].heldout == 20


def test_one_prompt_is_held_out_with_all_its_answers(tokenizer, tmp_path):
  rows = [
    {"prompt": f"is {n}?", "chosen": f"yes {k}", "rejected": f"no {k}"}
    for n in range(12)
    for k in range(2)
  ]
  path = write(tmp_path / "a.jsonl", rows)
  config = data_config(path, batches.PREFERENCES, heldout=0.4)
  found = examples.read(config, tokenizer, 100)
  counts = found.counts["text"]
  assert counts.kept and counts.heldout
  assert counts.kept % 2 == counts.heldout % 2 == 0


def test_what_cannot_be_used_is_counted_within_a_budget(tokenizer, tmp_path):
  rows = [conversation(n) for n in range(7)]
  rows += [{"messages": rows[0]["messages"][:1]}, conversation(8, "a" * 500)]
  path = tmp_path / "a.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in rows) + "{broken\n")
  config = data_config(str(path), batches.CONVERSATIONS, max_skipped=0.3)
  found = examples.read(config, tokenizer, 60)
  counts = found.counts["text"]
  assert counts.kept == 7 and counts.skipped.total() == 3
  assert "longer than a row of 60 tokens" in str(counts)
  config = data_config(str(path), batches.CONVERSATIONS, max_skipped=0.2)
  with pytest.raises(errors.BadFileError) as caught:
    examples.read(config, tokenizer, 60)
  for part in ("data.text", "of 10 rows 3", "row 8", "max_skipped", "0.2"):
    assert part in str(caught.value)


def test_pairs_rated_alike_are_dropped_apart_from_what_is_bad(
  tokenizer, tmp_path
):
  ratings = ("significantly_better", "unsure", "negligibly_better", None)
  rows = [pair(n) | {"rating": ratings[n % 4]} for n in range(8)]
  path = write(tmp_path / "a.jsonl", rows)

  def read(**changes):
    config = data_config(path, batches.PREFERENCES, max_skipped=0.0, **changes)
    return examples.read(config, tokenizer, 200)

  whole, part = read(), read(drop_ratings=("unsure",))
  assert (whole.counts["text"].kept, whole.counts["text"].dropped) == (8, 0)
  assert (part.counts["text"].kept, part.counts["text"].dropped) == (4, 4)
  assert "4 dropped by rating, 0 skipped" in str(part.counts["text"])
  unsure = dialogs.RATINGS.index("unsure")
  for row in part.rows["text"]:
    assert unsure not in row["extra"]["ratings"]
  path = write(tmp_path / "b.jsonl", rows[1:3])
  with pytest.raises(errors.BadFileError, match="2 dropped by their rating"):
    read(drop_ratings=("unsure",))


def test_a_template_that_drops_the_answer_is_told(tokenizer, tmp_path):
  path = write(tmp_path / "a.jsonl", [conversation(1)])
  before = tokenizer.chat_template
  tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
  try:
    with pytest.raises(errors.BadFileError, match="template drops"):
      examples.read(data_config(path, batches.CONVERSATIONS), tokenizer, 60)
    tokenizer.chat_template = None
    with pytest.raises(errors.ConfigError, match=r"data\.chat_template"):
      examples.read(data_config(path, batches.CONVERSATIONS), tokenizer, 60)
  finally:
    tokenizer.chat_template = before


@pytest.mark.parametrize(
  ("changes", "knob"),
  [
    ({"form": "dialogs"}, "data.form="),
    ({"form": "documents", "packed": False}, "data.packed="),
    ({"form": "documents", "text": {"a": "b"}}, "data.text"),
    ({"max_skipped": 2.0}, "data.max_skipped="),
    ({"drop_ratings": ("unsure",)}, "data.drop_ratings="),
    (
      {"form": batches.PREFERENCES, "drop_ratings": ("alike",)},
      "data.drop_ratings=",
    ),
    ({"infill_rate": 0.5}, "data.form="),
  ],
)
def test_knobs_that_do_not_go_together(changes, knob):
  with pytest.raises(errors.ConfigError, match=knob):
    data_config("x", **({"form": batches.CONVERSATIONS} | changes))


def test_a_batch_takes_along_what_lies_beside_a_row(tokenizer, tmp_path):
  path = write(tmp_path / "a.jsonl", [pair(n) for n in range(8)])
  config = data_config(path, batches.PREFERENCES, sequence_length=90)
  found = examples.read(config, tokenizer, 90)
  from llama_jax.data import ramp as ramp_lib

  ramp = ramp_lib.Ramp([ramp_lib.Stage(0, 2, 90, 1)], 90)
  batch = batches.Batches(found.rows, config, ramp).get(0)
  assert batch["pairs"].shape[0] == batch["last"].shape[0] == 2
  assert batch["pairs"].dtype == np.int32
