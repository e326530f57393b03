"""Files of prompts: in order, whole, resumed, shared by real processes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

import llama_jax
from llama_jax import answers, batch, errors
from llama_jax import llama as llama_lib
from llama_jax.decoding import engine as engine_lib
from llama_jax.decoding import sampling
from llama_jax.parallel import mesh as mesh_lib

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = engine_lib.EngineConfig(
  cache_tokens=2048, page_size=32, max_batch=8, chunk=64
)


@pytest.fixture(scope="module")
def llama(nano):
  return llama_jax.load(f"hf:{nano}")


@pytest.fixture(scope="module")
def prompts(python_source, tmp_path_factory):
  """40 rows with fields of their own, one of them longer than the context."""
  text = "".join(python_source)
  rows = [
    {"prompt": text[100 * i : 100 * i + 5 * i + 3], "id": f"row {i}", "é": i}
    for i in range(40)
  ]
  rows[7]["prompt"] = text[:4000]
  file = tmp_path_factory.mktemp("prompts") / "in.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return file


def test_seeds_side_by_side_share_no_draw():
  drawn = [
    settings(sampling=sampling.SamplingConfig(temperature=1.0, seed=seed))
    .request([0], row=row)
    .sampling.seed
    for seed in range(4)
    for row in range(100)
  ]
  assert len(set(drawn)) == 400


def settings(**rest):
  return batch.Settings(
    **{
      "samples": 2,
      "sampling": sampling.SamplingConfig(temperature=0.8, seed=5),
      "max_new_tokens": 12,
      "min_new_tokens": 0,
      "logprobs": None,
      "stop": (),
      "json_schema": "",
      "regex": "",
      **rest,
    }
  )


def run(llama, source, target, **rest):
  rows, asked = batch.read(source), settings(**rest)
  output = answers.Output(target, len(rows), batch.identity(rows, asked))
  batch.run(llama, rows, output, asked, CONFIG)
  return [json.loads(line) for line in target.read_text().splitlines()]


@pytest.fixture(scope="module")
def answered(llama, prompts, tmp_path_factory):
  return run(llama, prompts, tmp_path_factory.mktemp("out") / "out.jsonl")


def test_rows_in_order_with_their_fields(llama, prompts, answered):
  rows = batch.read(prompts)
  assert len(answered) == 40
  for index, (row, found) in enumerate(zip(rows, answered, strict=True)):
    found = dict(found)
    completions = found.pop("completions")
    if index == 7:
      assert "context" in found.pop("error") and completions == []
    assert found == row
    for one in completions:
      ends = set(llama.tokenizer.stop_ids)
      kept = [token for token in one["tokens"] if token not in ends]
      assert one["text"] == llama.tokenizer.decode(kept)
      assert one["finish_reason"] in ("stop", "length")
  texts = [
    one["text"] for row in answered for one in row.get("completions", [])
  ]
  assert len(set(texts)) > 20


def test_what_tells_two_files_apart(prompts):
  """Each knob by its own name, prompts by what they say and their order."""
  rows = batch.read(prompts)

  def differing(wanted, **rest):
    first = batch.identity(rows, settings())
    second = batch.identity(wanted, settings(**rest))
    return {name for name in first if first[name] != second[name]}

  assert differing(list(rows)) == set()
  changed = [*rows[:4], rows[4] | {"id": "other"}, *rows[5:]]
  assert differing(changed) == {"prompts"}
  assert differing([rows[1], rows[0], *rows[2:]]) == {"prompts"}
  assert differing(rows, samples=3, stop=("x",)) == {"samples", "stop"}
  warmer = sampling.SamplingConfig(temperature=0.9, seed=6)
  assert differing(rows, sampling=warmer) == {"temperature", "seed"}


def test_each_row_as_if_it_were_alone(llama, prompts, tmp_path, answered):
  """The seed goes by the row's place, not by who shares its batch."""
  rows = batch.read(prompts)
  source = tmp_path / "in.jsonl"
  # Row 3 keeps its place; what stands before it is another text.
  short = [{"prompt": "x"}] * 3 + [rows[3]]
  source.write_text("".join(json.dumps(row) + "\n" for row in short))
  alone = run(llama, source, tmp_path / "out.jsonl")[3]
  assert alone["completions"] == answered[3]["completions"]


def test_on_a_mesh_as_on_one_device(nano, prompts, tmp_path, answered):
  """Rows, heads and weights in parts."""
  axes = mesh_lib.ParallelConfig(data=1, fsdp=2, tensor=2)
  mesh = mesh_lib.make(axes, jax.devices()[:4])
  source = tmp_path / "in.jsonl"
  with open(prompts) as rows:
    source.write_text("".join(next(rows) for _ in range(6)))
  llama = llama_lib.load(f"hf:{nano}", mesh=mesh)
  assert run(llama, source, tmp_path / "out.jsonl") == answered[:6]


def test_stop_strings_and_log_probabilities(llama, prompts, tmp_path):
  found = run(
    llama,
    prompts,
    tmp_path / "out.jsonl",
    stop=("e", "\n"),
    logprobs=2,
    samples=1,
    max_new_tokens=40,
  )
  reasons = set()
  for row in found:
    for one in row["completions"]:
      assert "e" not in one["text"] and "\n" not in one["text"]
      assert len(one["logprobs"]) == len(one["tokens"])
      assert all(len(top) == 2 for top in one["top_logprobs"])
      reasons.add(one["finish_reason"])
  assert "stop" in reasons


def test_answers_that_must_match(llama, prompts, tmp_path):
  found = run(
    llama, prompts, tmp_path / "out.jsonl", regex="(yes|no), [0-9]{2}"
  )
  texts = {one["text"] for row in found for one in row["completions"]}
  assert len(texts) > 5
  for text in texts:
    head, tail = text.split(", ")
    assert head in ("yes", "no") and len(tail) == 2 and tail.isdigit()


def command(nano, prompts, target):
  return [
    sys.executable,
    "-m",
    "llama_jax.generate",
    f"--ckpt=hf:{nano}",
    f"--prompts={prompts}",
    f"--out={target}",
    *["--n=2", "--temperature=0.8", "--seed=5", "--max_new_tokens=12"],
    *["--cache_tokens=2048", "--max_batch=4"],
  ]


def test_killed_resumed_and_shared(nano, prompts, tmp_path, answered):
  """One process is killed midway; then two finish what it left, together."""
  target = tmp_path / "out.jsonl"
  parts = tmp_path / "out.jsonl.parts"

  def lines():
    return [line for f in parts.glob("*.jsonl") for line in f.open()]

  def start():
    return subprocess.Popen(
      command(nano, prompts, target),
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  first = start()
  while len(lines()) < 5:
    assert first.poll() is None, first.stdout.read()
    time.sleep(0.05)
  os.kill(first.pid, signal.SIGKILL)
  first.wait()
  first.stdout.close()
  before = {line for line in lines() if line.endswith("\n")}
  assert 5 <= len(before) < 40
  assert not target.exists()
  both = [start(), start()]
  said = [one.communicate(timeout=300)[0] for one in both]
  assert [one.returncode for one in both] == [0, 0], said
  done = [
    int(word.rpartition("\n")[2].split()[0])
    for out in said
    for word in out.split(" rows done")[:-1]
  ]
  # What was done was not done again, and nothing twice.
  assert sum(done) == 40 - len(before), said
  assert not parts.exists()
  found = [json.loads(line) for line in target.read_text().splitlines()]
  assert found == answered


def test_what_is_refused_leaves_nothing(llama, prompts, tmp_path):
  target = tmp_path / "out.jsonl"
  with pytest.raises(errors.UserError, match="regex"):
    run(llama, prompts, target, regex="(")
  # More than the context for any prompt at all, not for some.
  with pytest.raises(errors.UserError, match="--max_new_tokens=600"):
    run(llama, prompts, target, max_new_tokens=600)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "given, said",
  [
    ({"samples": 0}, "--n=0"),
    ({"max_new_tokens": 0}, "--max_new_tokens=0"),
    ({"min_new_tokens": 13}, "--min_new_tokens=13"),
    ({"logprobs": -1}, "--logprobs=-1"),
    ({"stop": ("",)}, "stop"),
    ({"json_schema": "{}", "regex": "a"}, "either"),
  ],
  ids=str,
)
def test_refused_settings(given, said):
  with pytest.raises(errors.UserError, match=said):
    settings(**given)


@pytest.mark.parametrize(
  "line, said",
  [
    ("{", "line 2 is not JSON"),
    ("[]", "not a JSON object"),
    ("{}", "either `prompt` or `messages`"),
    ('{"prompt": "a", "messages": []}', "either `prompt` or `messages`"),
    ('{"prompt": 3}', "`prompt` must be a text"),
    ('{"prompt": "a", "x": NaN}', "NaN is no number of JSON's"),
    ('{"prompt": ' + "[" * 100_000, "is not JSON"),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
  file = tmp_path / "in.jsonl"
  file.write_text('{"prompt": "a"}\n' + line + "\n")
  with pytest.raises(errors.BadFileError, match=said) as caught:
    batch.read(file)
  assert f"{file}, line 2" in str(caught.value)


def test_half_a_surrogate_is_kept_as_it_came(llama, tmp_path):
  """In a field; in a prompt it is an error of that row alone."""
  source = tmp_path / "in.jsonl"
  rows = [{"prompt": "a", "x": "\ud800é"}, {"prompt": "b\udfff"}]
  source.write_text("".join(json.dumps(row) + "\n" for row in rows))
  kept, refused = run(llama, source, tmp_path / "out.jsonl")
  assert kept["x"] == "\ud800é" and len(kept["completions"]) == 2
  assert refused["prompt"] == "b\udfff" and refused["error"]


def test_a_folder_is_no_file_to_write(tmp_path):
  with pytest.raises(errors.UserError, match="is a folder"):
    answers.Output(tmp_path, 1, {}).whole  # noqa: B018


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
  file = tmp_path / "in.jsonl"
  file.write_text('\ufeff{"prompt": "a"}\n', encoding="utf-8")
  assert batch.read(file) == [{"prompt": "a"}]


def test_no_rows_and_no_file(tmp_path):
  file = tmp_path / "in.jsonl"
  for content in (None, "", "\n"):
    if content is not None:
      file.write_text(content)
    with pytest.raises(errors.BadFileError, match=r"--prompts=.*in\.jsonl"):
      batch.read(file)
