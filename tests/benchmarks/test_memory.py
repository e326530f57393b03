"""The table of rematerialisation policies: a dry run at nano size."""

import json

import pytest

from llama_jax.model import decoder as decoder_lib


@pytest.mark.slow
def test_every_policy_is_measured(run_verbs, tmp_path):
  out = tmp_path / "memory.json"
  command = ["benchmarks.memory", "--size=nano", "--lengths=32,512"]
  code, printed, stderr = run_verbs([*command, "--rounds=1", f"--out={out}"])[0]
  assert code == 0, stderr
  lengths = json.loads(out.read_text())["lengths"]
  assert set(lengths) == {"32", "512"}
  for found in lengths.values():
    assert set(found) == set(decoder_lib.REMATERIALISATION)
    assert all(figures["seconds"] > 0 for figures in found.values())
  assert printed.count("MB temporaries") == 8
  kept = [lengths["512"][name]["temporary_bytes"] for name in ("none", "full")]
  assert kept[0] > 1.5 * kept[1]
