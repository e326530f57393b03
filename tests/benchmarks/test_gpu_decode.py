"""benchmarks/gpu_decode.py: with fake sides, in-process, and a nano run."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import fake_turns
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.kernels import paged
from llama_jax.model import sizes
from llama_jax.training import flops

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_decode  # noqa: E402
import gpu_decode_ours  # noqa: E402
import gpu_decode_rows as table  # noqa: E402
import gpu_decode_work as work  # noqa: E402
import gpu_turn as turns  # noqa: E402

# What it must not need: other libraries, and other rooms of the package.
ABSENT = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in {
      "tensorflow", "tensorflow_datasets", "grain", "array_record", "optax",
      "ml_collections", "orbax", "etils", "sentencepiece", "tiktoken",
      "tokenizers", "safetensors", "gguf", "tensorboardX", "matplotlib",
      "torch", "transformers",
    } or name.startswith(tuple(f"llama_jax.{room}" for room in (
      "checkpoint", "data", "evals", "objectives", "text", "training", "llama",
    ))):
      raise ModuleNotFoundError(f"{name} is absent in this test")

sys.meta_path.insert(0, Absent())
"""


def run(folder, *flags, absent=True):
  environment = dict(os.environ)
  if absent:
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(ABSENT)
    environment["PYTHONPATH"] = f"{folder / 'site'}{os.pathsep}{ROOT}"
  done = subprocess.run(
    [
      sys.executable,
      str(ROOT / "benchmarks" / "gpu_decode.py"),
      "--nano",
      f"--out={folder / 'out.json'}",
      f"--cache={folder / 'cache'}",
      *flags,
    ],
    capture_output=True,
    text=True,
    env=environment,
  )
  assert done.returncode == 0, done.stderr
  return json.loads((folder / "out.json").read_text()), done.stdout


def test_a_nano_run_needs_no_other_library(tmp_path):
  found, shown = run(
    tmp_path, "--rows=D1", "--peer_python=", "--variant=paged:merged"
  )
  row = found["rows"]["D1"]
  assert row["done"] and "not given" in row["no_peer"]
  told = row["rounds"][0]["ours"]
  assert told["kernel"] == "gather" and len(told["steps"]) == 1
  column = row["summary"]["columns"]["ours"]
  assert column["tokens_per_second"] == pytest.approx(1 / told["seconds"])
  # A layer of 64 x (6 heads of 24, twice) and 3 x 64 x 192, and the head.
  weights = 2 * (2 * 64 * 24 * (4 + 2) + 3 * 64 * 192 + 64 * 512)
  cache = 24 * 2 * 2 * 2 * 24
  rate = np.mean(list(row["rates"].values()))
  assert column["mbu"] == pytest.approx(
    (weights + cache) / told["seconds"] / rate
  )
  checks = "\n".join(found["checks"])
  for said in (
    "paged kernel gather, 4 tokens",
    "pallas: not here",
    "greedy tokens, float32 paged merged, under our plain forward",
    "KL of int8",
  ):
    assert said in checks
  assert "D1" in shown


def make(rule, rows=("D1",), flags=(), found=None):
  settings = gpu_decode.parse(
    [f"--rows={','.join(rows)}", "--rounds=2", "--peer_python=x", *flags]
  )
  named = {name: table.ROWS[name] for name in settings.rows}
  if settings.nano:
    named = table.nano(named)
  found = {} if found is None else found
  benchmark = gpu_decode.Benchmark(settings, named, found, lambda: None)
  fake = fake_turns.Turns(rule)
  benchmark.turn = fake.turn
  return benchmark, fake


def test_other_kinds_of_rows_in_this_process():
  benchmark, _ = make(
    fake_turns.here(gpu_decode_ours.Ours()),
    ("D5", "D6", "P1-1B"),
    ("--nano", "--rounds=1", "--peer_python=", "--variant=static:merged"),
    # The nano run has these.
    {"checked": True, "checks": [], "rows": {"D6": {"kl": {"mean": 1e-4}}}},
  )
  benchmark.prepare()
  for name in benchmark.rows:
    benchmark.measure(name)
  rows = benchmark.found["rows"]
  assert all(row["done"] for row in rows.values())
  assert set(rows["D6"]["summary"]["columns"]) == {"ours", "ours bfloat16"}
  answers = rows["D5"]["rounds"][0]["ours"]["tokens"]
  assert answers == benchmark.found["models"]["D5"]["tokens"]
  assert "sol" in rows["P1-1B"]["summary"]["columns"]["ours"]
  gathered = gpu_decode_ours.Ours().decode(
    rows["D6"]["spec"] | {"rows": 2, "dtype": "bfloat16"},
    {"cache": "gather", "merged": False},
    new=8,
    per_call=4,
    warmups=0,
    repeats=1,
  )
  assert gathered["fits"] and gathered["kernel"] == "gather"


@pytest.mark.skipif("not os.environ.get('PEER_PYTHON')")
def test_a_nano_run_beside_transformers(tmp_path):
  rows = ("D4-1B", "D5", "P1-1B")
  found, _ = run(
    tmp_path, f"--rows={','.join(rows)}", "--variant=static", absent=False
  )
  assert "under transformers" in "\n".join(found["checks"])
  for name in rows:
    assert "transformers" in found["rows"][name]["summary"]["ratios"]


def answer(side, call, arguments):
  """Ours takes 2 ms, 1 ms from pages, and 30 % less merged; the peer 3 ms."""
  if call == "hello":
    return {"device": "NVIDIA H100 80GB HBM3", "versions": {}}
  if call == "describe":
    return gpu_decode_ours.Ours().describe(arguments["spec"])
  if call == "rate":
    return {"rate": 2e12}
  if call == "check_paged":
    return {"errors": {"gather, 1 tokens": 0.003, "ragged": "no TPU"}}
  if call == "greedy" and side == "peer":
    return {"short": [0.0]}
  if call == "greedy":
    return {"ways": ["float32 static"], "short": [1e-6], "different": 9}
  if call == "logits":
    return {}
  if call == "compare":
    return {"off": 1e-5}
  if call == "kl":
    return {"mean": 2e-4, "max": 1e-3}
  seconds = 3e-3
  variant = arguments["variant"]
  if side == "ours":
    seconds = 1e-3 if variant.get("cache") == "paged" else 2e-3
    seconds *= 0.7 if variant["merged"] else 1.0
    seconds *= 0.5 if arguments["spec"]["dtype"] == "int8" else 1.0
  elif variant["compile"] == "max-autotune":
    return {"fits": False}
  else:
    seconds -= 5e-4 * (variant["attention"] == "eager")
  told = {"fits": True, "seconds": seconds, "steps": [seconds], "peak": 1e9}
  return told | {"tokens": 100}


def test_the_fastest_variants_are_measured_in_turns():
  benchmark, fake = make(answer, ("D1", "D2"))
  benchmark.prepare()
  benchmark.measure("D1")
  tried = len(fake.calls)
  entry = benchmark.found["rows"]["D1"]
  chosen = benchmark.found["chosen"]
  ours = chosen["ours decode 1 bfloat16"]
  assert (ours["cache"], ours["merged"], ours["flags"]) == ("paged", True, "")
  peer = chosen["peer decode 1 bfloat16"]
  assert peer == {"attention": "eager", "compile": "reduce-overhead"}
  # Flags are tried in a process of their own.
  assert ("ours", table.GRAPHS) in fake.flags
  summary = entry["summary"]
  column = summary["columns"]["ours"]
  assert column["tokens_per_second"] == pytest.approx(1 / 0.7e-3)
  read = 2 * flops.matmul_weights(sizes.get("llama3.2-1b")) + 1024 * 32768
  assert column["mbu"] == pytest.approx(read / 0.7e-3 / 2e12)
  assert column["floor"] == pytest.approx(read / 0.7e-3 / 3e12)
  ratio = summary["ratios"]["transformers"]
  assert ratio["ratio"] == ratio["min"] == pytest.approx(2.5 / 0.7)
  timed = [c for c in fake.calls if c[1] == "decode"][-4:]
  assert [c[0] for c in timed] == ["ours", "peer"] * 2
  shown = table.show(benchmark.found)
  assert "3.57 (3.57-3.57), bar 1.3" in shown and "bar of mbu 65%" in shown
  # Another size is decoded as the first was: two rounds, and rates.
  benchmark.measure("D2")
  assert [c[1] for c in fake.calls[tried:]].count("decode") == 4


def test_int8_beside_our_bfloat16_and_the_engine_beside_a_full_batch():
  benchmark, fake = make(answer, ("D4-1B", "D5", "D6"))
  benchmark.prepare()
  for name in benchmark.rows:
    benchmark.measure(name)
  rows = benchmark.found["rows"]
  assert rows["D6"]["summary"]["ratios"]["ours bfloat16"][
    "ratio"
  ] == pytest.approx(2)
  assert set(rows["D6"]["summary"]["columns"]) == {"ours", "ours bfloat16"}
  (engine, *_) = [
    c[2]["variant"] for c in fake.calls if c[:2] == ("ours", "batching")
  ]
  assert engine["attention"] == "auto" and engine["merged"]
  peers = [c[2] for c in fake.calls if c[:2] == ("peer", "batching")]
  assert [one["count"] for one in peers[:3]] == [64] * 3
  assert [one["count"] for one in peers[3:]] == [256] * 2
  shown = table.show(benchmark.found)
  assert "KL of int8 from bfloat16: 2.0e-04" in shown
  assert "of D4-1B's rate" in shown


@pytest.mark.parametrize(
  "asked, wrong, said",
  (
    (
      "ours check_paged",
      {"errors": {"pallas, 1 tokens": 0.5}},
      "kernel pallas",
    ),
    ("ours check_paged", {"errors": {"gather": math.nan}}, "kernel gather"),
    (
      "ours greedy",
      {"ways": ["bfloat16 paged"], "short": [0.2], "different": 9},
      "bfloat16 paged, under our plain",
    ),
    ("peer greedy", {"short": [0.01]}, "under transformers"),
    ("peer compare", {"off": 0.01}, "logits"),
    ("ours kl", {"mean": 0.1, "max": 1.0}, "KL of int8"),
  ),
)
def test_nothing_is_timed_when_a_check_fails(asked, wrong, said):
  def rule(side, call, arguments):
    return wrong if asked == f"{side} {call}" else answer(side, call, arguments)

  benchmark, fake = make(rule)
  with pytest.raises(errors.UserError, match=f"nothing is timed.*{said}"):
    benchmark.prepare()
  assert not [c for c in fake.calls if c[1] in ("decode", "rate")]
  assert not benchmark.found.get("checked")


def test_a_peer_that_fails_leaves_ours_alone():
  def rule(side, call, arguments):
    if side == "peer" and call == "decode":
      return turns.Failed("no compiler")
    return answer(side, call, arguments)

  benchmark, _ = make(rule)
  benchmark.prepare()
  benchmark.measure("D1")
  entry = benchmark.found["rows"]["D1"]
  assert entry["no_peer"] and list(entry["rounds"][0]) == ["ours"]


@pytest.mark.parametrize(
  "flag, said",
  (
    ("--rows=D9", "--rows=D9"),
    ("--variant=fast", "CACHE one of static"),
    ("--variant=paged:quick", "CACHE one of static"),
  ),
)
def test_bad_flags(flag, said):
  with pytest.raises(errors.UserError, match=said):
    gpu_decode.parse([flag])


def test_flags():
  settings = gpu_decode.parse(["--rows=D4,P1-8B", "--variant=gather:graphs"])
  assert settings.rows == ["D4-1B", "D4-3B", "D4-8B", "P1-8B"]
  assert settings.variant == {
    "cache": "gather",
    "merged": False,
    "flags": table.GRAPHS,
  }


# BENCHMARKS.md: milliseconds of a token at batch 1, and thousands of tokens a
# second at batch 64, with 1,024 tokens in the cache, on an H100.
@pytest.mark.parametrize(
  "size, alone, together",
  (
    ("llama3.2-1b", 0.84, 41.6),
    ("llama3.2-3b", 2.18, 13.8),
    ("llama3.1-8b", 5.05, 8.1),
  ),
)
def test_floors(size, alone, together):
  config = dataclasses.asdict(sizes.get(size))
  rate = dict(table.FLOOR_RATES)["NVIDIA H100"]

  def seconds(rows):
    cache = rows * 1024 * work.token_bytes(config)
    return (work.weight_bytes(config)["bfloat16"] + cache) / rate

  assert seconds(1) * 1e3 == pytest.approx(alone, abs=0.005)
  assert 64 / seconds(64) / 1e3 == pytest.approx(together, abs=0.05)


@pytest.mark.parametrize("size", ("llama3.2-1b", "llama3.1-8b"))
def test_counts_are_those_of_training(size):
  """A forward pass is a third of a step, the head but once."""
  config = sizes.get(size)
  length = 2048
  whole = flops.per_token(config, length) / 3 * length
  heads = 2 * (length - 1) * config.embed_dim * config.vocab_size
  assert work.prefill_flops(
    dataclasses.asdict(config), length
  ) == pytest.approx(whole - heads)


def test_requests_differ_by_seed_in_their_words_alone():
  asked = work.requests(100, 50, (4, 24), (2, 8), 0)
  other = work.requests(100, 50, (4, 24), (2, 8), 1)
  shape = [(len(prompt), new) for prompt, new in asked]
  assert shape == [(len(prompt), new) for prompt, new in other]
  assert asked[0][0] != other[0][0]
  lengths, new = zip(*shape, strict=True)
  assert (min(lengths), max(lengths)) == (4, 24)
  assert (min(new), max(new)) == (2, 8)


def test_short_of_best():
  """By hand: the second row takes the runner-up once."""
  logits = np.zeros((2, 4, 3))
  logits[:, 1] = [1.0, 3.0, 0.0]
  logits[:, 2] = [2.0, 0.5, 0.0]
  ids = np.array([[0, 2, 1, 0], [0, 2, 1, 1]])
  spread = logits[:, 1:3].std()
  assert work.short_of_best(logits, ids, 2) == pytest.approx([0, 1.5 / spread])


def test_a_wrong_kernel_is_found(monkeypatch):
  right = paged.attend

  def off(q_BTNH, *rest, **where):
    return right(1.2 * q_BTNH, *rest, **where)

  ours = gpu_decode_ours.Ours()
  found = ours.check_paged(4, 2, 16)["errors"]
  assert found["gather, 1 tokens"] < gpu_decode.PAGED_TOLERANCE
  assert "GPU" in found["pallas"] and "TPU" in found["ragged"]
  monkeypatch.setattr(paged, "attend", off)
  found = ours.check_paged(4, 2, 16)["errors"]
  assert found["gather, 4 tokens"] > gpu_decode.PAGED_TOLERANCE
