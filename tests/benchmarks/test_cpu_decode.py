"""benchmarks/cpu_decode.py: its plumbing, with fake sides, and our worker."""

import json
import pathlib
import sys
import time

import numpy as np
import pytest

from llama_jax import errors
from llama_jax.checkpoint import gguf

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cpu_decode  # noqa: E402
import cpu_decode_llama  # noqa: E402
import cpu_decode_ours  # noqa: E402
import cpu_decode_peer  # noqa: E402
import cpu_report  # noqa: E402
import cpu_side  # noqa: E402
import fake_side  # noqa: E402

PLAN = cpu_decode.Plan(rounds=2, check=8)
# What each fake pretends to be, beside what a test says.
SIDES = {
  "ours": {"lossy": 0.01},
  "peer": {"slowness": 4.0},
  "llama": {
    "slowness": 0.5,
    "lossy": 0.5,
    "ways": ["float32 cache", "float16 cache"],
    "cache_itemsize": 2,
  },
}


def make(folder, *sides, **changes):
  scripts = {}
  for side in sides:
    settings = SIDES[side] | changes.get(side, {})
    script = fake_side.write(folder / f"{side}.py", **settings)
    scripts[side] = (sys.executable, script)
  return cpu_decode.Benchmark(
    PLAN, "random:nano", scripts, folder, lambda line: None
  )


def test_every_part_becomes_rows_with_the_right_ratios(tmp_path):
  benchmark = make(tmp_path, "ours", "peer", "llama")
  benchmark.run(cpu_decode.PARTS)
  result = cpu_decode.report(benchmark, cpu_report.describe_machine(), {}, 1.0)
  cpu_report.write(result, tmp_path / "cpu_decode.json")
  result = json.loads((tmp_path / "cpu_decode.json").read_text())
  rows = {row["name"]: row for row in result["rows"]}
  # Every bar of the issue meets a row of the default plan.
  assert set(cpu_decode.BARS) <= set(rows)
  decode = rows["decode at 1 x 512"]
  # 64 tokens after the first in a second, and all variants there.
  assert set(decode["rounds"]) == set(cpu_decode.VARIANTS)
  assert decode["rounds"]["ours float32"] == [64.0, 64.0]
  found = {
    (one["over"], one["under"]): (one["ratio"], one["bar"], one["reached"])
    for one in decode["ratios"]
  }
  assert found == {
    ("ours float32", "transformers float32"): (4.0, 2.7, True),
    ("ours float32", "llama.cpp F32"): (0.5, 0.85, False),
    ("ours int8", "ours float32"): (2.0, 1.25, True),
    ("ours int8", "llama.cpp Q8_0"): (0.5, 0.5, True),
  }
  assert rows["decode at 8 x 512"]["median"]["transformers float32"] == 128
  assert rows["first token at 1 x 512"]["median"]["llama.cpp F32"] == 0.5
  # 8 bits are not asked for mixed requests.
  mixed = rows["64 mixed requests"]
  assert set(mixed["rounds"]) == set(cpu_decode.MIXED)
  asked = sum(benchmark._requests()[1])
  assert mixed["median"]["transformers float32"] == asked / 4
  memory = rows["peak memory, decode at 1 x 512"]
  assert memory["median"]["transformers float32"] == 4.0
  # By hand: 384 weights and 544 tokens of 8 numbers in the mean, of the best
  # copy rate of all, 10 GB/s.
  share = rows["bandwidth, decode at 1 x 512"]["median"]
  assert share["ours float32"] == pytest.approx(
    (384 * 4 + 544 * 8 * 4) * 64 / 10e9
  )
  assert share["llama.cpp Q8_0"] == pytest.approx(
    (384 * 34 / 32 + 544 * 8 * 2) * 256 / 10e9
  )
  assert set(result["waiting"]["64 mixed requests"]) == {
    "ours",
    "peer",
    "llama",
  }
  assert any("int8 on held-out" in line for line in result["checks"])
  lines = cpu_decode.table(result).splitlines()
  (line,) = (
    line
    for line in lines
    if line.startswith("decode at 1 x 512") and "/ llama.cpp F32" in line
  )
  assert "0.50" in line and ">= 0.85" in line and line.endswith("missed")


def test_a_side_that_is_not_there_leaves_its_cells_empty(tmp_path):
  benchmark = make(tmp_path, "ours", "llama")
  benchmark.run(("decode",))
  result = cpu_decode.report(benchmark, {}, {}, 1.0)
  assert result["notes"][0] == "transformers is left out: no --peer_python."
  for row in result["rows"]:
    assert "transformers float32" not in row["median"]
    assert {one["under"] for one in row["ratios"]} <= set(row["median"])
  line = next(
    line
    for line in cpu_decode.table(result).splitlines()
    if line.startswith("decode at 8 x 512")
  )
  # Ours, nothing, and llama.cpp's.
  assert line.split()[-5:] == ["512", "-", "1,024", "1,024", "2,048"]


@pytest.mark.parametrize(
  "changes,said",
  (
    ({"peer": {"offset": 0.01}}, "logits of transformers"),
    # As much as a cache in float16 may be off, and is here.
    ({"llama": {"offset": 0.03}}, "logits of llama.cpp, float32 cache"),
    ({"ours": {"lossy": 0.03}}, "loss of ours int8"),
  ),
)
def test_sides_that_differ_are_not_timed(tmp_path, changes, said):
  with pytest.raises(errors.UserError, match=f"nothing is timed: {said}"):
    make(tmp_path, "ours", "peer", "llama", **changes)


def test_what_a_waiting_side_uses_is_seen(tmp_path):
  script = fake_side.write(tmp_path / "busy.py")
  spin = "import threading\ndef spin():\n  while True: pass\n"
  start = "threading.Thread(target=spin, daemon=True).start()\n"
  script.write_text(spin + start + script.read_text())
  with cpu_side.start_worker(sys.executable, script) as worker:
    worker.ask("hello")
    before = worker.cpu_seconds()
    deadline = time.monotonic() + 20
    while worker.cpu_seconds() < before + 0.05:
      assert time.monotonic() < deadline
      time.sleep(0.01)


@pytest.fixture(scope="module")
def ours():
  made = cpu_decode_ours.Ours()
  made.load("random:nano")
  return made


def test_our_worker_answers_mixed_requests_as_if_alone(ours):
  text = ours.text(60)["ids"]
  prompts, news = [text[:20], text[20:25], text[25:60]], [9, 4, 6]
  answer = ours.mixed(prompts, news, "float32")
  assert answer["seconds"] > 0
  for prompt, new, tokens in zip(prompts, news, answer["tokens"], strict=True):
    assert ours.decode([prompt], new, "float32")["tokens"] == [tokens]


def test_our_workers_loss_is_that_of_its_logits(ours, tmp_path):
  ids = np.reshape(ours.heldout(48)["ids"], (2, 24))
  ours.logits(ids.tolist(), str(tmp_path / "logits.npy"))
  logits = np.load(tmp_path / "logits.npy").astype(np.float64)
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  chosen = np.take_along_axis(logprobs[:, :-1], ids[:, 1:, None], -1)
  losses = {
    dtype: ours.loss(ids.tolist(), dtype)["loss"]
    for dtype in ("float32", "int8")
  }
  # Sums of 64 float32 products in another order.
  assert losses["float32"] == pytest.approx(-chosen.mean(), abs=1e-5)
  # It is another path, and a near one.
  assert 0 < abs(losses["int8"] - losses["float32"]) < 0.02


def test_our_worker_exports_what_llama_cpp_reads(ours, tmp_path):
  ours.export_gguf(str(tmp_path / "gguf"))
  files = {name: tmp_path / "gguf" / name for name in ("f32.gguf", "q8_0.gguf")}
  assert set(cpu_decode_llama.FILES.values()) == set(files)
  exact, rounded = (gguf.read(file)[1] for file in files.values())
  want = ours._llamas["float32"].params["embed"]["embedding"]
  np.testing.assert_array_equal(exact["embed"]["embedding"], want)
  # To 8 bits of the largest of a block of 32.
  off = np.abs(np.asarray(rounded["embed"]["embedding"]) - want).max()
  assert 0 < off <= np.abs(want).max() / 127


def following(tokens):
  return (sum(tokens) + 7 * len(tokens)) % 101


class Following:
  """Stands for llama.cpp: each token follows from all before it."""

  def __init__(self):
    self.kept = {}
    self.most = 0

  def clear(self):
    self.kept = {}

  def forget(self, sequence):
    del self.kept[sequence]

  def read(self, sequence, tokens):
    assert sequence not in self.kept
    self.kept[sequence] = list(tokens)
    return following(tokens)

  def draw(self, lasts):
    self.most = max(self.most, len(lasts))
    for token, position, sequence in lasts:
      assert len(self.kept[sequence]) == position
      self.kept[sequence].append(token)
    return [following(self.kept[sequence]) for *_, sequence in lasts]


def alone(prompt, new):
  tokens = list(prompt)
  for _ in range(new):
    tokens.append(following(tokens))
  return tokens[len(prompt) :]


def test_llama_cpp_serves_each_request_as_if_alone():
  context = Following()
  rng = np.random.default_rng(0)
  prompts = [
    rng.integers(0, 99, size).tolist() for size in rng.integers(1, 9, 70)
  ]
  news = rng.integers(1, 9, 70).tolist()
  tokens, _ = cpu_decode_llama.serve(context, prompts, news)
  assert tokens == [alone(*one) for one in zip(prompts, news, strict=True)]
  assert context.most == cpu_decode_llama.AT_ONCE and not context.kept


@pytest.mark.parametrize("way", cpu_decode_peer.WAYS)
def test_transformers_batches_give_each_request_its_own(way, monkeypatch):
  peer = cpu_decode_peer.Peer()
  batches = []

  def generate(ids, new, precision, cache, mask):
    batches.append(new)
    rows = [
      [token for token, real in zip(*row, strict=True) if real]
      for row in zip(ids, mask, strict=True)
    ]
    return [alone(row, new) for row in rows], [0.0, 1.0, 2.0]

  monkeypatch.setattr(peer, "_generate", generate)
  prompts = [[i] * (1 + i % 5) for i in range(20)]
  news = [1 + (7 * i) % 20 for i in range(20)]
  answer = peer._mixed(prompts, news, way)
  want = [alone(*one) for one in zip(prompts, news, strict=True)]
  assert answer["tokens"] == want
  assert answer["seconds"] == 2.0 * len(batches) == 6.0
  if "length" in way[0]:
    assert batches == [8, 16, 20]
