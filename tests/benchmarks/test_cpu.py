"""benchmarks/cpu.py: its plumbing, with fake sides, and our own worker."""

import json
import os
import pathlib
import sys

import numpy as np
import pytest

from llama_jax import errors

ROOT = pathlib.Path(__file__).parents[2]
FAKE = pathlib.Path(__file__).with_name("fake_side.py")
sys.path.insert(0, str(ROOT / "benchmarks"))

import cpu  # noqa: E402
import cpu_ours  # noqa: E402
import cpu_report  # noqa: E402
import cpu_side  # noqa: E402
import fake_side  # noqa: E402

PLAN = cpu.Plan(rounds=2, warmups=1, start_rounds=1, check=8)
NANO_OPTIMIZER = cpu.OPTIMIZER | {"peak_lr": 1e-2}


def make(folder, peer):
  sides = {"ours": (sys.executable, FAKE), "peer": (sys.executable, peer)}
  return cpu.Benchmark(PLAN, "random:nano", sides, folder, lambda line: None)


def test_every_part_becomes_rows_with_the_right_ratios(tmp_path):
  benchmark = make(
    tmp_path, fake_side.write(tmp_path / "peer.py", slowness=4.0)
  )
  benchmark.run(cpu.PARTS)
  result = cpu.report(benchmark, cpu_report.describe_machine(), {}, 1.0)
  cpu_report.write(result, tmp_path / "new" / "cpu.json")
  result = json.loads((tmp_path / "new" / "cpu.json").read_text())
  rows = {row["name"]: row for row in result["rows"]}
  # Every bar of the issue meets a row of the default plan.
  assert set(cpu.BARS) <= set(rows)
  # 4 x 512 tokens a second against the same in four seconds.
  training = rows["train 4 x 512"]
  assert training["rounds"]["ours float32"] == [2048.0, 2048.0]
  assert training["ratio"] == {"ratio": 4.0, "min": 4.0, "max": 4.0}
  # The peer's bfloat16 takes half of its time.
  assert training["ratio_bfloat16"]["float32"]["ratio"] == 2.0
  assert rows["decode at 8 x 512"]["median"]["peer float32"] == 8 * 128 / 4
  # Lower is better: ours over theirs.
  assert rows["peak memory 4 x 512"]["ratio"]["ratio"] == 0.25
  assert rows["import"]["better"] == "lower"
  # A compile is compared with our own cold one.
  assert rows["compile decoding"]["baseline"] == "cold"
  assert rows["compile decoding"]["ratio"]["ratio"] == 1.0
  assert len(result["rates"]) == 2
  assert result["config_hash"] == cpu_report.hash_config(fake_side.CONFIG)
  lines = cpu.table(result).splitlines()
  assert len(lines) == 1 + len(rows)
  (line,) = (line for line in lines if line.startswith("train 4 x 512"))
  assert "4.00 (4.00-4.00)" in line and ">= 1.7" in line and ">= 0.9" in line
  assert "copy, GB/s" in cpu_report.rates_table(result["rates"])


def test_sides_that_differ_are_not_timed(tmp_path):
  peer = fake_side.write(tmp_path / "peer.py", offset=0.01)
  with pytest.raises(errors.UserError, match="nothing is timed: logits"):
    make(tmp_path, peer)


def test_a_worker_that_dies_says_why(tmp_path, capsys):
  script = tmp_path / "dead.py"
  script.write_text("raise SystemExit('no torch here')")
  with pytest.raises(errors.UserError, match="dead failed in hello"):
    make(tmp_path, script)
  assert "no torch here" in capsys.readouterr().err


def test_a_peer_that_is_not_there_is_one_line(tmp_path):
  with (
    pytest.raises(errors.UserError, match="--peer_python"),
    cpu_side.start_worker(str(tmp_path / "python"), FAKE),
  ):
    pass


def test_our_worker_computes_what_it_times(tmp_path):
  ours = cpu_ours.Ours()
  ours.load("random:nano")
  ids = np.reshape(ours.text(32)["ids"], (2, 16)).tolist()
  answer = ours.decode(ids, 9, "float32")
  assert [len(row) for row in answer["tokens"]] == [9, 9]
  assert answer["first"] > 0 and answer["rest"] > 0
  # Greedy: each token is the best after those before it.
  whole = [row + new for row, new in zip(ids, answer["tokens"], strict=True)]
  ours.logits(whole, str(tmp_path / "logits.npy"))
  best = np.load(tmp_path / "logits.npy").argmax(-1)
  assert best[:, 15:-1].tolist() == answer["tokens"]
  ours.start_training(NANO_OPTIMIZER)
  losses = [ours.train_step(ids, "float32")["loss"] for _ in range(3)]
  # Fresh weights guess: log(512) = 6.24 nats, then the rows are learnt.
  assert losses[0] == pytest.approx(np.log(512), abs=0.3)
  assert losses[2] < losses[0]


def test_our_worker_answers_over_its_pipes(tmp_path):
  script = ROOT / "benchmarks" / "cpu_ours.py"
  with cpu_side.start_worker(sys.executable, script) as worker:
    answer = worker.ask(
      "speak",
      weights="random:nano",
      ids=[[1, 2, 3]],
      new=9,
      dtype="float32",
      began=worker.began,
      cache=str(tmp_path / "cache"),
    )
  assert 0 < answer["import"] < answer["first_token"] < answer["decoded"]
  assert 0 < answer["compile"] < answer["set_up"]
  assert answer["peak"] > 50e6
  assert os.listdir(tmp_path / "cache") == ["compiled"]
