"""benchmarks/gpu_train.py: its plumbing with fake sides, and a nano run."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import fake_turns
import jax
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.kernels import chunked
from llama_jax.model import decoder, sizes
from llama_jax.training import flops

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_train  # noqa: E402
import gpu_train_jla  # noqa: E402
import gpu_train_ours  # noqa: E402
import gpu_train_rows as table  # noqa: E402
import gpu_train_work as work  # noqa: E402
import gpu_turn as turns  # noqa: E402
import gpu_weights  # noqa: E402

# What the machine with the GPU lacks.
ABSENT = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in {
      "tensorflow", "tensorflow_datasets", "grain", "array_record",
      "ml_collections", "orbax", "etils", "sentencepiece", "tiktoken",
      "tokenizers", "safetensors", "gguf", "tensorboardX", "matplotlib",
      "torch", "transformers",
    }:
      raise ModuleNotFoundError(f"{name} is absent in this test")

sys.meta_path.insert(0, Absent())
"""


def run(folder, *flags, absent=True):
  environment = dict(os.environ)
  if absent:
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(ABSENT)
    environment["PYTHONPATH"] = f"{folder / 'site'}{os.pathsep}{ROOT}"
  return subprocess.run(
    [
      sys.executable,
      str(ROOT / "benchmarks" / "gpu_train.py"),
      "--nano",
      f"--out={folder / 'out.json'}",
      f"--cache={folder / 'cache'}",
      *flags,
    ],
    capture_output=True,
    text=True,
    env=environment,
  )


def test_a_nano_run_needs_no_data_libraries(tmp_path):
  done = run(tmp_path, "--rows=T7", "--peer_python=", "--policy=full:2:64")
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "out.json").read_text())
  assert any("attention chunked" in line for line in found["checks"])
  row = found["rows"]["T7"]
  assert row["done"] and row["policy"]["rematerialise"] == "full"
  told = row["rounds"][0]
  assert set(told) == {"ours", "ours dense"}
  # Fresh weights guess: log(512) nats.
  assert told["ours"]["loss"][0] == pytest.approx(np.log(512), abs=0.1)
  columns = row["summary"]["columns"]
  rate = columns["ours"]["tokens_per_second"]
  assert rate == pytest.approx(4 * 64 / told["ours"]["seconds"])
  # A packed token attends to less, so that less is counted for it.
  share = [columns[n]["mfu"] / columns[n]["tokens_per_second"] for n in columns]
  assert share[0] < share[1]
  assert "T7" in done.stdout
  again = run(tmp_path, "--rows=T7", "--peer_python=", "--resume")
  assert again.returncode == 0 and "round 1" not in again.stdout
  after = json.loads((tmp_path / "out.json").read_text())
  assert after["rows"] == found["rows"]


@pytest.mark.skipif("not os.environ.get('PEER_PYTHON')")
def test_a_nano_run_beside_transformers(tmp_path):
  done = run(tmp_path, "--rows=T1", "--policy=full:2:64", absent=False)
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "out.json").read_text())
  assert "transformers masters" in found["rows"]["T1"]["summary"]["ratios"]


def make(rule, rows=("T1",), flags=()):
  settings = gpu_train.parse(
    [f"--rows={','.join(rows)}", "--rounds=2", "--peer_python=x", *flags]
  )
  named = {name: table.ROWS[name] for name in settings.rows}
  benchmark = gpu_train.Benchmark(settings, named, {}, lambda: None)
  fake = fake_turns.Turns(rule)
  benchmark.turn = fake.turn
  return benchmark, fake


def answer(side, call, arguments):
  """Ours takes 1 s, 2 s with everything recomputed; the peer takes 3 s."""
  if call == "hello":
    return {"device": "fake", "versions": {}}
  if call == "describe":
    config = dataclasses.asdict(sizes.get("nano"))
    return {"config": config, "flops_per_token": 1e9, "parameters": 1}
  if call == "rate":
    return {"flops": 1e15}
  if call == "check_attention":
    return {"errors": {"chunked, dense": [0.001] * 4, "cudnn, dense": "none"}}
  if call == "logits":
    return {}
  if call == "compare":
    return {"off": 1e-6}
  if call == "first":
    return {"loss": 6.0, "grad_norm": 1.0}
  if call == "first_step":
    return {"seconds": 12.0, "compile": 5.0}
  if call == "converge":
    loss = 3.0 + 0.004 * (arguments["spec"]["dtype"] == "float8")
    return {"loss": [9.0] * 550 + [loss] * 50}
  assert call == "train"
  if side == "ours":
    policy = arguments["policy"]
    if policy["rematerialise"] == "none" and policy["microbatch"] > 4:
      return {"fits": False}
    seconds = 2.0 if policy["rematerialise"] == "full" else 1.0
    seconds -= 0.1 * (policy["loss_chunk"] == 8192)
  else:
    variant = arguments["variant"]
    if variant["microbatch"] > 2 or variant["compile"] == "max-autotune":
      return {"fits": False}
    seconds = 3.0 - 0.5 * (variant["attention"] == "cudnn")
  return {"fits": True, "seconds": seconds, "steps": [seconds], "peak": 1e9}


def test_the_best_policy_and_variant_are_measured_in_turns():
  benchmark, fake = make(answer)
  benchmark.prepare()
  benchmark.measure("T1")
  entry = benchmark.found["rows"]["T1"]
  chosen = entry["policy"]
  assert (chosen["rematerialise"], chosen["microbatch"]) == ("none", 4)
  assert chosen["loss_chunk"] == 8192
  assert (entry["variant"]["attention"], entry["variant"]["microbatch"]) == (
    "cudnn",
    2,
  )
  summary = entry["summary"]
  assert not summary["dropped"]
  tokens = 16 * 4096
  assert summary["columns"]["ours"]["tokens_per_second"] == pytest.approx(
    tokens / 0.9
  )
  assert summary["columns"]["ours"]["mfu"] == pytest.approx(
    tokens / 0.9 * 1e9 / 989e12
  )
  assert summary["columns"]["ours"]["sol"] == pytest.approx(
    tokens / 0.9 * 1e9 / 1e15
  )
  ratio = summary["ratios"]["transformers masters"]
  assert ratio == pytest.approx(
    {"ratio": 2.5 / 0.9, "min": 2.5 / 0.9, "max": 2.5 / 0.9}
  )
  # The last of all: rounds, in which the sides take turns.
  trained = [c for c in fake.calls if c[1] == "train"][-6:]
  assert [c[0] for c in trained] == ["ours", "peer", "peer"] * 2
  assert [c[2]["variant"]["precision"] for c in trained if c[0] == "peer"] == [
    "masters",
    "bfloat16",
  ] * 2
  assert "2.78 (2.78-2.78), bar 1.25" in table.show(benchmark.found)


def test_other_rows():
  benchmark, _ = make(answer, ("T2", "T2L", "C1"))
  benchmark.prepare()
  for name in benchmark.rows:
    benchmark.measure(name)
  rows = benchmark.found["rows"]
  assert set(rows["T2"]["summary"]["columns"]) == {"ours", "ours bfloat16"}
  assert rows["T2L"]["summary"]["difference"] == pytest.approx(0.004)
  shown = table.show(benchmark.found)
  assert "less bf16: +0.0040" in shown and "warm: 12.0 s" in shown


def test_a_throttled_run_is_dropped():
  rates = iter([1e15, 0.96e15, 0.96e15])

  def rule(side, call, arguments):
    if call == "rate":
      return {"flops": next(rates)}
    return answer(side, call, arguments)

  benchmark, _ = make(rule)
  benchmark.prepare()
  benchmark.measure("T1")
  assert benchmark.found["rows"]["T1"]["summary"]["dropped"]
  assert "DROPPED" in table.show(benchmark.found)


@pytest.mark.parametrize(
  "call,wrong,said",
  (
    ("check_attention", {"errors": {"cudnn, dense": [0.5]}}, "attention cudnn"),
    ("compare", {"off": 0.01}, "logits"),
  ),
)
def test_nothing_is_timed_when_a_check_fails(call, wrong, said):
  def rule(side, asked, arguments):
    return wrong if asked == call else answer(side, asked, arguments)

  benchmark, fake = make(rule)
  with pytest.raises(errors.UserError, match=f"nothing is timed.*{said}"):
    benchmark.prepare()
  assert not [c for c in fake.calls if c[1] in ("train", "rate")]
  assert not benchmark.found.get("checked")


def test_whole_rounds_count_when_time_is_up_and_a_peer_may_fail():
  count = 0

  def rule(side, call, arguments):
    nonlocal count
    if side == "peer" and call == "train":
      return turns.Failed("no compiler")
    if call == "train" and "warmups" in arguments and arguments["warmups"] == 2:
      count += 1
      if count == 2:
        return turns.OutOfTime()
    return answer(side, call, arguments)

  benchmark, _ = make(rule)
  benchmark.prepare()
  benchmark.measure("T1")
  entry = benchmark.found["rows"]["T1"]
  assert len(entry["rounds"]) == 1 and entry["done"]
  assert entry["no_peer"] and list(entry["rounds"][0]) == ["ours"]


def test_a_resumed_run_of_other_code_is_refused():
  benchmark, _ = make(answer)
  benchmark.found["marks"] = ["another card", "code"]
  with pytest.raises(errors.UserError, match="measured on another card"):
    benchmark.prepare()


@pytest.mark.parametrize(
  "flag", ("--rows=T5", "--policy=some:4:1", "--policy=none")
)
def test_bad_flags_are_one_line(tmp_path, flag):
  done = run(tmp_path, flag)
  assert done.returncode == 2
  assert done.stderr.startswith("error: --") and done.stderr.count("\n") == 1


def test_a_worker_that_dies_or_hangs(tmp_path):
  deadline = 0.0  # in the past
  start = turns.start(
    "gpu_train_ours.py", sys.executable, tmp_path, "", deadline
  )
  with start as turn, pytest.raises(turns.OutOfTime):
    turn.ask("hello")
  deadline = time.monotonic() + 60
  start = turns.start(
    "gpu_train_ours.py", sys.executable, tmp_path, "", deadline
  )
  with start as turn, pytest.raises(turns.Failed):
    turn.end()
    turn.ask("hello")


def test_packed_rows():
  batch = work.rows(100, 8, 4096, 600, 0)
  segments, mask = batch["segments"], batch["loss_mask"]
  assert segments.min() == 1
  lengths = 8 * 4096 / segments.max(1).sum()
  assert 400 < lengths < 800  # exponential of 600, the last one cut off
  ends = segments[:, 1:] != segments[:, :-1]
  np.testing.assert_array_equal(mask[:, :-1] == 0, ends)
  np.testing.assert_array_equal(batch["positions"][:, 1:] == 0, ends)
  np.testing.assert_array_equal(
    batch["tokens"][:, 1:], batch["targets"][:, :-1]
  )
  dense = work.rows(100, 2, 64, 0, 0)
  assert flops.attention_length(dense["segments"]) == 64
  assert dense["loss_mask"].all()


@pytest.mark.parametrize("size", ("nano", "llama3.1-8b"))
def test_the_weights_are_a_whole_model(size):
  config = sizes.get(size)
  shapes = gpu_weights.shapes(dataclasses.asdict(config))
  count = sum(np.prod(shape) for shape in shapes.values())
  assert count == decoder.count_parameters(config)
  a, b = (
    gpu_weights.weight("layers.0.mlp.up.kernel", (64, 192)) for _ in range(2)
  )
  np.testing.assert_array_equal(a, b)
  assert a.std() == pytest.approx(0.02, rel=0.05)


def test_text_is_bytes_of_real_text():
  ids = work.text(5000)
  assert ids.shape == (5000,) and ids.max() < 256
  assert b"import" in bytes(ids.astype(np.uint8))


def test_a_wrong_kernel_is_found(monkeypatch):
  from llama_jax import kernels

  def off(q, k, v, **where):
    return 1.1 * chunked.attend(q, k, v, **where)

  monkeypatch.setitem(kernels.ATTENTION, "chunked", off)
  found = gpu_train_ours.Ours().check_attention(64, 4, 2, 16)["errors"]
  assert max(found["chunked, packed"]) > gpu_train.ATTENTION_TOLERANCE
  assert max(found["reference, packed"]) < gpu_train.ATTENTION_TOLERANCE
  assert "cudnn" in found["cudnn, dense"] or jax.default_backend() == "gpu"


def test_settings_of_jax_linear_attention():
  config = dataclasses.asdict(sizes.get("llama3.2-1b"))
  spec = table.ROWS["T2"].spec()
  variant = {"name": "lean", "microbatch": 4}
  asked = gpu_train_jla.settings(config, spec, variant, 11, "run")
  train, model = asked["train"], asked["model"]
  tokens = train["micro_batch_per_replica"] * train["grad_accum"]
  assert tokens * train["seq_len"] == 65536
  assert model["fp8"] == "delayed" and not model["attention"]["qk_norm"]
