"""Runs put together: prepared sources, ramps, grown models, refusals."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from llama_jax import checkpoint, errors, experiment, shell
from llama_jax import run as run_lib
from llama_jax.checkpoint import names, steps, store
from llama_jax.training import metrics as metrics_lib

ROOT = pathlib.Path(__file__).parents[1]


def lines(path, count, word):
  with path.open("w") as file:
    for number in range(count):
      text = f"{word} {number} " + " ".join(
        f"{word}{(number * 7 + i) % 13}" for i in range(20 + number % 17)
      )
      file.write(json.dumps({"text": text}) + "\n")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer_folder, run_verbs):
  """Three sources, two with held-out rows, in rows of 64."""
  folder = tmp_path_factory.mktemp("prepared")
  for name, count in (("code", 60), ("maths", 120), ("web", 240)):
    lines(folder / f"{name}.jsonl", count, name)
  config = (ROOT / "configs/data/folder.py").read_text()
  start = config.index('"sources": {')
  sources = ",".join(
    f'"{name}": {{"paths": "{folder}/{name}.jsonl", "format": "",'
    ' "field": "text", "split": "train"}'
    for name in ("code", "maths", "web")
  )
  file = folder / "config.py"
  file.write_text(config[:start] + f'"sources": {{{sources}}}}})\n')
  ((code, _, err),) = run_verbs(
    [
      "llama_jax.prepare",
      f"--config={file}",
      f"--out={folder}/rows",
      f"--config.tokenizer={tokenizer_folder}",
      "--config.row_length=64",
      "--config.heldout=0.2",
      "--config.workers=1",
    ]
  )
  assert code == 0, err
  return folder / "rows"


def config_file(folder, prepared, **training):
  """configs/nano.py on prepared data, with a mixture that changes."""
  text = (ROOT / "configs/nano.py").read_text()
  text = text.replace(
    "  return ml_collections.ConfigDict(",
    "  config = ml_collections.ConfigDict(",
  )
  text += f"""
  config.data.prepared = {str(prepared)!r}
  config.data.mixture = "web:0.75,maths:0.25"
  config.data.later_mixtures = ((8 * 32 * 4, {{"code": 0.5, "web": 0.5}}),)
  config.data.sequence_length = 32
  config.training.ramp = (dict(
    from_tokens=8 * 32 * 6, batch_size=8, sequence_length=64, accumulation=2),)
  config.optimizer.schedule = "constant"
  config.evaluation.update(every=5, rows=4)
  config.checkpoint.update(every=5, keep=9)
  config.metrics.curves_every = 0.0
  return config
"""
  file = folder / "recipe.py"
  file.write_text(text)
  return file


@pytest.fixture(scope="module")
def runs(tmp_path_factory, prepared, run_verbs):
  """A run of twelve steps, and one of seven that went on to twelve."""
  folder = tmp_path_factory.mktemp("runs")
  recipe = config_file(folder, prepared)

  def command(name, count):
    return [
      "llama_jax.train",
      f"--config={recipe}",
      f"--workdir={folder / name}",
      f"--config.training.steps={count}",
    ]

  results = run_verbs(
    [*command("whole", 12), "--profile=3:5"],
    command("parts", 7),
    command("parts", 12),
  )
  for code, _, err in results:
    assert code == 0, err
  return folder


def rows_of(folder):
  return metrics_lib.read(folder / "metrics.jsonl")


def test_resumed_amid_its_ramp_and_mixtures_equals_uninterrupted(runs):
  whole, parts = (
    [
      # The last step of any run is measured.
      {
        k: v
        for k, v in row.items()
        if k not in metrics_lib.CLOCKED and not k.startswith("heldout")
      }
      for row in rows_of(runs / name)
    ]
    for name in ("whole", "parts")
  )
  assert whole == parts
  ours, want = (
    names.flatten(store.read_params(runs / name)) for name in ("parts", "whole")
  )
  for path in want:
    assert ours[path].tobytes() == want[path].tobytes()


def test_rows_tell_sources_sizes_and_held_out_losses(runs):
  rows = rows_of(runs / "whole")
  assert [row["sequence_length"] for row in rows] == [32] * 6 + [64] * 6
  seen = np.cumsum([row["batch_size"] * row["sequence_length"] for row in rows])
  assert [row["tokens_seen"] for row in rows] == seen.tolist()
  # code has no share at first, maths none later.
  assert all(row["tokens/code"] == 0 for row in rows[:4])
  assert all("loss/code" not in row for row in rows[:4])
  assert all(row["tokens/maths"] == 0 for row in rows[4:])
  for row in rows:
    parts = [
      (row[f"tokens/{n}"], row.get(f"loss/{n}", 0))
      for n in ("code", "maths", "web")
    ]
    assert sum(tokens for tokens, _ in parts) == row["scored"]
    mean = sum(tokens * loss for tokens, loss in parts) / row["scored"]
    np.testing.assert_allclose(mean, row["loss"], rtol=1e-5)
  assert rows[-1]["epochs/maths"] == rows[3]["epochs/maths"] > 0
  for row in rows:
    measured = {k for k in row if k.startswith("heldout_loss/")}
    assert bool(measured) == (row["step"] in (5, 10, 12))
    if measured:
      assert measured == {f"heldout_loss/{n}" for n in ("code", "maths", "web")}
  assert list((runs / "whole" / "profile").rglob("*.xplane.pb"))


def test_kept_checkpoints_are_those_that_were_asked_for(runs):
  assert steps.list_steps(runs / "whole" / "checkpoints") == [5, 10, 12]
  assert steps.list_steps(runs / "parts" / "checkpoints") == [5, 7, 10, 12]


def asked_by(recipe, **changes):
  config = shell.load_config(str(recipe))
  config.training.steps = 12
  config.parallel.update(data=4, tensor=2)  # the tests' eight devices
  for knob, value in changes.items():
    section, _, name = knob.partition("__")
    config[section][name] = value
  return experiment.read(config)


def test_other_data_than_the_run_has_read_is_refused(runs):
  recipe = runs / "recipe.py"
  for change, said in (
    ({"training__batch_size": 16}, "rows_read of source code=8"),
    ({"data__seed": 1}, "seed=0"),
    (
      {"data__sequence_length": 64, "training__ramp": ()},
      "rows_read of source code=8",
    ),
    ({"data__mixture": "web:1,maths:1"}, "rows_read of source maths=4"),
  ):
    asked = asked_by(recipe, **change)
    run = run_lib.set_up(asked, runs / "parts")
    found = steps.Checkpoints(runs / "parts", reading=True)
    with (
      jax.set_mesh(run.devices),
      pytest.raises(errors.ConfigError, match=r"other data would follow") as e,
    ):
      run.restore(found, 7)
    assert f"had {said}" in str(e.value)


def test_another_tokenizer_than_the_datas_is_refused(prepared, nano, tmp_path):
  recipe = config_file(tmp_path, prepared)
  # A tokenizer of the same words, made of other text.
  from llama_jax.text import train_sentencepiece

  text = [f"quite another text {i * i}" for i in range(2000)]
  (tmp_path / "other.model").write_bytes(train_sentencepiece.train(text, 300))
  asked = asked_by(recipe, data__tokenizer=str(tmp_path / "other.model"))
  with pytest.raises(errors.ConfigError, match="another tokenizer"):
    run_lib.set_up(asked, tmp_path / "run")
  # Its own, by way of a model's folder, is not.
  asked = asked_by(recipe, data__tokenizer=str(nano))
  run_lib.set_up(asked, tmp_path / "run")


def test_a_model_grows_words_and_context(nano, tmp_path, corpus_file):
  """As Llama 2 became Code Llama: the old words' logits stay what they were."""
  config = shell.load_config(str(ROOT / "configs/nano.py"))
  config.init = f"hf:{nano}"
  config.model.update(
    size="", vocab_size=520, context_length=1024, rope_theta=1e6
  )
  config.data.text = str(corpus_file)
  run = run_lib.set_up(experiment.read(config), tmp_path / "run")
  grown = run.decoder.config
  before = checkpoint.load(f"hf:{nano}")
  assert (grown.vocab_size, grown.context_length) == (520, 1024)
  assert dataclasses.replace(
    grown, vocab_size=512, context_length=512, rope_theta=1e4
  ) == (before.config)
  with jax.set_mesh(run.devices):
    params = names.flatten(run.first().params)
  for path, was in names.flatten(before.params).items():
    now = np.asarray(params[path])
    if path.startswith("embed"):
      np.testing.assert_array_equal(now[:512], was)
      want = np.tile(was.mean(0), (8, 1))
      np.testing.assert_allclose(now[512:], want, atol=1e-6)
    else:
      np.testing.assert_array_equal(now, was)
  config.model.vocab_size = 100
  with pytest.raises(errors.ConfigError, match=r"model\.vocab_size=100"):
    run_lib.set_up(experiment.read(config), tmp_path / "run")


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
  file = tmp_path_factory.mktemp("text") / "a.jsonl"
  lines(file, 200, "word")
  return file


RECIPES = sorted((ROOT / "configs/pretrain").glob("*.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_tokenizer_is_made_of_any_text(recipe, tmp_path):
  """Letters of many scripts, few of anything; infilling where it is asked."""
  file = tmp_path / "many.txt"
  file.write_text(
    "".join(map(chr, range(0x4E00, 0x5600))) + "naïve café Ωμέγα слово 語" * 90
  )
  config = shell.load_config(f"{recipe}:nano")
  config.data.text = str(file)
  config.training.batch_size = 8
  asked = experiment.read(config)
  run = run_lib.set_up(asked, tmp_path / "run")
  assert run.tokenizer.vocab_size <= 512
  row = run.batches.get(0)
  assert row["tokens"].shape == (8, asked.data.sequence_length)
  text = file.read_text()
  assert run.tokenizer.decode(run.tokenizer.encode(text)) == text
  assert ("▁<PRE>" in run.tokenizer.special_tokens) == bool(
    asked.data.infill_rate
  )


def test_a_large_recipe_says_what_it_needs(run_verbs, tmp_path):
  commands = [
    (
      [
        "llama_jax.train",
        f"--config={path}:{variant}",
        f"--workdir={tmp_path}",
      ],
      ("--config.data.text", "--config.data.prepared"),
    )
    for path, variant in ((RECIPES[0], "7b"), (RECIPES[1], "65b"))
  ]
  commands.append(
    (
      [
        "llama_jax.train",
        f"--config={RECIPES[1]}:8b",
        f"--workdir={tmp_path}",
      ],
      ("llama1.py:8b", "65b"),
    )
  )
  results = run_verbs(*(command for command, _ in commands))
  for (_, said), (code, _, err) in zip(commands, results, strict=True):
    assert code == 2 and err.count("\n") == 1, err
    for words in said:
      assert words in err
