"""SFT, a reward model and DPO as verbs, on random weights and a few rows."""

import json
import pathlib

import finetuning
import numpy as np
import pytest

from llama_jax import compatibility, errors, experiment, learning, shell
from llama_jax.training import metrics

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs/finetune").glob("*.py"))
# Students of what the first run became, and of nothing else.
DISTILLED = {
  "live": {"objective.reverse": 0.5, "data.form": "conversations"},
  "stored": {"objective.top_k": 5, "data.sequence_length": 32},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return finetuning.write_data(tmp_path_factory.mktemp("data"))


def command(kind, nano, data, workdir, **knobs):
  usual = {"training.batch_size": 4, "optimizer.peak_lr": 3e-3}
  knobs = {"init": f"hf:{nano}"} | usual | knobs
  return finetuning.command(kind, knobs.pop("init"), data, workdir, **knobs)


@pytest.fixture(scope="module")
def runs(run_verbs, nano, data, tmp_path_factory):
  """Each kind once: (exit code, output, errors, the run's folder)."""
  folder = tmp_path_factory.mktemp("runs")
  kinds = ("llama2_sft", "llama2_reward", "llama3_dpo")
  commands = {kind: command(kind, nano, data, folder / kind) for kind in kinds}
  for name, more in DISTILLED.items():
    knobs = {
      "objective.teacher": f"orbax:{folder / 'llama2_sft'}",
      "objective.data": 0.0,
      "data.tokenizer": nano,
      "init": "",
      "model.size": "nano",
      **more,
    }
    if name == "stored":
      knobs["data.text"] = data / "texts.jsonl"
    commands[name] = command(
      "llama32_distill", nano, data, folder / name, **knobs
    )
  done = run_verbs(*commands.values())
  return {
    kind: (*told, folder / kind)
    for kind, told in zip(commands, done, strict=True)
  }


def rows_of(runs, kind):
  code, out, err, folder = runs[kind]
  assert code == 0, out + err
  return metrics.read(folder / "metrics.jsonl")


def test_sft_learns_answers_and_says_what_it_read(runs):
  rows = rows_of(runs, "llama2_sft")
  assert rows[-1]["heldout_loss"] < rows[2]["heldout_loss"] < 7
  assert rows[0]["before/heldout_loss"] > rows[-1]["heldout_loss"]
  assert rows[-1]["loss"] < rows[0]["loss"]
  out = runs["llama2_sft"][1]
  assert "to train on" in out and "the model is to say" in out


def test_a_reward_model_learns_to_rank(runs):
  rows = rows_of(runs, "llama2_reward")
  assert rows[-1]["heldout/accuracy"] > 0.9
  assert rows[-1]["heldout/margin"] > rows[2]["heldout/margin"]
  assert {"accuracy/better", "accuracy/unsure", "calibration/0"} <= set(rows[0])
  assert rows[-1]["loss"] < rows[0]["loss"] < 3
  # The curve of the held-out pairs: each of them lies in one bin.
  of = rows[-1]
  bins = [
    (of[f"heldout/calibration_pairs/{i}"], of[f"heldout/calibration/{i}"])
    for i in range(10)
  ]
  right = sum(count * share for count, share in bins if count)
  pairs = sum(count for count, _ in bins)
  assert pairs > 0
  assert right / pairs == pytest.approx(of["heldout/accuracy"])


def test_dpo_moves_away_from_its_reference(runs):
  rows = rows_of(runs, "llama3_dpo")
  # At the reference the margin is 0 and the loss is log 2 and the last term.
  assert rows[0]["margin"] == 0 and rows[0]["accuracy"] == 0.5
  assert rows[0]["loss"] == pytest.approx(
    np.log(2) + 0.2 * rows[0]["nll"], rel=1e-5
  )
  # So it is on held-out rows before the first step.
  assert abs(rows[0]["before/heldout/margin"]) < 1e-5
  assert rows[0]["before/heldout_loss"] == pytest.approx(
    np.log(2) + 0.2 * rows[0]["before/heldout/nll"], rel=1e-5
  )
  assert rows[-1]["heldout/margin"] > 0 and rows[-1]["heldout/accuracy"] > 0.9


def test_a_short_run_asks_its_reference_of_what_it_reads(
  run_verbs, nano, data, tmp_path
):
  """Not of all rows; of more when the run goes on for longer."""
  knobs = {"data.packed": False, "training.batch_size": 2, "evaluation.rows": 2}
  short, longer = (
    command(
      "llama3_dpo", nano, data, tmp_path, **knobs, **{"training.steps": n}
    )
    for n in (2, 3)
  )
  asked = []
  for one in (short, longer):
    ((code, out, err),) = run_verbs(one)
    assert code == 0, err
    with np.load(tmp_path / "reference.npz") as kept:
      asked.append(len(kept["reference"]))
    assert f"reads {asked[-1]} rows" in out
  assert asked == [2 * 2 + 2, 2 * 3 + 2]
  rows = metrics.read(tmp_path / "metrics.jsonl")
  assert [row["step"] for row in rows] == [1, 2, 3]
  assert rows[0]["margin"] == 0 and rows[1]["margin"] != 0


@pytest.mark.parametrize("kind", ["llama2_reward", "llama3_dpo"])
def test_a_mesh_equals_one_device(runs, run_verbs, nano, data, tmp_path, kind):
  """Each step on eight devices, the reference's words too: float32 noise.

  On one core: there, devices that share too few threads soonest wait for
  each other for ever.
  """
  knobs = {f"parallel.{axis}": 2 for axis in ("data", "fsdp", "tensor")}
  ((code, _, err),) = run_verbs(
    [*command(kind, nano, data, tmp_path, **knobs), "--cpu_devices=8"],
    cores=[0],
  )
  assert code == 0, err
  found = metrics.read(tmp_path / "metrics.jsonl")
  for ours, want in zip(found, rows_of(runs, kind), strict=True):
    assert ours["scored"] == want["scored"] > 0
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
      np.testing.assert_allclose(ours[name], want[name], rtol=tolerance)
    np.testing.assert_allclose(ours["margin"], want["margin"], atol=1e-4)
  heldout = [
    rows[-1]["heldout/margin"] for rows in (found, rows_of(runs, kind))
  ]
  np.testing.assert_allclose(*heldout, atol=1e-4)


@pytest.mark.parametrize("kind", DISTILLED)
def test_a_student_nears_its_teacher(runs, kind):
  rows = rows_of(runs, kind)
  assert 0 < rows[-1]["kl"] < rows[0]["kl"]
  assert ("reverse_kl" in rows[0]) == (kind == "live")
  assert (runs[kind][3] / "teacher.npz").is_file() == (kind == "stored")
  assert rows[-1]["heldout_loss"] > 0


def test_a_run_goes_on_bitwise_and_alone(runs, run_verbs, nano, data, tmp_path):
  """The reference that the first part kept is enough for the second."""
  kind = "llama3_dpo"
  first, again = run_verbs(
    command(kind, nano, data, tmp_path, **{"training.steps": 3}),
    command(kind, nano, data, tmp_path),
  )
  assert first[0] == again[0] == 0, first[2] + again[2]
  assert "reference" in first[1] and "reference  scores" not in again[1]
  want = rows_of(runs, kind)
  found = metrics.read(tmp_path / "metrics.jsonl")
  assert [r["step"] for r in found] == [r["step"] for r in want]
  # The schedule of the shorter run is another, so only the data is the same.
  assert found[0]["gradient_hash"] == want[0]["gradient_hash"]


def test_a_reward_model_says_no_words(runs, run_verbs, nano, data, tmp_path):
  rows_of(runs, "llama2_reward")
  folder = runs["llama2_reward"][3]
  speak, train = run_verbs(
    ["llama_jax.generate", f"--ckpt=orbax:{folder}", "--prompt=a"],
    command("llama2_sft", nano, data, tmp_path, init=f"orbax:{folder}"),
  )
  for code, _, err in (speak, train):
    assert code == 2 and "reward model" in err and "Traceback" not in err


def test_scoring_a_file(runs, run_verbs, data, tmp_path):
  """What it learned to like is scored higher, alone or as a completion."""
  rows_of(runs, "llama2_reward")
  pairs = [json.loads(line) for line in (data / "pairs.jsonl").open()][:4]
  rows = [
    {"prompt": one["prompt"], "completion": one[kind], "kind": kind}
    for one in pairs
    for kind in ("chosen", "rejected")
  ]
  rows += [
    {
      "prompt": one["prompt"],
      "completions": [{"text": one["chosen"]}, {"text": one["rejected"]}],
    }
    for one in pairs
  ]
  # A model may say nothing, and a row may have no answer.
  rows += [{"prompt": "x", "completions": [{"text": ""}]}]
  rows += [{"prompt": "x", "completions": []}]
  source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  source.write_text("".join(json.dumps(row) + "\n" for row in rows))
  command = [
    "llama_jax.evaluate",
    f"--ckpt=orbax:{runs['llama2_reward'][3]}",
    f"--score={source}",
  ]
  bare, done = run_verbs(command, [*command, f"--out={out}"])
  assert bare[0] == 2 and "--out" in bare[2]
  assert done[0] == 0, done[2]
  found = [json.loads(line) for line in out.open()]
  alone = [row["reward"] for row in found[:8]]
  assert all(a > b for a, b in zip(alone[::2], alone[1::2], strict=True))
  # Neither what shares a batch nor the form of a row changes a score.
  together = [c["reward"] for row in found[8:12] for c in row["completions"]]
  np.testing.assert_allclose(together, alone, atol=1e-5)
  assert [row["kind"] for row in found[:2]] == ["chosen", "rejected"]
  assert found[12]["completions"] == [{"text": "", "reward": None}]
  assert "1 without a reward" in done[1] and "row 13" in done[1]
  source.write_text(json.dumps(rows[-1]) + "\n")
  ((code, _, err),) = run_verbs([*command, f"--out={out}"])
  assert code == 2 and "has nothing to score" in err and err.count("\n") == 1


def test_what_does_not_go_together_is_refused(run_verbs, nano, data, tmp_path):
  pairs = data / "pairs.jsonl"
  cases = [
    ("llama3_dpo", {"data.form": "conversations"}, "data.form="),
    ("llama3_dpo", {"init": ""}, "--config.init=REF"),
    ("llama3_dpo", {"objective.beta": 0.0}, "objective.beta="),
    ("llama3_dpo", {"objective.name": "ppo"}, "objective.name="),
    ("llama2_sft", {"data.text": pairs}, "max_skipped"),
    ("llama2_sft", {"training.epochs": 2.0}, "training.epochs="),
    ("llama2_sft", {"data.chat_template": "llama9"}, "data.chat_template="),
    ("llama2_sft", {"data.separate_documents": False}, "separate_documents="),
  ]
  done = run_verbs(
    *(
      command(kind, nano, data, tmp_path / "w", **knobs)
      for kind, knobs, _ in cases
    )
  )
  for (kind, knobs, part), (code, _, err) in zip(cases, done, strict=True):
    assert code == 2, (kind, knobs, err)
    assert part in err and "Traceback" not in err, (kind, knobs, err)
  assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_whole(recipe):
  source = recipe.read_text()
  variants = {"": "", "smollm2": "_smollm2", "safety:DIR": '"safety"'}
  variants["plain"] = '"plain"'
  for variant, mark in variants.items():
    if mark not in source:
      continue
    name = f"{recipe}:{variant}" if variant else str(recipe)
    config = shell.load_config(name)
    config.init = "hf:DIR"
    if not config.data.text:
      config.data.text = "FILE"
    if config.objective.name == "distill":
      config.objective.teacher = "hf:DIR"
    compatibility.check(experiment.read(config))
    # The docstring says where it is from and what to expect.
    for word in ("Source: arXiv:", "Expected:", f"{recipe.stem}.py"):
      assert word in source


def test_an_epoch_of_a_mixture_ends_with_the_first_source():
  """No row is seen more often than there are epochs."""
  config = shell.load_config(
    f"{ROOT / 'configs/finetune/llama2_reward.py'}:safety:data"
  )
  config.init = "hf:x"
  asked = experiment.read(config)
  sizes = {"safety": 6_000, "helpfulness": 100_000}
  assert set(asked.data.texts) == set(sizes)
  weights = dict(asked.data.mixtures()[0][1])
  assert weights["safety"] == pytest.approx(9 * weights["helpfulness"])
  one = learning.in_epochs(asked, sizes).training
  # 6,000 rows are nine tenths of what is read.
  batch = asked.training.batch_size
  assert one.steps == round(asked.training.epochs * 6_000 / 0.9 / batch)


@pytest.mark.parametrize("steps, warmup", [(100, 5), (1000, 30), (1001, 31)])
def test_llama_2s_reward_warms_up_for_a_share_of_the_steps(steps, warmup):
  """3 % of them, and at least 5 (arXiv:2307.09288, 3.2.2)."""
  config = shell.load_config(f"{ROOT / 'configs/finetune/llama2_reward.py'}")
  config.init, config.data.text = "hf:x", "pairs.jsonl"
  config.training.update(steps=steps, epochs=0.0)
  asked = experiment.read(config)
  rate = experiment.rates(asked, experiment.make_ramp(asked, None))
  grown = [rate(step) / asked.optimizer.peak_lr for step in range(warmup + 2)]
  want = [(step + 1) / warmup for step in range(warmup)]
  assert grown[:warmup] == pytest.approx(want)
  assert grown[warmup + 1] < grown[warmup] == 1


def test_a_run_keeps_its_reference_and_a_student_its_words(
  runs, run_verbs, nano, data, tmp_path
):
  folder = runs["llama3_dpo"][3]
  before = (folder / "metrics.jsonl").read_bytes()
  other = f"orbax:{runs['llama2_sft'][3]}"
  distilled = command("llama32_distill", nano, data, tmp_path / "d")
  told = run_verbs(
    command("llama3_dpo", nano, data, folder, init=other),
    [
      *distilled,
      f"--config.objective.teacher=orbax:{runs['llama2_reward'][3]}",
    ],
  )
  words = ("is the reference", "is a reward model")
  for (code, _, err), said in zip(told, words, strict=True):
    assert code == 2 and said in err and err.count("\n") == 1, err
  assert (folder / "metrics.jsonl").read_bytes() == before
  assert not (tmp_path / "d").exists()


def test_a_damaged_reference_is_one_line(tmp_path):
  file = tmp_path / "reference.npz"
  np.savez(file, of="x", reference=np.arange(4000.0))
  assert len(learning._kept(file, "x", 4000)["reference"]) == 4000
  whole = file.read_bytes()
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 1
  for content in (whole[:500], bytes(flipped), b"nothing of the kind"):
    file.write_bytes(content)
    with pytest.raises(errors.BadFileError, match="remove it"):
      learning._kept(file, "x", 4000)


def test_what_is_to_stay_is_saved():
  keep = experiment.CheckpointConfig(
    every=5, keep=1, keep_every=4, pinned=(3, 11)
  )
  saved = [step for step in range(1, 13) if keep.due(step)]
  assert saved == [3, 4, 5, 8, 10, 11, 12]


def test_a_reference_has_no_words_of_its_own():
  config = shell.load_config(f"{ROOT / 'configs/finetune/llama3_dpo.py'}")
  config.init = "hf:x"
  config.data.text = "pairs.jsonl"
  compatibility.check(experiment.read(config))
  config.model.vocab_size = 600
  with pytest.raises(errors.ConfigError, match=r"model\.vocab_size=600"):
    compatibility.check(experiment.read(config))
