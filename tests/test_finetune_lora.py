"""LoRA as verbs: trained, gone on with, and read as a whole model."""

import pathlib

import finetuning
import numpy as np
import pytest
import safetensors.numpy

from llama_jax import checkpoint, compatibility, experiment, shell
from llama_jax.training import metrics

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = f"{ROOT}/configs/finetune/lora.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return finetuning.write_data(tmp_path_factory.mktemp("data"))


def command(kind, base, data, workdir, **knobs):
  usual = {
    "training.batch_size": 2,
    "lora.rank": 4,
    "optimizer.peak_lr": 1e-2,
  }
  return finetuning.command(
    f"lora:{kind}", base, data, workdir, **usual | knobs
  )


def test_trained_resumed_and_read_as_a_whole(run_verbs, nano, data, tmp_path):
  """The schedule is flat, so that a run cut in two equals a whole one."""
  knobs = {"optimizer.schedule": "constant", "checkpoint.keep": 2}
  base, one, two = f"hf:{nano}", tmp_path / "one", tmp_path / "two"
  whole, _, again, other, replay = run_verbs(
    command("llama2_sft", base, data, one, **knobs),
    command("llama2_sft", base, data, two, **knobs, **{"training.steps": 3}),
    command("llama2_sft", base, data, two, **knobs),
    command("llama2_sft", base, data, two, **knobs, **{"lora.rank": 8}),
    ["llama_jax.train", f"--workdir={one}", "--replay=5"],
  )
  assert whole[0] == again[0] == 0, whole[2] + again[2]
  assert "donated" not in whole[2]
  assert "adapters   " in whole[1] and "beside a base in bfloat16" in whole[1]
  rows, resumed = (metrics.read(f / "metrics.jsonl") for f in (one, two))
  assert [r["gradient_hash"] for r in rows] == [
    r["gradient_hash"] for r in resumed
  ]
  assert rows[-1]["heldout_loss"] < rows[2]["heldout_loss"]
  assert rows[-1]["loss"] < rows[0]["loss"]
  assert other[0] == 2 and "rank=8" in other[2] and "rank=4" in other[2]
  assert replay[0] == 0 and '"same": true' in replay[1], replay

  # All but the projections are the base's.
  _, source = checkpoint.open_tensors(f"orbax:{one}")
  before = safetensors.numpy.load_file(nano / "model.safetensors")
  for name, weight in before.items():
    same = source.get(name).tobytes() == weight.tobytes()
    assert same != ("_proj" in name), name
  ckpt = f"--ckpt=orbax:{one}"
  spoken, written, base_says = run_verbs(
    ["llama_jax.generate", ckpt, "--prompt=red", "--max_new_tokens=4"],
    ["llama_jax.convert", f"--src=orbax:{one}", f"--dst=peft:{tmp_path}/peft"],
    [
      "llama_jax.generate",
      f"--ckpt={base}",
      "--prompt=red",
      "--max_new_tokens=4",
    ],
  )
  assert spoken[0] == written[0] == 0, spoken[2] + written[2]
  assert spoken[1] != base_says[1]
  assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_rewards_and_preferences(run_verbs, nano, data, tmp_path):
  """A base in int8; then a reward model upon a reward model's own base."""
  base = f"hf:{nano}"
  int8 = {"lora.base_dtype": "int8"}
  live = int8 | {"objective.reference": "live"}
  names = ("cached", "live", "reward", "upon")
  cached, lived, reward, upon = run_verbs(
    command("llama3_dpo", base, data, tmp_path / "cached", **int8),
    command("llama3_dpo", base, data, tmp_path / "live", **live),
    command("llama2_reward", base, data, tmp_path / "reward", **int8),
    command(
      "llama2_reward", f"orbax:{tmp_path}/reward", data, tmp_path / "upon"
    ),
  )
  for code, out, err in (cached, lived, reward, upon):
    assert code == 0, out + err
  rows = {n: metrics.read(tmp_path / n / "metrics.jsonl") for n in names}
  for name in ("cached", "live"):
    # The base is the reference: no margin at first.
    assert rows[name][0]["margin"] == pytest.approx(0, abs=1e-4)
    assert rows[name][-1]["heldout/margin"] > 0
  np.testing.assert_allclose(
    rows["cached"][-1]["loss"], rows["live"][-1]["loss"], rtol=1e-3
  )
  assert rows["reward"][-1]["heldout/accuracy"] > 0.9
  # It goes on from what the first has learned, score and all.
  assert rows["upon"][0]["accuracy"] > 0.9
  before, after = (
    checkpoint.load(f"orbax:{tmp_path}/{n}").params["score"]["kernel"]
    for n in ("reward", "upon")
  )
  assert np.abs(before - after).max() < 0.2 * np.abs(before).max()


def test_what_does_not_go_together_is_refused():
  config = shell.load_config(RECIPE)
  config.init, config.data.text = "hf:DIR", "FILE"
  compatibility.check(experiment.read(config))
  cases = (
    ({"init": ""}, "--config.init=REF"),
    ({"model.vocab_size": 600}, "model.vocab_size=600"),
    ({"lora.base_dtype": "int8", "model.dtype": "float8"}, "float8"),
    ({"lora.targets": ("head",)}, r"lora\.targets="),
  )
  for knobs, message in cases:
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(knobs)
    with pytest.raises(ValueError, match=message):
      compatibility.check(experiment.read(changed))
