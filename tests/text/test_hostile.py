"""Mutants of sound tokenizer files (RELIABILITY.md, S1 and S2).

A child process loads them, so that a crash of a native library is a failure
here and not the end of the run:

  python test_hostile.py KIND FOLDER COUNT SEED
"""

import copy
import json
import pathlib
import random
import resource
import struct
import subprocess
import sys
import time
import traceback
import tracemalloc

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from llama_jax import errors
from llama_jax import text as text_lib
from llama_jax.text import byte_level, files

_SECONDS = 1.0  # of processor time, so that a busy machine is no failure
_MEGABYTES = 256
_PROSE = pathlib.Path(__file__).read_text()
_SAMPLE = "Hello <s> wörld 你好\t\r\n 12345 <|eot_id|>  \0"

_CONFIG = {
  "bos_token": {"content": "<s>", "lstrip": False},
  "eos_token": "</s>",
  "add_bos_token": True,
  "additional_special_tokens": ["<|eot_id|>"],
  "added_tokens_decoder": {
    "500": {"content": "<|eot_id|>", "special": True, "rstrip": True},
    "501": {"content": "<tool>", "special": False},
  },
  "chat_template": [{"name": "default", "template": "{{ messages }}"}],
  "model_max_length": 1e30,
}


def _trained_json():
  library = tokenizers.Tokenizer(tokenizers.models.BPE())
  library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  library.decoder = tokenizers.decoders.ByteLevel()
  library.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 0)]
  )
  library.train_from_iterator(
    [_PROSE],
    tokenizers.trainers.BpeTrainer(
      vocab_size=500,
      special_tokens=["<s>", "</s>"],
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  return json.loads(library.to_str())


def _ranks():
  """256 bytes and the joins of a trained vocabulary, as Llama 3's file."""
  tokens = [bytes([b]) for b in range(256)]
  for left, right in _trained_json()["model"]["merges"]:
    tokens.append(byte_level.in_bytes(left + right))
  return byte_level.ranks_lines(tokens)


def _sentencepiece(folder):
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(_PROSE.splitlines()),
    model_prefix=str(folder / "small"),
    vocab_size=400,
    model_type="bpe",
    byte_fallback=True,
    split_digits=True,
    # The default, so that there is a table of characters to damage.
    normalization_rule_name="nmt_nfkc",
    minloglevel=2,
    num_threads=1,
  )
  return (folder / "small.model").read_bytes()


def _sound(kind, folder):
  """Files of a sound folder: name -> content. The first one is mutated."""
  if kind == "tokenizer.json":
    return {kind: json.dumps(_trained_json()).encode()}
  if kind == "tokenizer_config.json":
    return {
      kind: json.dumps(_CONFIG).encode(),
      "tokenizer.json": json.dumps(_trained_json()).encode(),
    }
  if kind == "tokenizer.model":
    return {kind: _sentencepiece(folder)}
  if kind == "identity.model":  # a Llama's own, with nothing to normalise
    proto = model_pb2.ModelProto.FromString(_sentencepiece(folder))
    proto.normalizer_spec.precompiled_charsmap = b""
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    return {"tokenizer.model": proto.SerializeToString()}
  if kind == "spaced.json":  # a SentencePiece model as transformers saves it
    for name, content in _sound("identity.model", folder).items():
      (folder / name).write_bytes(content)
    text_lib.load_tokenizer(folder).save(folder)
    (folder / "tokenizer.model").unlink()
    return {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
  if kind in ("gguf", "gguf-llama"):
    other = "tiktoken" if kind == "gguf" else "identity.model"
    for name, content in _sound(other, folder).items():
      (folder / name).write_bytes(content)
    fields = text_lib.load_tokenizer(folder).gguf_metadata()
    (folder / "tokenizer.model").unlink()
    return {_FIELDS: json.dumps(fields).encode()}
  assert kind == "tiktoken"
  return {"tokenizer.model": _ranks()}


_FIELDS = "fields"
_KINDS = (
  "tokenizer.json",
  "tokenizer_config.json",
  "tokenizer.model",
  "identity.model",
  "tiktoken",
  "gguf",
  "gguf-llama",
  "spaced.json",
)
_ODD_BYTES = (
  b"\xff" * 8,
  b"\0" * 8,
  b"\x80" * 12,
  b"99999999999999999999",
  b"-1",
  b"1e999",
  b'"\\ud800"',
  b"null",
  b"[" * 3000,
  b'{"a":' * 3000,
  b"\n",
)
_ODD_VALUES = (
  None,
  True,
  -1,
  4_000_000_000,
  2**64,
  10**400,
  1e300,
  float("nan"),
  "",
  "\ud800",
  "x" * 100_000,
  "\0",
  [],
  {},
  [[[]]],
  ["a", "b"],
  {"content": 1},
  {"type": "Sequence"},
)


def _mutate(content, pick):
  if content[:1] == b"{" and pick.random() < 0.5:
    return _mutate_json(content, pick)
  data = bytearray(content)
  for _ in range(pick.choice((1, 1, 1, 2, 8))):
    at, end = sorted(pick.randrange(len(data) + 1) for _ in range(2))
    end = min(end, at + pick.choice((1, 10, 100, 10_000)))
    kind = pick.randrange(6)
    if kind == 0 and at < len(data):
      data[at] ^= 1 << pick.randrange(8)
    elif kind == 1 and at < len(data):
      data[at] = pick.randrange(256)
    elif kind == 2:
      del data[at:]
    elif kind == 3:
      data[at:at] = data[at:end] * pick.choice((1, 2, 50))
    elif kind == 4:
      there = pick.randrange(len(data) + 1)
      data[there:there] = data[at:end]
    else:
      data[at:at] = pick.choice(_ODD_BYTES)
    if not data:
      break
  return bytes(data)


def _mutate_json(content, pick):
  """Another value at any place of the document, keys included."""
  document = json.loads(content)
  for _ in range(pick.choice((1, 1, 2))):
    node = document
    while True:
      keys = list(node) if isinstance(node, dict) else range(len(node))
      if not keys:
        break
      key = pick.choice(list(keys))
      inner = node[key]
      if isinstance(inner, dict | list) and inner and pick.random() < 0.8:
        node = inner
        continue
      change = pick.randrange(4)
      if change == 0:
        del node[key]
      elif change == 1 and isinstance(node, dict):
        node[pick.choice(("id", "type", "", "999999999", "vocab"))] = inner
      elif change == 2 and isinstance(inner, int) and inner < 2**60:
        node[key] = pick.choice((inner + 1, -inner, inner << 20, inner + 0.5))
      else:
        node[key] = copy.deepcopy(pick.choice(_ODD_VALUES))
      break
  return json.dumps(document).encode()


def _use(folder):
  """What a program does with a tokenizer that it has loaded."""
  fields = folder / _FIELDS
  if fields.exists():  # as the reader of a GGUF header hands them on
    tokenizer = text_lib.from_gguf_metadata(
      files.parse_json(fields.read_bytes(), "fields")
    )
  else:
    tokenizer = text_lib.load_tokenizer(folder)
  ids = tokenizer.encode(_SAMPLE)
  tokenizer.encode_with_special(_SAMPLE)
  tokenizer.decode(ids)
  tokenizer.decode(range(min(tokenizer.vocab_size, 2000)), skip_special=False)
  tokenizer.save(folder / "saved")
  tokenizer.gguf_metadata()
  return tokenizer


def _peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _run(kind, folder, count, seed):
  """Loads mutants; writes what went wrong as JSON to folder/report.json."""
  folder.mkdir()
  sound = _sound(kind, folder)
  for name, content in sound.items():
    (folder / name).write_bytes(content)
  _use(folder)
  name, content = next(iter(sound.items()))
  report = {"bad": [], "refused": 0, "slowest": 0.0, "base": _peak()}
  for n in range(seed, seed + count):
    (folder / "current").write_text(str(n))  # for the case of a crash
    (folder / name).write_bytes(_mutate(content, random.Random(n)))
    start = time.process_time()
    try:
      _use(folder)
    except errors.UserError:
      report["refused"] += 1
    except BaseException:  # a panic in Rust is no Exception
      report["bad"].append([n, traceback.format_exc()[-1500:]])
    seconds = time.process_time() - start
    if seconds > _SECONDS:
      report["bad"].append([n, f"took {seconds:.1f} s"])
    report["slowest"] = max(report["slowest"], seconds)
  report["peak"] = _peak()
  (folder / "report.json").write_text(json.dumps(report))


def _check(kind, tmp_path, count, seed):
  folder = tmp_path / "mutants"
  done = subprocess.run(
    [sys.executable, __file__, kind, str(folder), str(count), str(seed)],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
  at = folder / "current"
  where = at.read_text() if at.exists() else "the sound file"
  assert done.returncode == 0, f"died at {where}: {done.stderr[-2000:]}"
  report = json.loads((folder / "report.json").read_text())
  assert not report["bad"], report["bad"][:3]
  # Mutants that nothing refuses would say that nothing was tested.
  assert report["refused"] > count // 10
  assert report["peak"] - report["base"] < _MEGABYTES, report


@pytest.mark.parametrize("kind", _KINDS)
def test_mutants_end_in_our_errors(kind, tmp_path):
  _check(kind, tmp_path, count=200, seed=0)


def _document(**changes):
  """A small sound tokenizer.json, with changes to its model or top level."""
  model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
  whole = {"added_tokens": [], "decoder": {"type": "Fuse"}, "model": model}
  for key, value in changes.items():
    (whole if key in ("decoder", "added_tokens") else model)[key] = value
  return json.dumps(whole).encode()


def _token(id, content="<x>"):
  return byte_level.added_token(content, id, special=True)


def _damaged_charsmap(tmp_path):
  """A table of characters whose first offset leads out of it."""
  proto = model_pb2.ModelProto.FromString(_sentencepiece(tmp_path))
  table = bytearray(proto.normalizer_spec.precompiled_charsmap)
  table[4:8] = ((0x1FFFFF << 10) | (1 << 9)).to_bytes(4, "little")
  proto.normalizer_spec.precompiled_charsmap = bytes(table)
  return proto.SerializeToString()


def _llama2c(size):
  head = struct.pack("<i", 7)
  sound = b"".join(struct.pack("<fi", 0, 1) + b"a" for _ in range(300))
  return head + sound + struct.pack("<fi", 0, size)


_JSON, _CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_HAND_MADE = {
  **{
    f"id {id}": {_JSON: _document(vocab={"a": 0, "b": 1, "ab": id})}
    for id in (-1, 2**31, 2**32 - 1, 2**64, 1.5, True, "2", None)
  },
  **{
    f"added id {id}": {_JSON: _document(added_tokens=[_token(id)])}
    for id in (-1, 2**31, 2**32 - 1, 2**64, 1.5, "2", None)
  },
  **{
    f"id {id[:9]} in the folder": {
      _JSON: _document(),
      _CONFIG_FILE: json.dumps(
        {"added_tokens_decoder": {id: {"content": "<x>", "special": True}}}
      ).encode(),
    }
    for id in ("-1", "9" * 5000, "2147483648", "\u00b2", "")
  },
  "a prefix that merges lack": {
    _JSON: _document(continuing_subword_prefix="##")
  },
  "a decoder that lengthens": {
    _JSON: _document(
      decoder={
        "type": "Replace",
        "pattern": {"String": "a"},
        "content": "a" * 10**6,
      }
    )
  },
  "a merge of nothing": {_JSON: _document(merges=["a c"])},
  "deep": {_JSON: b'{"model":' + b"[" * 10**6},
  "half a surrogate": {_JSON: _document(added_tokens=[_token(3, "\ud800")])},
  "a template that is no text": {
    _JSON: _document(),
    "chat_template.jinja": b"\xff\xfe",
  },
  "a long rank": {"tokenizer.model": b"IQ== " + b"1" * 10**6},
  "a long token": {"tokenizer.model": b"QUFB" * 10**6 + b" 0\n"},
  "a token of 2 GiB": {"tokenizer.bin": _llama2c(2**31 - 1)},
  "a token of less than nothing": {"tokenizer.bin": _llama2c(-1)},
}


@pytest.mark.parametrize("case", _HAND_MADE)
def test_hand_made_files_are_refused(case, tmp_path):
  for name, content in _HAND_MADE[case].items():
    (tmp_path / name).write_bytes(content)
  tracemalloc.start()
  try:
    with pytest.raises(errors.UserError):
      text_lib.load_tokenizer(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 64 << 20


@pytest.mark.parametrize("sound", ["model", "ranks"])
def test_an_id_far_beyond_the_vocabulary_is_refused(sound, tmp_path):
  content = _ranks() if sound == "ranks" else _sentencepiece(tmp_path)
  (tmp_path / "tokenizer.model").write_bytes(content)
  (tmp_path / "added_tokens.json").write_text('{"<x>": 2147483648}')
  with pytest.raises(errors.BadFileError, match="2147483648"):
    text_lib.load_tokenizer(tmp_path)


def test_a_table_of_characters_that_leads_out_is_refused(tmp_path):
  # sentencepiece before 0.2.3 ends the process at it.
  (tmp_path / "tokenizer.model").write_bytes(_damaged_charsmap(tmp_path))
  with pytest.raises(errors.BadFileError, match="charsmap"):
    text_lib.load_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.slow
@pytest.mark.parametrize("kind", _KINDS)
def test_ten_thousand_mutants_end_in_our_errors(kind, tmp_path):
  _check(kind, tmp_path, count=10_000, seed=1_000_000)


if __name__ == "__main__":
  _run(sys.argv[1], pathlib.Path(sys.argv[2]), *map(int, sys.argv[3:5]))
