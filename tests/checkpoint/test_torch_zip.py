"""The .pth files of torch: right values, no code run, one kind of error."""

import io
import itertools
import pathlib
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from llama_jax import errors
from llama_jax.checkpoint import (
  torch_draft,
  torch_pickle,
  torch_zip,
  weights,
)

GOLDEN = pathlib.Path(__file__).parent / "golden"
TORCH = GOLDEN / "torch"

TENSORS = {
  "a": np.arange(24, dtype=np.float32).reshape(6, 4),
  "b": np.linspace(-1, 1, 7).astype(np.float16),
  "c": np.linspace(-9, 9, 30).astype(ml_dtypes.bfloat16).reshape(2, 3, 5),
}


def whole(archive, name):
  return archive.rows(name, 0, archive.views[name].shape[0])


def draft(path, tensors=TENSORS, rows=2):
  """A file of arrays, written a few rows at a time."""
  known = {
    name: weights.Tensor(
      value.shape, value.dtype, weights.stored_as(value.dtype)
    )
    for name, value in tensors.items()
  }
  with torch_draft.Draft(path, known) as file:
    for name, value in tensors.items():
      for start in range(0, len(value), rows):
        file.append(name, value[start : start + rows])
    file.finish()
  return path


def zipped(path, entries, **settings):
  """An archive by Python's own writer: name -> content."""
  with zipfile.ZipFile(path, "w", **settings) as file:
    for name, content in entries:
      file.writestr(name, content)
  return path


STORAGE = torch_pickle.Storage("0", "F32", 6)
SOUND = torch_pickle.dump({"a": torch_pickle.View(STORAGE, 0, (2, 3), (3, 1))})
NUMBERS = np.arange(6, dtype=np.float32).tobytes()
ENTRIES = (("m/data.pkl", SOUND), ("m/data/0", NUMBERS))


# What torch writes.


@pytest.mark.parametrize("protocol", [2, 4])
def test_views_are_what_torch_says(protocol):
  archive = torch_zip.Archive(TORCH / f"protocol{protocol}.pth")
  golden = np.load(TORCH / "golden.npz")
  assert archive.views.keys() == set(golden)
  for name, expected in golden.items():
    value = whole(archive, name)
    assert value.flags.c_contiguous
    np.testing.assert_array_equal(value.astype(np.float32), expected, name)
    for start, stop in itertools.combinations(range(len(expected) + 1), 2):
      part = archive.rows(name, start, stop).astype(np.float32)
      np.testing.assert_array_equal(part, expected[start:stop], name)
  assert archive.views["half"].storage.dtype == np.float16
  assert archive.views["parameter"].storage.dtype == ml_dtypes.bfloat16


def test_a_state_dict_with_its_metadata():
  archive = torch_zip.Archive(TORCH / "state_dict.pth")
  expected = np.load(TORCH / "golden.npz")["parameter"]
  found = whole(archive, "weight").astype(np.float32)
  np.testing.assert_array_equal(found, expected)


def test_the_format_before_2020_says_what_to_do():
  with pytest.raises(errors.BadFileError, match=r"torch\.save\(torch\.load"):
    torch_zip.Archive(TORCH / "old.pth")


# What we write.


def test_there_and_back(tmp_path):
  path = draft(tmp_path / "m.pth")
  archive = torch_zip.Archive(path)
  assert list(archive.views) == list(TENSORS)
  for name, value in TENSORS.items():
    found = whole(archive, name)
    assert found.dtype == value.dtype
    assert found.shape == value.shape
    assert found.tobytes() == value.tobytes()


@pytest.mark.parametrize("large", [torch_draft._LARGE, 100, 0])
def test_pythons_zipfile_agrees(large, tmp_path, monkeypatch):
  """Checksums, offsets and alignment; 64-bit fields where they are called for.

  torch 2.13 was seen to load a file of ours of 4.3 GB, mapped, tensors on
  both sides of the 4 GiB.
  """
  monkeypatch.setattr(torch_draft, "_LARGE", large)
  path = draft(tmp_path / "m.pth")
  content = path.read_bytes()
  with zipfile.ZipFile(path) as file:
    assert file.testzip() is None
    for i, value in enumerate(TENSORS.values()):
      raw = file.read(f"consolidated/data/{i}")
      assert raw == value.tobytes()
      assert content.index(raw) % 64 == 0
    assert file.read("consolidated/byteorder") == b"little"
  archive = torch_zip.Archive(path)
  for name, value in TENSORS.items():
    assert whole(archive, name).tobytes() == value.tobytes()


def test_a_draft_goes_on_where_another_stopped(tmp_path):
  expected = draft(tmp_path / "whole.pth").read_bytes()
  known = {
    name: weights.Tensor(
      value.shape, value.dtype, weights.stored_as(value.dtype)
    )
    for name, value in TENSORS.items()
  }
  with torch_draft.Draft(tmp_path / "m.pth", known) as file:
    file.append("a", TENSORS["a"])
    file.append("b", TENSORS["b"][:3])  # and is stopped
  with pytest.raises(errors.BadFileError):
    torch_zip.Archive(tmp_path / "m.pth")
  with torch_draft.Draft(tmp_path / "m.pth", known) as file:
    file.append("b", TENSORS["b"])
    file.append("c", TENSORS["c"])
    file.finish()
  assert (tmp_path / "m.pth").read_bytes() == expected


# What strangers write: the archive.


def test_the_hand_made_archive_is_sound(tmp_path):
  archive = torch_zip.Archive(zipped(tmp_path / "m.pth", ENTRIES))
  assert whole(archive, "a").tobytes() == NUMBERS


def other_list(content, field, value, entry=0, local=False):
  """Replaces a field of an entry's line in the list, or of its header."""
  at = -1
  for _ in range(entry + 1):
    at = content.index(b"PK\3\4" if local else b"PK\1\2", at + 1)
  mutant = bytearray(content)
  struct.pack_into(field[0], mutant, at + field[1], value)
  return bytes(mutant)


SIZE, PACKED, START = ("<I", 24), ("<I", 20), ("<I", 42)
FLAGS, METHOD, DISK = ("<H", 8), ("<H", 10), ("<H", 34)


@pytest.mark.parametrize(
  ("entries", "message"),
  [
    ([], "no zip archive"),
    ([("m/data/0", NUMBERS)], "holds no entry data.pkl"),
    ([("data.pkl", SOUND)], "of the name 'data.pkl'"),
    ([("m/data.pkl", SOUND)], "is missing"),
    ([("m/data.pkl", SOUND), ("m/data/0", NUMBERS[:-1])], "has 23"),
    ([("m/data.pkl", SOUND), ("m/data/0", NUMBERS + b"0")], "has 25"),
    ([*ENTRIES, ("../../etc/passwd", b"")], "of the name '../../etc/passwd'"),
    ([*ENTRIES, ("m/../x", b"")], r"of the name 'm/\.\./x'"),
    ([*ENTRIES, ("/m/x", b"")], "of the name '/m/x'"),
    ([*ENTRIES, ("m//x", b"")], "of the name 'm//x'"),
    ([*ENTRIES, ("m\\x", b"")], "of the name"),
    ([*ENTRIES, ("m/x\n", b"")], "of the name"),
    ([*ENTRIES, ("n/x", b"")], "not of one folder"),
    ([*ENTRIES, ("m/data/0", b"")], "twice"),
    ([*ENTRIES, ("m/byteorder", b"big")], "byte order b'big'"),
    ([("m/data.pkl", bytes(5 << 20))], "4194304 are allowed"),
  ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_entries(entries, message, tmp_path):
  path = zipped(tmp_path / "m.pth", entries)
  with pytest.raises(errors.BadFileError, match=message):
    torch_zip.Archive(path)


def test_compressed_entries_are_refused_unread(tmp_path):
  path = tmp_path / "bomb.pth"
  zipped(
    path, [("m/data.pkl", bytes(64 << 20))], compression=zipfile.ZIP_DEFLATED
  )
  assert path.stat().st_size < 100_000
  with pytest.raises(errors.BadFileError, match="compressed"):
    torch_zip.Archive(path)


@pytest.mark.parametrize(
  ("field", "value", "entry", "local"),
  [
    (SIZE, 5, 0, False),
    (SIZE, 2**31, 1, False),
    (SIZE, 2**32 - 1, 1, False),
    (PACKED, 3, 1, False),
    (START, 2**32 - 1, 1, False),
    (START, 2**31, 1, False),
    (START, 0, 1, False),
    (START, 7, 1, False),
    (FLAGS, 1, 1, False),
    (METHOD, 8, 1, False),
    (METHOD, 99, 0, False),
    (DISK, 3, 0, False),
    (("<H", 8), 8, 0, True),
    (("<H", 26), 3, 0, True),
    (("<H", 28), 65535, 1, True),
    (("<I", 0), 0, 1, True),
    (("<B", 31), 66, 1, True),
    (("<H", 28), 500, 0, False),
    (("<H", 30), 65535, 1, False),
    (("<H", 32), 65535, 1, False),
    (("<I", 0), 0, 1, False),
    (("<I", 16), 1, 0, False),
  ],
)
def test_lists_that_lie(field, value, entry, local, tmp_path):
  content = zipped(tmp_path / "m.pth", ENTRIES).read_bytes()
  path = tmp_path / "mutant.pth"
  path.write_bytes(other_list(content, field, value, entry, local))
  with pytest.raises(errors.BadFileError):
    torch_zip.Archive(path)


@pytest.mark.parametrize(
  ("at", "field", "value"),
  [
    (4, "<H", 1),
    (6, "<H", 1),
    (8, "<H", 3),
    (10, "<H", 1),
    (8, "<2H", (65535, 65535)),
    (8, "<2H", (65000, 65000)),
    (12, "<I", 2**32 - 1),
    (12, "<I", 2**32 - 2),
    (16, "<I", 2**32 - 1),
    (16, "<I", 2**31),
    (16, "<I", 0),
    (20, "<H", 9),
  ],
)
def test_ends_that_lie(at, field, value, tmp_path):
  content = bytearray(zipped(tmp_path / "m.pth", ENTRIES).read_bytes())
  values = value if isinstance(value, tuple) else (value,)
  struct.pack_into(field, content, len(content) - 22 + at, *values)
  (tmp_path / "m.pth").write_bytes(content)
  if at == 20:  # a comment is not looked for
    torch_zip.Archive(tmp_path / "m.pth")
    return
  with pytest.raises(errors.BadFileError):
    torch_zip.Archive(tmp_path / "m.pth")


@pytest.mark.parametrize(
  "end",
  [
    (2, 2, 2**64 - 1, 0),
    (2, 2, 100, 2**64 - 1),
    (2**63, 2**63, 100, 0),
    (1 << 20, 1 << 20, 46 << 20, 0),
  ],
)
def test_large_ends_that_lie(end, tmp_path):
  content = zipped(tmp_path / "m.pth", ENTRIES).read_bytes()
  at = len(content) - 22
  record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, *end)
  locator = struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)
  full = struct.pack(
    "<4s4H2IH", b"PK\5\6", 0, 0, *[65535] * 2, *[2**32 - 1] * 2, 0
  )
  (tmp_path / "m.pth").write_bytes(content[:at] + record + locator + full)
  with pytest.raises(errors.BadFileError):
    torch_zip.Archive(tmp_path / "m.pth")


# What strangers write: the tensors.


def described(offset=0, shape=(2, 3), strides=(3, 1), length=6, stored="F32"):
  storage = torch_pickle.Storage("0", stored, length)
  return torch_pickle.View(storage, offset, shape, strides)


@pytest.mark.parametrize(
  ("view", "message"),
  [
    (described(offset=1), "leads out"),
    (described(offset=2**62), "leads out"),
    (described(shape=(2, 4)), "leads out"),
    (described(shape=(2**31, 2**31)), "leads out"),
    (described(shape=(2**62, 4), strides=(0, 1)), "repeats"),
    (described(shape=(2**40,), strides=(0,)), "repeats"),
    (described(strides=(2**62, 1)), "leads out"),
    (described(shape=(0, 3)), "no rows"),
    (described(shape=(), strides=()), "no rows"),
    (described(strides=(1,)), "a stride for each"),
    (described(shape=(1,) * 9, strides=(1,) * 9), "too many axes"),
    (described(length=7), "has 24"),
    (described(length=2**62), "has 24"),
    (described(stored="F16"), "has 24"),
  ],
)
def test_tensors_that_lead_elsewhere(view, message, tmp_path):
  content = torch_pickle.dump({"a": view})
  path = zipped(tmp_path / "m.pth", [("m/data.pkl", content), ENTRIES[1]])
  with pytest.raises(errors.BadFileError, match=message):
    torch_zip.Archive(path)


def test_negative_numbers(tmp_path):
  negative = b"J" + struct.pack("<i", -1)
  sound = b"J" + struct.pack("<i", 0)
  for at in range(SOUND.count(sound)):
    parts = SOUND.split(sound)
    head, tail = sound.join(parts[: at + 1]), sound.join(parts[at + 1 :])
    with pytest.raises(errors.BadFileError):
      torch_pickle.load(head + negative + tail, "m")


def test_tensors_that_repeat_each_other(tmp_path):
  """A file of a few numbers must not become a model of many."""
  views = {f"t{i}": described() for i in range(3)}
  for count, sound in ((2, True), (3, False)):
    content = torch_pickle.dump(dict(list(views.items())[:count]))
    path = zipped(tmp_path / "m.pth", [("m/data.pkl", content), ENTRIES[1]])
    if sound:
      torch_zip.Archive(path)
    else:
      with pytest.raises(errors.BadFileError, match="repeat"):
        torch_zip.Archive(path)


def test_one_storage_of_two_types(tmp_path):
  views = {
    "a": described(),
    "b": described(shape=(3, 4), strides=(4, 1), length=12, stored="F16"),
  }
  content = torch_pickle.dump(views)
  path = zipped(tmp_path / "m.pth", [("m/data.pkl", content), ENTRIES[1]])
  with pytest.raises(errors.BadFileError, match="F16"):
    torch_zip.Archive(path)


def test_scattered_tensors_are_refused_and_not_read_whole(tmp_path):
  view = described(shape=(2, 2), strides=(1, 400), length=500)
  content = torch_pickle.dump({"a": view})
  path = zipped(
    tmp_path / "m.pth", [("m/data.pkl", content), ("m/data/0", bytes(2000))]
  )
  with pytest.raises(errors.BadFileError, match="contiguous"):
    torch_zip.Archive(path)


# What strangers write: the pickle.


class Called:
  """What pickle would call on loading."""

  def __init__(self, function, *arguments, state=None):
    self.found = (function, arguments, state)

  def __reduce__(self):
    return self.found if self.found[2] is not None else self.found[:2]


def payloads(marker):
  """Some 200 pickles that would run something, and some that only misbehave."""
  import builtins
  import collections
  import functools
  import importlib
  import operator
  import os
  import runpy
  import shutil
  import socket
  import subprocess
  import types

  code = f"open({str(marker)!r}, 'w')"
  calls = [
    Called(os.system, f"touch {marker}"),
    Called(os.popen, f"touch {marker}"),
    Called(os.mkdir, str(marker)),
    Called(os.execv, "/bin/touch", ("touch", str(marker))),
    Called(os.remove, str(marker)),
    Called(subprocess.Popen, ["touch", str(marker)]),
    Called(subprocess.check_output, ["touch", str(marker)]),
    Called(builtins.eval, code),
    Called(builtins.exec, code),
    Called(builtins.compile, code, "x", "exec"),
    Called(builtins.open, str(marker), "w"),
    Called(builtins.__import__, "antigravity"),
    Called(builtins.getattr, os, "system"),
    Called(builtins.setattr, torch_pickle, "GLOBALS", {}),
    Called(builtins.bytearray, 1 << 40),
    Called(importlib.import_module, "antigravity"),
    Called(runpy.run_path, str(marker)),
    Called(shutil.rmtree, str(marker)),
    Called(shutil.copy, __file__, str(marker)),
    Called(socket.create_connection, ("127.0.0.1", 9)),
    Called(functools.partial, os.system, "true"),
    Called(operator.attrgetter, "a"),
    Called(operator.methodcaller, "system", "true"),
    Called(pickle.loads, pickle.dumps(1)),
    Called(io.open, str(marker), "w"),
    Called(sys.exit, 3),
    Called(collections.OrderedDict, [("a", 1)]),
    Called(collections.OrderedDict, state={"a": 1}),
    Called(types.FunctionType, 1),
    Called(time.sleep, 1000),
    Called(np.load, str(marker)),
    Called(np.ndarray, (1 << 40,)),
    Called(weights.Tensor, (1,), None, ""),
    Called(torch_zip.Archive, str(marker)),
  ]
  for call in calls:
    for protocol in range(2, 6):
      for value in (call, {"a": call}):
        try:
          yield pickle.dumps(value, protocol)
        except (pickle.PicklingError, TypeError):  # a module as argument
          break

  def text(word):
    return b"X" + struct.pack("<I", len(word)) + word

  command = text(f"touch {marker}".encode())
  system = b"cposix\nsystem\n"
  yield from (
    b"\x80\x02" + middle + b"."
    for middle in (
      b"(" + command + b"iposix\nsystem\n",  # INST
      b"(" + system + command + b"o",  # OBJ
      system + command + b"\x85\x81",  # NEWOBJ
      system + command + b"\x85}\x92",  # NEWOBJ_EX
      b"\x82\x01",  # EXT1
      b"\x83\x01\x00",
      b"\x84\x01\x00\x00\x00",
      b"Pposix\n",  # PERSID
      text(b"posix") + text(b"system") + b"\x93" + command + b"\x85R",
      text(b"posix") + text(b"system") + b"\x93",
      text(b"os.path") + text(b"__builtins__") + b"\x93",
      b"ctorch._utils\n_rebuild_tensor_v2\n" + command + b"\x85R",
      b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n",
      b"ctorch\nFloatStorage\n" + command + b"\x85R",
      b"ctorch\nLongStorage\n",
      b"ctorch.storage\n_load_from_bytes\n" + command + b"\x85R",
      b"ctorch._utils\n_rebuild_parameter\n)R",
      b"ccollections\nOrderedDict\n)R}" + text(b"__class__") + system + b"sb",
      b"ccollections\nOrderedDict\n)R" + system + b"b",
      b"ccollections\nOrderedDict\n" + command + b"b",
      b"}" + command + command + b"sb",
      command + b"Q",
      b"}Q",
      b")Q",
      system + b"Q",
      b"cposix.system\n" + b"x" * 1000 + b"\n",
      b"c" + b"x" * 100_000,
      b"\x8e" + struct.pack("<Q", 2**63) + b"x",  # BINBYTES8
      b"\x8d" + struct.pack("<Q", 2**64 - 1) + b"x",  # BINUNICODE8
      b"\x96" + struct.pack("<Q", 2**40) + b"x",  # BYTEARRAY8
      b"B" + struct.pack("<I", 2**32 - 1),
      b"X" + struct.pack("<I", 2**32 - 1),
      b"\x8b" + struct.pack("<i", 2**31 - 1),  # LONG4
      b"\x8a\xff" + b"\xff" * 255,
      b"\x95" + struct.pack("<Q", 2**64 - 1),  # FRAME
      b"I" + b"9" * 5000 + b"\n",
      b"S'\\x41'\n",
      b"V\\u0041\n",
      b"F1e400\n",
      b"\x97",  # NEXT_BUFFER
      b"\x98",
      b"\x80\x02}",
      b"}." + SOUND,
      b"}" * 100_000,
      b"}" * 400_000,
      b"(" * 100_000,
      b")" + b"\x85" * 100_000,
      b")" + b"q\x00h\x00\x86" * 40_000,
      b"}" + b")" + b"q\x00h\x00h\x00\x87" * 50 + b"}s",
      b"}q\x00" + text(b"a") + b"h\x00s",  # holds itself
      b"}(" + text(b"a") + b"N" + text(b"a") + b"Nu",
      b"}(" + text(b"a") + b"u",
      b"}K\x01K\x02s",
      b"}" + text(b"a\x1b[2J") + b"Ns",
      b"h\x07",
      b"j" + b"\xff" * 4,
      b"r" + b"\xff" * 4,
      b"0",
      b"R",
      b"t",
      b"s",
      b"",
      text(b"\xff\xfe"),
      b"N",
      b"]",
      b"\x8f",
    )
  )
  yield b"\x80\x00" + SOUND[2:]
  yield b"\x80\x06" + SOUND[2:]
  yield SOUND[:2] + SOUND
  yield SOUND + b"."
  yield SOUND[2:] + SOUND
  yield SOUND + SOUND
  yield b""


# Turned on only around what is watched: an audit hook stays for good.
EVENTS: list | None = None


def watch(event, arguments):
  if EVENTS is not None:
    EVENTS.append((event, *arguments[:1]))


def refusal(path):
  """The message with which a file is refused."""
  with pytest.raises(errors.BadFileError) as caught:
    torch_zip.Archive(path)
  return str(caught.value)


def test_no_pickle_runs_anything(tmp_path):
  """Nothing is imported, compiled, run or opened but the file itself."""
  global EVENTS
  sys.addaudithook(watch)
  marker = tmp_path / "marker"
  path = tmp_path / "m.pth"
  contents = list(payloads(marker))
  assert len(contents) >= 200
  # Once, so that nothing is left to be imported.
  refusal(zipped(path, ENTRIES[:1]))
  for content in contents:
    zipped(path, [("m/data.pkl", content), ENTRIES[1]])
    EVENTS = []
    try:
      message = refusal(path)
    finally:
      events, EVENTS = EVENTS, None
    assert message.isprintable()
    assert len(message) < 700
    assert set(events) <= {("open", str(path))}, events
    if content.startswith(b"\x80\x02}}"):  # the costliest a byte
      tracemalloc.start()
      refusal(path)
      _, peak = tracemalloc.get_traced_memory()
      tracemalloc.stop()
      assert peak < 64 << 20
  assert not marker.exists()


def test_the_allow_list_is_short():
  assert len(torch_pickle.GLOBALS) <= 12


def mutants(content, where, count, seed):
  """Copies of content with some bytes changed, dropped or cut off."""
  rng = np.random.default_rng(seed)
  for _ in range(count):
    mutant = bytearray(content)
    for _ in range(rng.integers(1, 5)):
      at = int(where[rng.integers(len(where))])
      kind = rng.integers(6)
      if at >= len(mutant):
        continue
      if kind < 2:
        mutant[at] ^= 1 << rng.integers(8)
      elif kind == 2:
        mutant[at : at + 4] = rng.bytes(4)
      elif kind == 3:
        mutant[at : at + 8] = b"\xff" * 8
      elif kind == 4:
        del mutant[at : at + int(rng.integers(1, 9))]
      else:
        del mutant[at:]
    yield bytes(mutant)


def read_all(content, path):
  """Opens a mutant and reads all it has; a sound one is no fault."""
  path.write_bytes(content)
  archive = torch_zip.Archive(path)
  for name in archive.views:
    whole(archive, name)


@pytest.mark.parametrize(
  "count", [300, pytest.param(10_000, marks=pytest.mark.slow)]
)
def test_mutants_give_one_kind_of_error(count, tmp_path):
  path = tmp_path / "mutant.pth"
  ours = draft(tmp_path / "m.pth").read_bytes()
  theirs = (TORCH / "protocol4.pth").read_bytes()
  pickled = torch_pickle.dump({"a": described(), "b": described()})
  refused = 0
  tracemalloc.start()
  for seed, content in enumerate((ours, theirs)):
    # The numbers themselves may be any.
    where = [
      at
      for at in range(len(content))
      if content[at] != 0 and content[at : at + 1] != b"Z"
    ]
    for mutant in mutants(content, where, count // 3, seed):
      try:
        read_all(mutant, path)
      except errors.BadFileError:
        refused += 1
  # Without a checksum that keeps mutants from the machine.
  for mutant in mutants(pickled, range(len(pickled)), count // 3, 2):
    try:
      torch_pickle.load(mutant, "m")
    except errors.BadFileError:
      refused += 1
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert refused > count // 2
  assert peak < 64 << 20


def test_cut_off_anywhere(tmp_path):
  content = draft(tmp_path / "m.pth").read_bytes()
  for size in range(0, len(content), 7):
    (tmp_path / "cut.pth").write_bytes(content[:size])
    with pytest.raises(errors.BadFileError):
      torch_zip.Archive(tmp_path / "cut.pth")


def test_a_flipped_bit_of_the_pickle_is_seen(tmp_path):
  content = bytearray(draft(tmp_path / "m.pth").read_bytes())
  content[content.index(b"storage")] ^= 1
  (tmp_path / "m.pth").write_bytes(content)
  with pytest.raises(errors.BadFileError, match="checksum"):
    torch_zip.Archive(tmp_path / "m.pth")


def test_numbers_that_vanish_after_opening(tmp_path):
  path = draft(tmp_path / "m.pth")
  archive = torch_zip.Archive(path)
  path.write_bytes(path.read_bytes()[:700])
  with pytest.raises(errors.BadFileError, match="cut off"):
    whole(archive, "c")
  path.unlink()
  with pytest.raises(errors.BadFileError):
    whole(archive, "a")
