"""metrics.jsonl outlives kills and resumes; its clock tells work from waste."""

import importlib.util
import json
import struct
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from llama_jax import errors
from llama_jax.training import metrics as metrics_lib
from llama_jax.training import writers

SETTINGS = metrics_lib.MetricsConfig(
  layer_norms=False, wandb="", curves_every=0.0
)
KNOWN = {"batch_size": 4, "sequence_length": 16, "learning_rate": 1e-3}


def values(step):
  return {
    "loss": np.float32(5 - step / 10),
    "grad_norm": np.float32(1),
    "tokens": np.float32(60),
    "skipped": np.int32(0),
  }


def write(folder, first, last, steps=9, settings=SETTINGS, **options):
  metrics = metrics_lib.Metrics(folder, first, steps, settings, **options)
  for step in range(first + 1, last + 1):
    metrics.add(step, values(step), KNOWN)
  metrics.close()


def rows_of(folder):
  return metrics_lib.read(folder / "metrics.jsonl")


def steps_of(folder):
  return [row["step"] for row in rows_of(folder)]


def test_one_row_a_step(tmp_path):
  write(tmp_path, 0, 5)
  rows = rows_of(tmp_path)
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
  assert rows[1]["loss"] == float(np.float32(4.8))
  assert rows[1]["learning_rate"] == 1e-3
  assert rows[1]["skipped"] == 0 and rows[1]["batch_size"] == 4
  for row in rows:
    assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"])
    assert row["mfu"] is None
    assert 0 < row["goodput"] <= 1
    # Python and JAX alone are more than this.
    assert 2e7 < row["memory"] < 1e12
  assert set(metrics_lib.CLOCKED) < set(rows[0])
  assert list((tmp_path / "tensorboard").iterdir())


def test_sources_layers_and_hashes_by_name(tmp_path):
  metrics = metrics_lib.Metrics(
    tmp_path, 0, 2, SETTINGS, sources=["books", "code"]
  )
  given = {
    "loss": jnp.float32(2.5),
    "source_loss": jnp.array([3.0, 0.0]),
    "source_tokens": jnp.array([7.0, 0.0]),
    "layer_grad_norms": {"embed": jnp.float32(4), "layers": jnp.arange(2.0)},
    "gradient_hash": jnp.array([1, 0xDEADBEEF], jnp.uint32),
    "spike": jnp.float32(jnp.nan),
  }
  known = {**KNOWN, "epochs": {"books": 0.5, "code": 2}, "note": "x"}
  metrics.add(1, given, known)
  metrics.attach({"heldout_loss/code": 1.5})
  metrics.attach({"heldout_loss": np.float64(1.75), "scored": np.int64(9)})
  metrics.add(2, values(2), KNOWN)
  metrics.close()
  first, second = rows_of(tmp_path)
  for name in metrics_lib.CLOCKED:
    del first[name]
  # A source without a token has no loss.
  assert first == {
    "step": 1,
    "loss": 2.5,
    "loss/books": 3.0,
    "tokens/books": 7.0,
    "tokens/code": 0.0,
    "layer_grad_norms/embed": 4.0,
    "layer_grad_norms/layers/0": 0.0,
    "layer_grad_norms/layers/1": 1.0,
    "gradient_hash": "00000001deadbeef",
    "spike": None,
    **KNOWN,
    "epochs/books": 0.5,
    "epochs/code": 2,
    "note": "x",
    "heldout_loss/code": 1.5,
    "heldout_loss": 1.75,
    "scored": 9,
  }
  assert "heldout_loss" not in second
  # Readable by others than Python.
  assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_nothing_to_attach_to(tmp_path):
  metrics = metrics_lib.Metrics(tmp_path, 0, 2, SETTINGS)
  with pytest.raises(ValueError, match="no step"):
    metrics.attach({"a": 1.0})
  metrics.close()


def test_a_resume_drops_later_rows(tmp_path):
  """Five were written and the checkpoint is of step 3."""
  write(tmp_path, 0, 5)
  before = (tmp_path / "metrics.jsonl").read_text().splitlines()
  write(tmp_path, 3, 6)
  assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
  after = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert after[:3] == before[:3] and after[3] != before[3]
  write(tmp_path, 0, 2)
  assert steps_of(tmp_path) == [1, 2]


@pytest.mark.parametrize("cut", [1, 2, *range(8, 400, 57)])
def test_a_row_that_a_kill_cut_short(tmp_path, cut):
  write(tmp_path, 0, 4)
  file = tmp_path / "metrics.jsonl"
  last = len(file.read_bytes().splitlines(keepends=True)[-1])
  cut = min(cut, last - 1)
  file.write_bytes(file.read_bytes()[:-cut])
  kept = steps_of(tmp_path)
  # Without its newline alone the last row is still whole.
  assert kept == ([1, 2, 3, 4] if cut == 1 else [1, 2, 3])
  write(tmp_path, kept[-1], 5)
  assert steps_of(tmp_path) == [1, 2, 3, 4, 5]
  for line in file.read_text().splitlines():
    json.loads(line)


@pytest.mark.parametrize("damage", ['{"step": 2', "[1]", '{"loss": 3}', "\xff"])
def test_damage_inside_is_told(tmp_path, damage):
  write(tmp_path, 0, 3)
  file = tmp_path / "metrics.jsonl"
  lines = file.read_bytes().splitlines()
  lines[1] = damage.encode("latin-1")
  file.write_bytes(b"\n".join(lines) + b"\n")
  for reader in (lambda: metrics_lib.read(file), lambda: write(tmp_path, 3, 4)):
    with pytest.raises(errors.BadFileError, match=r"metrics\.jsonl, line 2"):
      reader()
  assert file.read_bytes().splitlines() == lines


def events(folder):
  """(purged from, step, tag) of all of a folder's event files, in order."""
  found = []
  for file in sorted(folder.iterdir(), key=lambda f: f.stat().st_mtime_ns):
    data = file.read_bytes()
    while data:
      (size,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      if event.HasField("session_log"):
        found.append(("purge", event.step, None))
      for value in event.summary.value:
        found.append(("value", event.step, value.tag))
  return found


def test_a_resumed_tensorboard_purges_what_is_done_again(tmp_path):
  write(tmp_path, 0, 3)
  time.sleep(1.1)  # a file's name is its second
  write(tmp_path, 2, 4)
  found = events(tmp_path / "tensorboard")
  losses = [(what, step) for what, step, tag in found if tag in ("loss", None)]
  assert losses == [
    ("purge", 1),
    *(("value", step) for step in (1, 2, 3)),
    ("purge", 3),
    *(("value", step) for step in (3, 4)),
  ]
  assert ("value", 4, "learning_rate") in found


class Clock:
  """Time that passes when it is told to."""

  def __init__(self, monkeypatch):
    self.now = 1000.0
    for module in (metrics_lib, writers):
      fake = types.SimpleNamespace(
        time=lambda: 5000.0 + self.now, monotonic=lambda: self.now
      )
      monkeypatch.setattr(module, "time", fake)


def test_goodput_by_hand(tmp_path, monkeypatch):
  """10 s of steps that stand in 31 s: the rest is one of each kind of waste."""
  clock = Clock(monkeypatch)
  metrics = metrics_lib.Metrics(tmp_path, 0, 9, SETTINGS)
  with metrics.aside():
    clock.now += 4  # compiling
  for step in range(1, 6):
    clock.now += 2
    metrics.add(step, values(step), KNOWN)
    metrics.flush()
    if step == 3:
      with metrics.aside():
        clock.now += 1  # saving
  assert rows_of(tmp_path)[-1]["goodput"] == pytest.approx(10 / 15)
  # Killed; steps 4 and 5 are done again.
  metrics.close()
  clock.now += 7
  metrics = metrics_lib.Metrics(tmp_path, 3, 9, SETTINGS)
  with metrics.aside():
    clock.now += 5  # restoring
  for step in (4, 5):
    clock.now += 2
    metrics.add(step, values(step), KNOWN)
  metrics.close()
  rows = rows_of(tmp_path)
  assert [row["seconds"] for row in rows] == [2.0] * 5
  assert rows[-1]["goodput"] == pytest.approx(10 / 31)
  assert rows[-1]["time"] == 5000 + 1000 + 31


def test_an_evaluation_is_no_part_of_its_neighbours(tmp_path, monkeypatch):
  clock = Clock(monkeypatch)
  metrics = metrics_lib.Metrics(tmp_path, 0, 2, SETTINGS)
  clock.now += 2
  metrics.add(1, values(1), KNOWN)
  with metrics.aside():
    clock.now += 50
    metrics.attach({"heldout_loss": 1.0})
  clock.now += 3
  metrics.add(2, values(2), KNOWN)
  metrics.close()
  assert [row["seconds"] for row in rows_of(tmp_path)] == [2.0, 3.0]
  assert rows_of(tmp_path)[0]["heldout_loss"] == 1.0


def test_compiling_is_no_part_of_a_step(tmp_path, monkeypatch):
  """As JAX tells it: 3 s of tracing within 8 s of it, then 5 s of compiling."""
  clock = Clock(monkeypatch)
  metrics = metrics_lib.Metrics(tmp_path, 0, 2, SETTINGS)

  def event(name, begin, end):
    clock.now = end
    jax.monitoring.record_event_duration_secs(name, end - begin)

  start = clock.now
  event("/jax/core/compile/jaxpr_trace_duration", start + 2, start + 5)
  event("/jax/core/compile/jaxpr_trace_duration", start + 1, start + 9)
  event("/jax/some/other/duration", start, start + 9)
  event("/jax/core/compile/backend_compile_duration", start + 9, start + 14)
  clock.now += 2
  metrics.add(1, values(1), KNOWN)
  metrics.close()
  assert rows_of(tmp_path)[0]["seconds"] == 3
  # And nobody listens any more.
  event("/jax/core/compile/jaxpr_trace_duration", 0, clock.now)
  assert metrics._compiling.forget() == 0


def test_jax_tells_when_it_compiles():
  """Its names of these events are no promise."""
  compiling = metrics_lib._Compiling()

  @jax.jit
  def slow_to_trace(x):
    time.sleep(0.2)
    return x + 1

  slow_to_trace(jnp.float32(1))
  assert compiling.forget() >= 0.2
  slow_to_trace(jnp.float32(1))
  assert compiling.forget() == 0
  compiling.close()


def test_mfu_by_hand(tmp_path, monkeypatch):
  clock = Clock(monkeypatch)
  metrics = metrics_lib.Metrics(
    tmp_path, 0, 2, SETTINGS, flops=lambda length: 10.0 * length, peak_flops=1e4
  )
  clock.now += 2
  metrics.add(1, values(1), KNOWN)
  metrics.flush()
  clock.now += 2
  metrics.add(2, values(2), {**KNOWN, "attention_length": 4.0})
  metrics.close()
  rows = rows_of(tmp_path)
  # 64 tokens in 2 s, 160 FLOPs each; in packed rows of 4 it is 40.
  assert rows[0]["mfu"] == pytest.approx(32 * 160 / 1e4)
  assert rows[1]["mfu"] == pytest.approx(32 * 40 / 1e4)


def test_a_start_that_cannot_be_read(tmp_path):
  write(tmp_path, 0, 1)
  (tmp_path / "started.json").write_text('{"time": 3}')
  with pytest.raises(errors.BadFileError, match=r"started\.json"):
    write(tmp_path, 1, 2)


def test_curves_are_drawn_on_the_way(tmp_path):
  settings = metrics_lib.MetricsConfig(False, "", 0.01)
  metrics = metrics_lib.Metrics(tmp_path, 0, 9, settings)
  for step in (1, 2):
    time.sleep(0.02)
    metrics.add(step, values(step), KNOWN)
  metrics.close()
  assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
  assert not list(tmp_path.glob(".*"))


def test_a_drawing_that_fails_is_told(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(writers.Drawing, "_CODE", "raise OSError('no space')")
  settings = metrics_lib.MetricsConfig(False, "", 0.01)
  metrics = metrics_lib.Metrics(tmp_path, 0, 9, settings)
  time.sleep(0.02)
  metrics.add(1, values(1), KNOWN)
  metrics.close()
  assert "curves.png was not drawn: OSError: no space" in capfd.readouterr().err


def test_wandb_is_asked_for_and_missing(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda n: None if n == "wandb" else find(n)
  )
  with pytest.raises(errors.ConfigError, match=r"llamas.*pip install wandb"):
    metrics_lib.MetricsConfig(False, "llamas", 0.0)


def test_wandb_gets_the_rows_of_one_run(tmp_path, monkeypatch):
  logged, opened = [], []

  class Page:
    def log(self, row, step):
      logged.append((step, row["loss"]))

    def finish(self):
      logged.append("finished")

  def init(**options):
    opened.append(options)
    return Page()

  wandb = types.ModuleType("wandb")
  wandb.init, wandb.__spec__ = init, object()
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  settings = metrics_lib.MetricsConfig(False, "llamas", 0.0)
  write(tmp_path, 0, 2, settings=settings)
  write(tmp_path, 2, 3, settings=settings)
  loss = [float(np.float32(5 - s / 10)) for s in (1, 2, 3)]
  assert logged == [
    (1, loss[0]),
    (2, loss[1]),
    "finished",
    (3, loss[2]),
    "finished",
  ]
  assert opened[0] == opened[1] and opened[0]["project"] == "llamas"


@pytest.mark.parametrize("every", [-1.0, float("nan"), float("inf")])
def test_settings_are_checked(every):
  with pytest.raises(errors.ConfigError, match=r"metrics\.curves_every"):
    metrics_lib.MetricsConfig(False, "", every)


def test_only_the_first_process_writes(tmp_path):
  code = (
    "import jax, pathlib, sys\n"
    "jax.process_index = lambda: 1\n"
    "from llama_jax.training import metrics\n"
    "m = metrics.Metrics(pathlib.Path(sys.argv[1]), 0, 2,\n"
    "  metrics.MetricsConfig(False, '', 1.0))\n"
    "m.add(1, {'loss': jax.numpy.ones(())}, {})\n"
    "m.attach({'a': 1.0})\n"
    "m.flush()\n"
    "m.close()\n"
  )
  subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
  assert not list(tmp_path.iterdir())
