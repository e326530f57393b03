"""Blocks of one layout as those of another."""

import dataclasses
import pathlib

import ml_dtypes
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.checkpoint import account, hugging_face, names, verify, weights

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def tiny():
  return hugging_face.open_tensors(GOLDEN / "grouped")


@pytest.mark.parametrize("scheme", names.SCHEMES)
def test_any_rows_of_any_scheme(tiny, scheme):
  """Rows alone equal those of the whole, whatever the span: a rotary weight's
  rows move within a head, so a span may need its neighbours."""
  config, source = tiny
  there = weights.as_scheme(config, source, scheme)
  for name, tensor in there.tensors.items():
    whole = there.get(name)
    assert whole.shape == tensor.shape
    for start, stop in ((0, 1), (1, tensor.shape[0]), (3, 5)):
      found = there.rows(name, start, stop)
      assert found.flags.c_contiguous
      np.testing.assert_array_equal(found, whole[start:stop], name)


@pytest.mark.parametrize("scheme", names.SCHEMES)
def test_a_source_of_params_equals_the_file(tiny, scheme):
  config, source = tiny
  params = weights.read_params(config, source)
  ours = weights.from_params(config, params, scheme)
  theirs = weights.as_scheme(config, source, scheme)
  assert ours.tensors == theirs.tensors
  for name, tensor in ours.tensors.items():
    for start, stop in ((0, tensor.shape[0]), (2, 3)):
      np.testing.assert_array_equal(
        ours.rows(name, start, stop), theirs.rows(name, start, stop)
      )


def test_spans_cover_every_row_once(tiny):
  _, source = tiny
  for block_bytes in (1, 100, 1000, 10**9):
    seen = {}
    for name, start, stop in source.spans(source.tensors, block_bytes):
      assert start == seen.get(name, 0) < stop
      seen[name] = stop
      size = source.rows(name, start, stop).nbytes
      assert size <= block_bytes or stop == start + 1
    assert seen == {name: t.shape[0] for name, t in source.tensors.items()}


def test_reading_ahead_keeps_the_order(tiny):
  _, source = tiny
  spans = list(source.spans(source.tensors, 500))
  found = list(weights.read_ahead(source, iter(spans)))
  assert [(name, start, stop) for name, start, stop, _ in found] == spans
  for name, start, stop, rows in found:
    np.testing.assert_array_equal(rows, source.rows(name, start, stop))


def test_a_failed_read_comes_out_of_read_ahead(tiny):
  _, source = tiny

  def broken(name, start, stop):
    raise errors.BadFileError("gone")

  spoilt = dataclasses.replace(source, rows=broken)
  with pytest.raises(errors.BadFileError, match="gone"):
    list(weights.read_ahead(spoilt, source.spans(source.tensors, 500)))


def test_float16_that_would_overflow_is_refused(tiny):
  _, source = tiny
  name = next(iter(source.tensors))

  def large(name, start, stop):
    value = source.rows(name, start, stop).copy()
    value.flat[0] = 70000
    return value

  spoilt = dataclasses.replace(source, rows=large)
  half = weights.as_dtype(spoilt, np.float16)
  with pytest.raises(errors.UserError, match=r"float16.*70000.*bfloat16"):
    half.get(name)
  assert weights.as_dtype(spoilt, ml_dtypes.bfloat16).get(name).size


def test_account_follows_every_tensor(tiny):
  config, source = tiny
  written = weights.as_scheme(config, source, "gguf")
  entries = account.account(config, source, written, block_bytes=300)
  assert {entry.name for entry in entries} == set(source.tensors)
  assert {entry.verdict for entry in entries} == {"same"}
  assert {entry.written for entry in entries} == set(written.tensors)
  assert all(entry.sha256 == entry.back for entry in entries)
  assert len(account.table(entries).splitlines()) == len(entries) + 1
  # The digest of a whole tensor, however it was read.
  import hashlib

  entry = entries[3]
  raw = source.get(entry.name).tobytes()
  assert hashlib.sha256(raw).hexdigest().startswith(entry.sha256)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_account_tells_rounding_from_damage(tiny, dtype):
  config, source = tiny
  rounded = weights.as_dtype(source, dtype)
  entries = account.account(config, source, rounded)
  assert {entry.verdict for entry in entries} <= {"same", "rounded"}
  assert "rounded" in {entry.verdict for entry in entries}
  account.check(entries, "x")

  name = "model.layers.1.mlp.up_proj.weight"

  def damaged(asked, start, stop):
    value = rounded.rows(asked, start, stop).copy()
    if asked == name:
      value.view(np.uint16).flat[-1] ^= 1  # the last bit of one weight
    return value

  spoilt = dataclasses.replace(rounded, rows=damaged)
  entries = account.account(config, source, spoilt)
  assert [e.name for e in entries if not e.sound] == [name]
  assert "DIFFERS" in account.table(entries)
  with pytest.raises(errors.BadFileError, match=name):
    account.check(entries, "x")


@pytest.mark.parametrize("name", ["grouped", "stretched"])
def test_the_streamed_forward_is_transformers(name):
  """Our decoder, one layer in memory, against the golden logits."""
  config, source = hugging_face.open_tensors(GOLDEN / name)
  golden = np.load(GOLDEN / name / "golden.npz")
  ids = golden["ids"].tolist()
  positions = np.arange(len(ids))[None]
  (found,) = verify.our_logits(config, source, ids, positions, 300)
  np.testing.assert_allclose(found, golden["logits"], atol=5e-5)


def test_verify_refuses_another_scaling():
  """Only positions beyond the original context tell two factors apart."""
  config, source = hugging_face.open_tensors(GOLDEN / "stretched")
  wrong = dataclasses.replace(
    config,
    rope_scaling=dataclasses.replace(
      config.rope_scaling, factor=config.rope_scaling.factor * 4
    ),
  )
  sound = verify.Side("a", config, source, None)
  settings = {"rounded": False, "block_bytes": 1000, "max_bytes": 10**9}
  lines = verify.forward(sound, sound, **settings)
  assert len(lines) == 2 and f"to {config.context_length - 1:,}" in lines[1]
  with pytest.raises(errors.BadFileError, match="rope_scaling"):
    verify.check_settings(sound, verify.Side("b", wrong, source, None))


def test_a_model_whose_layer_does_not_fit_says_so():
  config, source = hugging_face.open_tensors(GOLDEN / "grouped")
  side = verify.Side("a", config, source, None)
  (line,) = verify.forward(
    side, side, rounded=False, block_bytes=1000, max_bytes=100
  )
  assert "not done" in line and "--max_host_gb" in line
