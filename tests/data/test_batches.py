"""Global batches: a function of the step alone, whoever reads them how."""

import dataclasses
import hashlib

import numpy as np
import pytest

from llama_jax import errors, text
from llama_jax.data import batches, packing
from llama_jax.data import ramp as ramp_lib

R = 32
CONFIG = batches.DataConfig(
  text="",
  prepared="x",
  mixture={},
  later_mixtures=(),
  separate_documents=True,
  sequence_length=R,
  heldout=0.0,
  infill_rate=0.0,
  workers=1,
  seed=0,
  tokenizer="",
)
RAMP = ramp_lib.Ramp(
  [ramp_lib.Stage(0, 6, 16, 1), ramp_lib.Stage(96 * 8, 6, R, 1)], R
)


def source(name, count, row_length=R):
  """Documents of mixed lengths whose tokens are all different numbers."""
  rng = np.random.default_rng(count)
  first = {"a": 0, "b": 1_000_000}[name]
  documents = []
  while sum(map(len, documents)) < count * row_length:
    size = int(rng.integers(3, 90))
    documents.append(np.arange(first, first + size))
    first += size
  packed = packing.pack(
    (packing.Document(d, i) for i, d in enumerate(documents)), row_length
  )
  return list(packed)[:count]


@pytest.fixture(scope="module")
def two():
  return {"a": source("a", 41), "b": source("b", 17)}


def make(rows, ramp=RAMP, **knobs):
  return batches.Batches(rows, dataclasses.replace(CONFIG, **knobs), ramp)


def digests(source, steps, rows=lambda step: slice(None)):
  """A hash of every sequence of these steps, in order."""
  told = []
  for step in steps:
    batch = source.get(step, rows(step))
    for i in range(len(batch["tokens"])):
      digest = hashlib.sha256()
      for name in sorted(batch):
        digest.update(np.ascontiguousarray(batch[name][i]).tobytes())
      told.append(digest.hexdigest())
  return told


def test_any_step_can_be_resumed(two):
  whole = digests(make(two), range(20))
  for start in (1, 7, 8, 13):
    assert digests(make(two), range(start, 20)) == whole[6 * start :]


@pytest.mark.parametrize("steps", [1, 7, 30, 200])
def test_drawn_is_what_the_batches_are_made_of(two, steps):
  """Every row of the first steps, each once, and no other."""
  source = make(two, mixture={"a": 3, "b": 1})
  drawn = [int(row["tokens"][0]) for row in source.drawn(steps)]
  assert len(set(drawn)) == len(drawn)
  want = {
    int(two[one["source"]][one["row"]]["tokens"][0])
    for step in range(steps)
    for one in source.documents(step)
  }
  assert set(drawn) == want


@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_hosts_share_a_batch(two, hosts):
  """R7: the same global batches for any number of hosts."""
  each = 6 // hosts
  whole = digests(make(two), range(12))
  parts = [
    digests(
      make(two), range(12), lambda s, h=h: slice(h * each, (h + 1) * each)
    )
    for h in range(hosts)
  ]
  joined = []
  for step in range(12):
    for part in parts:
      joined += part[step * each : (step + 1) * each]
  assert joined == whole


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_threads_read_ahead_in_order(two, workers):
  """R7: and of reading threads."""
  source = make(two)
  read = batches.read_ahead(
    source, range(3, 15), lambda step: slice(None), workers
  )
  for step, batch in zip(range(3, 15), read, strict=True):
    want = source.get(step)
    assert batch.keys() == want.keys()
    for name in want:
      np.testing.assert_array_equal(batch[name], want[name])


def test_a_reader_that_fails_says_so_and_stops(two):
  class Broken(list):
    def __getitem__(self, index):
      raise errors.BadFileError("row cannot be read")

  source = make({"a": Broken(two["a"])})
  with pytest.raises(errors.BadFileError, match="cannot be read"):
    list(batches.read_ahead(source, range(9), lambda step: slice(None), 2))


def test_an_epoch_has_every_token_once(two):
  """Through both sequence lengths of the ramp: no row cut, none twice."""
  got = []
  source = make({"a": two["a"]})
  rows = 0
  for step in range(12):
    rows += RAMP.at(step).rows
    if rows > 41:
      break
    got += source.get(step)["tokens"].ravel().tolist()
  want = {tuple(row["tokens"][:-1]) for row in two["a"]}
  parts = [tuple(got[i : i + R]) for i in range(0, len(got), R)]
  assert len(parts) == len(set(parts)) and set(parts) <= want
  assert len(parts) > 30


def test_sources_are_told(two):
  source = make(two, mixture={"a": 0.25, "b": 0.75})
  counts = np.zeros(2)
  for step in range(40):
    batch = source.get(step)
    ours = batch["tokens"][:, 0] >= 1_000_000
    np.testing.assert_array_equal(batch["sources"], ours.astype(np.int32))
    counts += np.bincount(batch["sources"], minlength=2)
  np.testing.assert_allclose(counts / counts.sum(), [0.25, 0.75], atol=0.02)


def test_documents_of_a_batch_are_named(two):
  source = make(two)
  for step in (0, 9):
    told = source.documents(step)
    batch = source.get(step)
    cuts = RAMP.at(step).cuts
    assert len(told) * cuts == 6
    for number, one in enumerate(told):
      row = two[one["source"]][one["row"]]
      np.testing.assert_array_equal(
        batch["tokens"][number * cuts : (number + 1) * cuts].ravel(),
        row["tokens"][:-1],
      )
      assert one["documents"] == row["documents"].tolist()


def test_a_later_mixture_takes_over_at_its_token(two):
  source = make(two, mixture={"a": 1.0}, later_mixtures=((96 * 3, {"b": 1.0}),))
  for step in range(6):
    want = 0 if step < 3 else 1
    assert set(source.get(step)["sources"]) == {want}


def test_too_little_text_is_refused(two):
  ramp = ramp_lib.Ramp([ramp_lib.Stage(0, 64, R, 1)], R)
  with pytest.raises(errors.ConfigError) as caught:
    make(two, ramp)
  for said in ("58 rows", "training.batch_size=64", "data.sequence_length"):
    assert said in str(caught.value)


def test_documents_end_with_eos(tmp_path, tokenizer_folder):
  tokenizer = text.load_tokenizer(tokenizer_folder)
  for name, content in (("a.txt", "import json"), ("b.txt", "return None")):
    (tmp_path / name).write_text(content)
  config = dataclasses.replace(CONFIG, text=str(tmp_path), prepared="")
  rows, heldout = batches.pack_text(config, tokenizer, 100)
  assert len(rows) == 1 and not heldout
  got = rows[0]["tokens"][rows[0]["segments"] > 0].tolist()
  bos = [tokenizer.bos_id] if tokenizer.add_bos else []
  want = []
  for content in ("import json", "return None"):
    want += [*bos, *tokenizer.encode(content), tokenizer.eos_id]
  assert got == want


def test_documents_are_held_out_by_their_text(tmp_path, tokenizer_folder):
  """Each in one of the two, whatever else is there, near the share asked."""
  tokenizer = text.load_tokenizer(tokenizer_folder)
  config = dataclasses.replace(
    CONFIG, text=str(tmp_path), prepared="", heldout=0.25
  )

  def owners(rows):
    return {int(index) for row in rows for index in row["documents"]}

  for number in range(200):
    (tmp_path / f"{number:03}.txt").write_text(f"line {number}")
  train, heldout = map(owners, batches.pack_text(config, tokenizer, 50))
  assert train | heldout == set(range(200)) and not train & heldout
  assert abs(len(heldout) - 50) < 4 * (200 * 0.25 * 0.75) ** 0.5
  for number in range(100):
    (tmp_path / f"{number:03}.txt").unlink()
  _, fewer = map(owners, batches.pack_text(config, tokenizer, 50))
  assert {100 + index for index in fewer} == {i for i in heldout if i >= 100}


@pytest.mark.parametrize(
  "knobs, said",
  [
    ({"sequence_length": 0}, r"data\.sequence_length=0"),
    ({"workers": 0}, r"data\.workers=0"),
    ({"infill_rate": 1.5}, r"data\.infill_rate=1.5"),
    ({"heldout": -0.1}, r"data\.heldout=-0.1"),
    ({"prepared": ""}, r"data\.text=''.*give one of them"),
    ({"text": "y"}, "give one of them"),
    (
      {"text": "y", "prepared": "", "mixture": {"a": 1}},
      r"data\.mixture is for",
    ),
    ({"mixture": "a:1,b:2,a:3"}, "a source is named twice"),
  ],
)
def test_config_refusals(knobs, said):
  with pytest.raises(errors.ConfigError, match=said):
    dataclasses.replace(CONFIG, **knobs)
