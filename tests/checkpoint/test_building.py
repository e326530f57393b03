"""A destination that is resumed, and never taken for whole."""

import multiprocessing
import os
import signal

import numpy as np
import pytest

from llama_jax import errors
from llama_jax.checkpoint import building, hugging_face, names, store, weights
from llama_jax.model import sizes

NANO = sizes.get("nano")


def test_it_takes_its_name_at_the_end(tmp_path):
  path = tmp_path / "deep" / "model"
  with building.building(path) as site:
    site.content.mkdir()
    (site.content / "a").write_text("x")
    assert not path.exists()
    assert building.unfinished(path)
  assert (path / "a").read_text() == "x"
  assert [p.name for p in path.parent.iterdir()] == ["model"]


def test_a_failure_leaves_nothing(tmp_path):
  for error in (ValueError("x"), OSError(28, "No space left on device")):
    with (
      pytest.raises((ValueError, errors.UserError)),
      building.building(tmp_path / "m", {"job": 1}) as site,
    ):
      site.content.write_text("x")
      raise error
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_what_is_done(tmp_path):
  path, job = tmp_path / "m", {"job": 1}
  ticks = []
  with (
    pytest.raises(KeyboardInterrupt),
    building.building(path, job) as site,
  ):
    site.content.write_text("half")
    site.finish("one", 10)
    raise KeyboardInterrupt
  assert not path.exists()
  with building.building(
    path, job, lambda unit, size: ticks.append((unit, size))
  ) as site:
    assert site.done == {"one"} and site.content.read_text() == "half"
    site.finish("two", 5)
  assert ticks == [("two", 5)]
  assert path.read_text() == "half"


def test_another_job_begins_anew(tmp_path):
  path = tmp_path / "m"
  for job in ({"job": 1}, {"job": 2}):
    with pytest.raises(KeyboardInterrupt), building.building(path, job) as site:
      assert site.done == frozenset() and not site.content.exists()
      site.content.write_text("half")
      site.finish("one", 10)
      raise KeyboardInterrupt


def test_a_cut_off_line_of_the_journal_is_not_done(tmp_path):
  path, job = tmp_path / "m", {"job": 1}
  with pytest.raises(KeyboardInterrupt), building.building(path, job) as site:
    site.content.write_text("half")
    site.finish("one", 10)
    site.finish("two", 10)
    raise KeyboardInterrupt
  journal = tmp_path / ".m.unfinished" / "journal"
  os.truncate(journal, journal.stat().st_size - 3)
  with building.building(path, job) as site:
    assert site.done == {"one"}


def test_two_at_once_are_refused(tmp_path):
  with building.building(tmp_path / "m", {"job": 1}) as site:
    site.content.write_text("x")
    with (
      pytest.raises(errors.UserError, match="written by another process"),
      building.building(tmp_path / "m", {"job": 1}),
    ):
      pass
  assert (tmp_path / "m").read_text() == "x"


def test_rows_at_their_places(tmp_path):
  import ml_dtypes

  value = np.arange(12).reshape(4, 3).astype(ml_dtypes.bfloat16)
  for order in ((0, 2), (2, 0)):
    with building.RowFile(tmp_path / "f", 4 + value.nbytes) as file:
      file.write(b"head", 0)
      for start in order:
        part = np.ascontiguousarray(value[start : start + 2])
        file.write(part, 4 + start * 6)
    content = (tmp_path / "f").read_bytes()
    assert content == b"head" + value.tobytes()
    (tmp_path / "f").unlink()


class Stop(BaseException):
  """What no writer catches, as a kill."""


WRITERS = {"hf": hugging_face.write_into, "orbax": store.write_into}


@pytest.mark.parametrize("scheme", WRITERS)
def test_a_stopped_write_goes_on(scheme, tmp_path, random_params):
  """Stopped at many places; no tensor that was finished is read again, and
  the result is bitwise that of one go."""
  params = random_params(NANO)
  source = weights.from_params(NANO, params, "hf")
  reads = []

  def write(path, stop_after):
    def rows(name, start, stop):
      if len(reads) == stop_after:
        raise Stop
      reads.append(name)
      return source.rows(name, start, stop)

    stopping = weights.Source("m", "hf", source.tensors, rows)
    with building.building(path, {"job": scheme}) as site:
      done = set(site.done)
      WRITERS[scheme](site, NANO, stopping, None, block_bytes=50_000)
    return done

  path = tmp_path / "m"
  for stop_after in (8, 6, 4):
    reads.clear()
    with pytest.raises(Stop):
      write(path, stop_after)
  reads.clear()
  finished = write(path, -1)
  assert finished and not finished & set(reads)
  module = {"hf": hugging_face, "orbax": store}[scheme]
  config, back, _ = module.read(path)
  assert config == NANO
  for key, leaf in names.flatten(back).items():
    want = names.flatten(params)[key]
    assert np.asarray(leaf).tobytes() == np.asarray(want).tobytes(), key


def _convert_slowly(path, source_path):
  from llama_jax.checkpoint import store as store_lib

  config, source = store_lib.open_tensors(source_path)
  with building.building(
    path,
    {"job": 1},
    lambda unit, size: (
      os.kill(os.getpid(), signal.SIGKILL)
      if unit.endswith("1.mlp.up_proj.weight")
      else None
    ),
  ) as site:
    hugging_face.write_into(site, config, source, None, block_bytes=4000)


def test_a_killed_process_is_resumed(tmp_path, random_params):
  """kill -9, for real."""
  params = random_params(NANO)
  store.write(tmp_path / "source", NANO, params, None)
  path = tmp_path / "m"
  process = multiprocessing.get_context("spawn").Process(
    target=_convert_slowly, args=(path, tmp_path / "source")
  )
  process.start()
  process.join()
  assert process.exitcode == -signal.SIGKILL
  assert not path.exists() and building.unfinished(path)
  config, source = store.open_tensors(tmp_path / "source")
  with building.building(path, {"job": 1}) as site:
    assert site.done
    hugging_face.write_into(site, config, source, None)
  back = hugging_face.read(path)[1]
  for key, leaf in names.flatten(back).items():
    assert leaf.tobytes() == np.asarray(names.flatten(params)[key]).tobytes()
