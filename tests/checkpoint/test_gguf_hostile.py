"""GGUF files from strangers: one kind of error, in little memory."""

import resource
import struct
import tracemalloc

import numpy as np
import pytest

from llama_jax import errors, text
from llama_jax.checkpoint import gguf
from llama_jax.model import config as config_lib
from llama_jax.text import gguf_header

BASE = config_lib.LlamaConfig(
  vocab_size=512,
  embed_dim=32,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=64,
  mlp_dim=32,
  norm_eps=1e-5,
  rope_theta=5e5,
  rope_scaling=config_lib.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
  context_length=131072,
  tied_embeddings=False,
)
# S2 of RELIABILITY.md; S1 grants a mutant 256 MiB.
MAX_HAND_MADE, MAX_MUTANT = 64 << 20, 256 << 20


@pytest.fixture(scope="module")
def sound(tmp_path_factory, random_params, tokenizer_folder):
  """A whole file with a tokenizer, factors, F32 and Q8_0, as bytes."""
  path = tmp_path_factory.mktemp("sound") / "m.gguf"
  params = random_params(BASE)
  tokenizer = text.load_tokenizer(tokenizer_folder)
  gguf.write(path, BASE, params, tokenizer, quantize="Q8_0")
  assert gguf.read(path)[0] == BASE
  return path.read_bytes()


class Scenes:
  """Makes mutants of a file; most hit numbers of its header."""

  EXTREMES = (
    *(0, 1, 3, 31, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 33, 2**64 - 1),
  )

  def __init__(self, whole, path, seed):
    path.write_bytes(whole)
    self.whole = whole
    self.rng = np.random.default_rng(seed)
    self.start = gguf_header.read(path).data_start
    # Words, and what lies before and behind each: lengths, types, numbers.
    words = [b"general.", b"llama.", b"tokenizer.", b"blk.", b".weight"]
    self.spots = [
      place
      for word in words
      for place in range(self.start)
      if whole.startswith(word, place)
    ]

  def mutant(self) -> bytes:
    mutant = bytearray(self.whole)
    for _ in range(self.rng.integers(1, 4)):
      self.change(mutant)
    return bytes(mutant)

  def change(self, mutant: bytearray) -> None:
    rng = self.rng
    where = int(rng.integers(self.start))
    if rng.random() < 0.7:
      where = int(rng.choice(self.spots) + rng.integers(-12, 60))
    where = min(max(where, 0), len(mutant) - 1)
    kind = rng.integers(7)
    if kind == 0:
      mutant[where] ^= 1 << rng.integers(8)
    elif kind == 1:
      value = self.EXTREMES[rng.integers(len(self.EXTREMES))]
      mutant[where : where + 8] = struct.pack("<Q", value)
    elif kind == 2:
      value = self.EXTREMES[rng.integers(len(self.EXTREMES))] % 2**32
      mutant[where : where + 4] = struct.pack("<I", value)
    elif kind == 3:
      mutant[where : where + 8] = rng.bytes(8)
    elif kind == 4:
      del mutant[where + 1 : where + rng.integers(2, 40)]
    elif kind == 5:
      other = int(rng.choice(self.spots))
      mutant[where : where + 24] = self.whole[other : other + 24]
    else:
      del mutant[rng.integers(1, len(mutant) + 1) :]


def count_refused(whole, path, number, seed):
  scenes = Scenes(whole, path, seed)
  refused = 0
  for _ in range(number):
    path.write_bytes(scenes.mutant())
    try:
      gguf.read(path)
    except errors.UserError as error:
      refused += 1
      assert "\n" not in str(error) and len(str(error)) < 2000
  return refused


def test_mutants_give_one_kind_of_error(sound, tmp_path):
  """Some mutants are sound: a changed name of the model, another eps."""
  assert count_refused(sound, tmp_path / "mutant.gguf", 300, seed=1) > 200


@pytest.mark.slow
def test_ten_thousand_mutants(sound, tmp_path):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert count_refused(sound, tmp_path / "mutant.gguf", 10_000, seed=2) > 7000
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert (after - before) * 1024 < MAX_MUTANT


def word(value: str) -> bytes:
  raw = value.encode()
  return struct.pack("<Q", len(raw)) + raw


def u32(key: str, value: int) -> bytes:
  return word(key) + struct.pack("<II", 4, value)


def array(key: str, kind: int, count: int, content: bytes = b"") -> bytes:
  return word(key) + struct.pack("<IIQ", 9, kind, count) + content


def tensor(name: str, dims, kind: int, offset: int, num_dims=None) -> bytes:
  return (
    word(name)
    + struct.pack("<I", len(dims) if num_dims is None else num_dims)
    + struct.pack(f"<{len(dims)}Q", *dims)
    + struct.pack("<IQ", kind, offset)
  )


def file_of(keys=(), tensors=(), num_keys=None, num_tensors=None, size=4096):
  """A file by hand: metadata, tensors, and size bytes of data.

  num_keys, num_tensors: what it claims, where that is not the truth.
  """
  keys = [word("general.architecture") + b"\x08\0\0\0" + word("llama"), *keys]
  head = b"GGUF" + struct.pack(
    "<IQQ",
    3,
    len(tensors) if num_tensors is None else num_tensors,
    len(keys) if num_keys is None else num_keys,
  )
  head += b"".join([*keys, *tensors])
  return head + bytes(-len(head) % 32 + size)


MOST = 2**64 - 1
F32, Q8_0, Q4_K = 0, 8, 12
# name: (the file, what the error says of it).
HAND_MADE = {
  "nothing": (b"", "is empty"),
  "magic alone": (b"GGUF", "at byte 4"),
  "a zip": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
  "version 1": (b"GGUF" + bytes([1, 0, 0, 0]) + bytes(100), "GGUF version 1"),
  "big endian": (b"GGUF" + bytes([0, 0, 0, 3]) + bytes(100), "big-endian"),
  "2^64-1 tensors": (
    file_of(num_tensors=MOST),
    "claims 18446744073709551615 tensors",
  ),
  "2^63 tensors": (
    file_of(num_tensors=2**63),
    "claims 9223372036854775808 tensors",
  ),
  "2^64-1 keys": (file_of(num_keys=MOST), "18446744073709551615 keys"),
  "as many keys as fit": (
    file_of(num_keys=300, size=4096),
    "the key  occurs twice",
  ),
  "many tensors": (
    file_of(num_tensors=10**6),
    "claims 1000000 tensors",
  ),
  "long key": (
    file_of([struct.pack("<Q", MOST) + bytes(64)]),
    "a name claims 18446744073709551615",
  ),
  "key of 2 MB": (file_of([u32("k" * 2**21, 1)]), "a name claims 2097152"),
  "long string": (
    file_of([word("k") + struct.pack("<IQ", 8, MOST) + bytes(64)]),
    "should reach byte 18446744073709551705",
  ),
  "string past the end": (
    file_of([word("k") + struct.pack("<IQ", 8, 10**6) + bytes(64)]),
    "should reach byte 1000090",
  ),
  "array of 2^64-1 bytes": (
    file_of([array("k", 0, MOST, bytes(64))]),
    "claim 18446744073709551615 items",
  ),
  "array of 2^61 u64": (
    file_of([array("k", 10, 2**61, bytes(64))]),
    "claim 2305843009213693952 items",
  ),
  "array of 2^64-1 strings": (
    file_of([array("k", 8, MOST, bytes(64))]),
    "claim 18446744073709551615 items",
  ),
  "array of 16 million": (
    file_of([array("k", 0, 1 << 24)]),
    "claim 16777216 items",
  ),
  "5 million empty strings": (
    file_of([array("k", 8, 5 * 10**6)]),
    "claim 5000000 items",
  ),
  "array of arrays": (file_of([array("k", 9, 2, bytes(64))]), "unknown type 9"),
  "unknown type": (
    file_of([word("k") + struct.pack("<I", 13) + bytes(8)]),
    "unknown type 13",
  ),
  "key twice": (file_of([u32("k", 1), u32("k", 1)]), "the key k occurs twice"),
  "architecture twice": (
    file_of([word("general.architecture") + b"\x08\0\0\0" + word("llama")]),
    "general.architecture occurs twice",
  ),
  "key with a line end": (file_of([u32("k\n\x1b[2J", 1)]), "a name is 'k"),
  "key that is no UTF-8": (
    file_of([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1)]),
    "not UTF-8",
  ),
  "alignment 0": (file_of([u32("general.alignment", 0)]), "no power of 2"),
  "alignment 24": (file_of([u32("general.alignment", 24)]), "no power of 2"),
  "alignment 2^31": (
    file_of([u32("general.alignment", 2**31)], [tensor("t", (32,), F32, 0)]),
    "need 2147483776 bytes",
  ),
  "alignment a string": (
    file_of([word("general.alignment") + b"\x08\0\0\0" + word("32")]),
    "no power of 2",
  ),
  "no dimensions": (file_of(tensors=[tensor("t", (), F32, 0)]), "0 dimensions"),
  "five dimensions": (
    file_of(tensors=[tensor("t", (1,) * 5, F32, 0)]),
    "5 dimensions",
  ),
  "2^32-1 dimensions": (
    file_of(tensors=[tensor("t", (1,), F32, 0, num_dims=2**32 - 1)]),
    "4294967295 dimensions",
  ),
  "a dimension of 0": (
    file_of(tensors=[tensor("t", (32, 0), F32, 0)]),
    "the shape [0, 32]",
  ),
  "dims that overflow": (
    file_of(tensors=[tensor("t", (2**32, 2**32 + 1), F32, 0)]),
    "need 73786976312018075776 bytes",
  ),
  "four dims that overflow": (
    file_of(tensors=[tensor("t", (2**16, 2**16, 2**16, 2**16), F32, 0)]),
    "need 73786976294838206592 bytes",
  ),
  "a dimension of 2^64-1": (
    file_of(tensors=[tensor("t", (MOST,), F32, 0)]),
    "need 73786976294838206588 bytes",
  ),
  "quantised overflow": (
    file_of(tensors=[tensor("t", (2**63, 2), Q8_0, 0)]),
    "need 19599665578316398720 bytes",
  ),
  "unknown tensor type": (
    file_of(tensors=[tensor("t", (32,), 999, 0)]),
    "unknown type 999",
  ),
  "a type that was removed": (
    file_of(tensors=[tensor("t", (32,), 4, 0)]),
    "unknown type 4",
  ),
  "int64 weights": (file_of(tensors=[tensor("t", (32,), 27, 0)]), "type I64"),
  "half a block of Q8_0": (
    file_of(tensors=[tensor("t", (48, 2), Q8_0, 0)]),
    "multiple of 32",
  ),
  "half a block of Q4_K": (
    file_of(tensors=[tensor("t", (128, 2), Q4_K, 0)]),
    "multiple of 256",
  ),
  "blocks across rows": (
    file_of(tensors=[tensor("t", (16, 2), Q8_0, 0)]),
    "multiple of 32",
  ),
  "first offset": (
    file_of(tensors=[tensor("t", (32,), F32, 32)]),
    "offset 32 of",
  ),
  "offset 2^64-32": (
    file_of(tensors=[tensor("t", (32,), F32, 2**64 - 32)]),
    "offset 18446744073709551584",
  ),
  "odd offset": (
    file_of(tensors=[tensor("t", (32,), F32, 0), tensor("u", (32,), F32, 129)]),
    "offset 129",
  ),
  "a hole": (
    file_of(tensors=[tensor("t", (32,), F32, 0), tensor("u", (32,), F32, 160)]),
    "offset 160",
  ),
  "an overlap": (
    file_of(tensors=[tensor("t", (32,), F32, 0), tensor("u", (32,), F32, 96)]),
    "offset 96",
  ),
  "the same place twice": (
    file_of(tensors=[tensor("t", (32,), F32, 0), tensor("u", (32,), F32, 0)]),
    "offset 0 of",
  ),
  "tensor twice": (
    file_of(tensors=[tensor("t", (32,), F32, 0), tensor("t", (32,), F32, 128)]),
    "the tensor t occurs twice",
  ),
  "past the end": (
    file_of(tensors=[tensor("t", (2048,), F32, 0)]),
    "need 8320 bytes",
  ),
  "tensor name of 2 MB": (
    file_of(tensors=[tensor("t" * 2**21, (32,), F32, 0)]),
    "a name claims 2097152",
  ),
  "no keys of llama": (
    file_of(tensors=[tensor("t", (32,), F32, 0)]),
    "llama.embedding_length=None",
  ),
}


@pytest.mark.parametrize("case", HAND_MADE)
def test_hand_made(case, tmp_path):
  path = tmp_path / "m.gguf"
  content, message = HAND_MADE[case]
  path.write_bytes(content)
  tracemalloc.start()
  try:
    for read in (gguf.read, gguf.read_config):
      with pytest.raises(errors.BadFileError) as caught:
        read(path)
      assert str(path) in str(caught.value) and message in str(caught.value)
      assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
      assert len(str(caught.value)) < 2000
    assert tracemalloc.get_traced_memory()[1] < MAX_HAND_MADE
  finally:
    tracemalloc.stop()


def test_a_forged_shape_costs_nothing(sound, tmp_path):
  """A config that fits no tensor is refused before weights are read."""
  path = tmp_path / "m.gguf"
  for key, size in (("vocab_size", 2**31), ("block_count", 2**31 - 1)):
    place = sound.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
    forged = bytearray(sound)
    forged[place : place + 4] = struct.pack("<I", size)
    path.write_bytes(forged)
    tracemalloc.start()
    try:
      with pytest.raises(errors.BadFileError, match=str(size)):
        gguf.read(path)
      assert tracemalloc.get_traced_memory()[1] < MAX_HAND_MADE
    finally:
      tracemalloc.stop()


def test_what_is_no_file(tmp_path):
  for path in (tmp_path, tmp_path / "absent.gguf", "/dev/zero", "a\0b"):
    with pytest.raises(errors.BadFileError):
      gguf.read(path)
