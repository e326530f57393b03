"""train on a mesh, and the mistakes it tells; test_survival.py has the rest."""

import dataclasses
import pathlib

import numpy as np
import pytest

from llama_jax import errors, experiment, shell, train
from llama_jax.training import metrics as metrics_lib

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 40
TIMES = metrics_lib.CLOCKED


@pytest.fixture(scope="module")
def flags_of(nano_flags):
  """Flags of this file's run, with other knobs where they are given."""
  usual = {
    "training.steps": STEPS,
    "checkpoint.every": 8,
  }
  return lambda workdir, **knobs: nano_flags(workdir, **usual | knobs)


def rows_of(folder):
  rows = metrics_lib.read(folder / "metrics.jsonl")
  return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, flags_of, run_verbs):
  """A run on one device."""
  folder = tmp_path_factory.mktemp("whole")
  ((code, out, err),) = run_verbs(flags_of(folder))
  assert code == 0, err
  assert f"orbax:{folder}" in out
  return folder


def asked_by(flags):
  """The Experiment behind a command's flags."""
  config = shell.load_config(str(ROOT / "configs/nano.py"))
  for flag in flags[3:]:
    name, _, value = flag.removeprefix("--config.").partition("=")
    section, _, key = name.partition(".")
    old = config[section][key]
    config[section][key] = type(old)(value)
  return experiment.read(config)


def test_a_mesh_equals_one_device(whole, flags_of, tmp_path):
  """Ten steps of one run, on eight devices, within float32 noise."""
  knobs = {f"parallel.{axis}": 2 for axis in ("data", "fsdp", "tensor")}
  # Microbatches of eight rows, so that eight devices can share one; sums of
  # the same rows in another order.
  asked = asked_by(flags_of(tmp_path, **knobs))
  asked = dataclasses.replace(
    asked,
    training=dataclasses.replace(asked.training, accumulation=1),
    checkpoint=dataclasses.replace(asked.checkpoint, every=1000),
  )

  class Enough(Exception):
    pass

  # The schedule is that of the whole run; ten of them are run.
  seen = []
  add = metrics_lib.Metrics.add

  def stop_after_ten(self, step, values, known):
    seen.append(
      {name: values[name].item() for name in ("loss", "grad_norm", "scored")}
    )
    add(self, step, values, known)
    if step == 10:
      raise Enough

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(metrics_lib.Metrics, "add", stop_after_ten)
    with pytest.raises(Enough):
      train.train(asked, tmp_path, "{}")
  for ours, want in zip(seen, rows_of(whole)[:10], strict=True):
    np.testing.assert_allclose(ours["loss"], want["loss"], rtol=2e-5)
    np.testing.assert_allclose(ours["grad_norm"], want["grad_norm"], rtol=2e-4)
    assert ours["scored"] == want["scored"]


def one_line(result, *said):
  code, out, err = result
  assert code == 2, err
  assert err.startswith("error: ") and err.count("\n") == 1, err
  for words in said:
    assert words in err, err
  assert "Traceback" not in out + err


def test_mistakes_end_in_one_line(run_verbs, flags_of, tmp_path):
  missing = ["llama_jax.train", *flags_of("")[1:2]]
  cases = {
    "misspelt": (
      [*flags_of(tmp_path / "w"), "--config.optimizer.peak_rl=1"],
      ("--config.optimizer.peak_rl", "nearest", "--config.optimizer.peak_lr"),
    ),
    "not a number": (
      flags_of(tmp_path / "w", **{"training.steps": "many"}),
      ("training.steps", "many"),
    ),
    "mesh": (
      [*flags_of(tmp_path / "w", **{"parallel.tensor": 4}), "--cpu_devices=8"],
      ("parallel.tensor=4", "model.num_kv_heads=2", "1, 2"),
    ),
    "mesh of too many": (
      flags_of(tmp_path / "w", **{"parallel.data": 3}),
      ("parallel.data=3", "need 3 devices and there are 1"),
    ),
    "no workdir": (missing, ("--workdir",)),
    "no config": (
      ["llama_jax.train", f"--workdir={tmp_path / 'w'}"],
      ("--config",),
    ),
    "config file": (
      ["llama_jax.train", "--config=configs/none.py", "--workdir=w"],
      ("configs/none.py",),
    ),
    "no text": (
      flags_of(tmp_path / "w", **{"data.text": tmp_path / "nope"}),
      ("data.text", "nope does not exist"),
    ),
    "too little text": (
      flags_of(
        tmp_path / "w",
        **{"training.batch_size": 4096, "training.accumulation": 1},
      ),
      ("training.batch_size=4096",),
    ),
    "no model": (
      flags_of(tmp_path / "w", **{"model.size": ""}),
      ("--config.init", "--config.model.size"),
    ),
    "too long": (
      flags_of(tmp_path / "w", **{"data.sequence_length": 1024}),
      ("data.sequence_length=1024", "256"),
    ),
    "a stray word": (
      [*flags_of(tmp_path / "w"), "steps=3"],
      ("'steps=3' is not a flag",),
    ),
  }
  results = run_verbs(*(command for command, _ in cases.values()))
  for (name, (_, said)), result in zip(cases.items(), results, strict=True):
    print(name)
    one_line(result, *said)
  assert not (tmp_path / "w" / "checkpoints").exists()


def test_another_model_in_the_same_folder_is_refused(whole, flags_of):
  flags = flags_of(whole, **{"model.size": "smollm2-135m"})
  with pytest.raises(errors.ConfigError, match="smollm2-135m is not the size"):
    train.train(asked_by(flags), whole, "{}")
