"""The README's table of speed is what the benchmarks wrote."""

import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cpu  # noqa: E402
import cpu_decode  # noqa: E402
import cpu_report  # noqa: E402
import speed_table  # noqa: E402


def write(path, rows, **more):
  result = {
    "plan": {"rounds": 2},
    "machine": {"cpu": "a CPU"},
    "rows": rows,
    **more,
  }
  path.write_text(json.dumps(result))


def cells(text, start) -> list[str]:
  (line,) = [x for x in text.splitlines() if x.startswith(f"| {start}")]
  return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_readme_has_the_table_of_today():
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  assert all(readme.count(mark) == 1 for mark in speed_table.MARKS)
  assert speed_table.put(readme, speed_table.table()) == readme


def test_who_wins_and_what_is_missed(tmp_path):
  """Of figures whose medians can be taken by hand."""
  rows = [
    cpu_report.Row(
      "train 4 x 512",
      "tokens/s",
      {"ours float32": [30.0, 50.0], "peer float32": [20.0, 20.0]},
    ),
    cpu_report.Row(
      "import", "s", {"ours float32": [4.0, 4.0], "peer float32": [2.0, 1.0]}
    ),
  ]
  write(tmp_path / "cpu.json", [cpu.summarise(row) for row in rows])
  row = cpu_report.Row(
    "decode at 1 x 512",
    "tokens/s",
    {
      "ours float32": [9.0, 9.0],
      "llama.cpp F32": [10.0, 10.0],
      "ours int8": [18.0, 18.0],
    },
  )
  write(tmp_path / "cpu_decode.json", [cpu_decode.summarise(row)])
  made = speed_table.table(tmp_path)
  assert cells(made, "train") == [
    *("train 4 x 512, tokens/s", "40", "transformers", "20"),
    *("2.00 (1.50-2.50)", "1.7"),
  ]
  # In seconds more is worse.
  assert cells(made, "import")[-2:] == ["**2.67 (2.00-4.00)**", "0.35, missed"]
  assert cells(made, "decode at 1 x 512, tokens")[2:] == [
    *("llama.cpp F32", "10", "**0.90 (0.90-0.90)**", "0.85")
  ]
  assert cells(made, "decode at 1 x 512, int8")[2:5] == [
    *("ours, float32", "9", "2.00 (2.00-2.00)")
  ]
  assert "`cpu.json` (2 rounds, a CPU)" in made and "finetune" not in made


def test_a_page_without_marks_is_left_alone():
  with pytest.raises(ValueError, match=r"speed_table\.py writes"):
    speed_table.put("# A page\n", "a table")
