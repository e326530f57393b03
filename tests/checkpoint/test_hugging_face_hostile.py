"""Hugging Face folders, and our own model.json, from strangers."""

import json
import random
import re
import shutil
import time
import tracemalloc

import pytest

from llama_jax import errors
from llama_jax.checkpoint import hugging_face, store
from llama_jax.model import sizes

NANO = sizes.get("nano")
EXTREMES = (
  *("-1", "0", "1", "1e400", "-1e400", "NaN", "null", "true", '"x"', "[]"),
  *("{}", "2147483648", "4294967296", "9223372036854775807"),
  *("18446744073709551615", "1" * 400, "0.5", "[[[[[[[[]]]]]]]]"),
)
SPLICES = (
  b'"',
  b"{",
  b"}",
  b"[",
  b"]",
  b",",
  b":",
  b"\\u0000",
  b"\xff",
  b"../",
)
# S1 and S2 of RELIABILITY.md.
SECONDS, MAX_MUTANT, MAX_HAND_MADE = 1.0, 256 << 20, 64 << 20


@pytest.fixture(scope="module")
def sound(tmp_path_factory, random_params):
  """Shards with an index, and an orbax model beside them."""
  folder = tmp_path_factory.mktemp("sound")
  params = random_params(NANO)
  hugging_face.write(folder / "hf", NANO, params, None, shard_bytes=200_000)
  store.write(folder / "orbax", NANO, params, None)
  return folder


def mutant_of(content: bytes, rng: random.Random) -> bytes:
  """Changes words of JSON more often than single bytes."""
  for _ in range(rng.choice((1, 1, 1, 2, 5))):
    kind = rng.randrange(7)
    at = rng.randrange(max(1, len(content)))
    if kind <= 2:  # a value or key becomes something else
      words = list(re.finditer(rb'"[^"]*"|[-\d.]+', content[: 1 << 16]))
      if words:
        word = rng.choice(words)
        other = rng.choice(
          (*EXTREMES, rng.choice(words).group().decode("latin-1"))
        )
        other = other.encode("latin-1")
        content = content[: word.start()] + other + content[word.end() :]
    elif kind == 3:
      content = content[:at] + rng.choice(SPLICES) + content[at:]
    elif kind == 4:
      content = content[:at] + content[at + rng.randrange(1, 30) :]
    elif kind == 5 and content:
      changed = bytearray(content)
      changed[at] ^= 1 << rng.randrange(8)
      content = bytes(changed)
    else:
      content = content[:at]
  return content


def mutants_are_refused_or_read(sound, tmp_path, count, seed):
  """How many of the mutants were refused, of each file."""
  rng = random.Random(seed)
  shutil.copytree(sound / "hf", tmp_path / "hf")
  shutil.copytree(sound / "orbax", tmp_path / "orbax")
  (shard, *_) = sorted((tmp_path / "hf").glob("*.safetensors"))
  files = {
    tmp_path / "hf" / "config.json": hugging_face.read,
    tmp_path / "hf" / hugging_face.INDEX: hugging_face.read,
    shard: hugging_face.read,
    tmp_path / "orbax" / "model.json": store.read_config,
  }
  refused = {}
  for file, read in files.items():
    content = file.read_bytes()
    for _ in range(count):
      file.write_bytes(mutant_of(content, rng))
      # A millisecond of a busy machine is not the reader's.
      began = time.process_time()
      tracemalloc.start()
      try:
        read(file.parent)
      except errors.UserError as error:
        refused[file.name] = refused.get(file.name, 0) + 1
        assert "\n" not in str(error), error
      finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
      assert peak < MAX_MUTANT
      assert time.process_time() - began < SECONDS + 4  # traced: slower
    file.write_bytes(content)
  return refused


def test_mutants_give_one_kind_of_error(sound, tmp_path):
  refused = mutants_are_refused_or_read(sound, tmp_path, 150, seed=1)
  # Some are sound: a flipped bit of a weight, a key that nobody reads.
  assert len(refused) == 4 and min(refused.values()) > 50, refused


@pytest.mark.slow
def test_ten_thousand_mutants(sound, tmp_path):
  refused = mutants_are_refused_or_read(sound, tmp_path, 10_000, seed=2)
  assert len(refused) == 4 and min(refused.values()) > 4000, refused


def packed(header: dict | bytes, data: bytes = b"", length=None) -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  return length.to_bytes(8, "little") + text + data


def entry(shape, begin, end, dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


NAME = "model.embed_tokens.weight"
HAND_MADE = {
  "length of the header beyond the file": packed(b"{}", length=2**40),
  "length of the header 2^64 - 1": packed(b"{}", length=2**64 - 1),
  "header that is no object": packed(b"[1, 2]"),
  "header of nests": packed(b"[" * 100_000),
  "product of dims overflows": packed({NAME: entry([2**32, 2**32], 0, 0)}),
  "dims of 2^63": packed({NAME: entry([2**63], 0, 4)}, b"1234"),
  "negative dims": packed({NAME: entry([-4, -4], 0, 64)}, bytes(64)),
  "offset beyond all numbers": packed(
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e400]}}'
  ),
  "begin after end": packed({NAME: entry([1], 4, 0)}, b"1234"),
  "end beyond the file": packed({NAME: entry([512, 64], 0, 512 * 64 * 4)}),
  "hole": packed({"a": entry([1], 0, 4), NAME: entry([1], 8, 12)}, bytes(12)),
  "overlap": packed({"a": entry([1], 0, 4), NAME: entry([1], 0, 4)}, bytes(4)),
  "bytes that no tensor has": packed({NAME: entry([1], 0, 4)}, bytes(8)),
  "size that is not the shape's": packed({NAME: entry([3], 0, 4)}, bytes(4)),
  "unknown dtype": packed({NAME: entry([4], 0, 4, "U7")}, bytes(4)),
  "integers": packed({NAME: entry([512, 64], 0, 32768, "I8")}, bytes(32768)),
  "name with a line end": packed({"a\nb": entry([1], 0, 4)}, bytes(4)),
  "million names": packed(
    b"{" + b",".join(b'"%d":{}' % n for n in range(10**6)) + b"}"
  ),
}


@pytest.mark.parametrize("case", HAND_MADE)
def test_hand_made(case, sound, tmp_path):
  folder = tmp_path / "hf"
  folder.mkdir()
  shutil.copy(sound / "hf" / "config.json", folder)
  (folder / hugging_face.WEIGHTS).write_bytes(HAND_MADE[case])
  tracemalloc.start()
  try:
    with pytest.raises(errors.BadFileError, match=str(folder)):
      hugging_face.read(folder)
    assert tracemalloc.get_traced_memory()[1] < MAX_HAND_MADE
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize(
  "place",
  [
    "../hf2/model.safetensors",
    "/etc/passwd",
    "..",
    "a/b.safetensors",
    "a\\b.safetensors",
    "model.safetensors\0",
    "",
    7,
    None,
    ["x"],
  ],
)
def test_an_index_that_points_elsewhere(place, sound, tmp_path):
  folder = tmp_path / "hf"
  shutil.copytree(sound / "hf", folder)
  index = json.loads((folder / hugging_face.INDEX).read_text())
  index["weight_map"][NAME] = place
  (folder / hugging_face.INDEX).write_text(json.dumps(index))
  with pytest.raises(errors.BadFileError):
    hugging_face.read(folder)
