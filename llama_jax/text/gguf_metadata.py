"""The metadata of a GGUF file as plain Python values.

The `gguf` package maps every string of an array as its own array, which takes
seconds for a vocabulary; this reads the header alone, in one pass. Layout:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import array
import mmap
import pathlib
import struct
import sys
from typing import Any

from llama_jax import errors

MAGIC = b"GGUF"

_SCALARS = {  # type number -> struct and array code
  0: "B",
  1: "b",
  2: "H",
  3: "h",
  4: "I",
  5: "i",
  6: "f",
  7: "?",
  10: "Q",
  11: "q",
  12: "d",
}
_STRING, _ARRAY = 8, 9


def read(path) -> dict[str, Any]:
  """Key -> number, bool, string or list of them.

  Raises:
    BadFileError: no such file, not GGUF, or its header is cut off or damaged.
  """
  path = pathlib.Path(path)
  try:
    with open(path, "rb") as file:
      if file.read(4) != MAGIC:
        raise errors.BadFileError(f"{path} is not a GGUF file.")
      with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Header(data).metadata()
  except OSError as error:
    raise errors.BadFileError(
      f"cannot read {path}: {error.strerror}."
    ) from error
  except (struct.error, UnicodeDecodeError, ValueError) as error:
    if isinstance(error, errors.UserError):
      raise
    raise errors.BadFileError(
      f"the GGUF header of {path} is cut off or damaged ({error}); fetch the"
      " file again."
    ) from error


class _Header:
  """A cursor over the header."""

  def __init__(self, data: mmap.mmap):
    self._data = data
    self._at = len(MAGIC)

  def metadata(self) -> dict[str, Any]:
    version = self._scalar("I")
    if version not in (2, 3):
      raise ValueError(f"version {version} is neither 2 nor 3")
    self._scalar("Q")  # number of tensors
    fields = {}
    for _ in range(self._scalar("Q")):
      key = self._string()
      fields[key] = self._value(self._scalar("I"))
    return fields

  def _take(self, size: int) -> bytes:
    taken = self._data[self._at : self._at + size]
    if len(taken) != size:
      raise ValueError(f"it ends {size - len(taken)} bytes early")
    self._at += size
    return taken

  def _scalar(self, code: str):
    return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

  def _string(self) -> str:
    return self._take(self._scalar("Q")).decode()

  def _value(self, kind: int, depth: int = 0) -> Any:
    if kind in _SCALARS:
      return self._scalar(_SCALARS[kind])
    if kind == _STRING:
      return self._string()
    if kind != _ARRAY or depth > 4:
      raise ValueError(f"unknown value type {kind}")
    item, count = self._scalar("I"), self._scalar("Q")
    if item not in _SCALARS:
      return [self._value(item, depth + 1) for _ in range(count)]
    code = _SCALARS[item]
    taken = self._take(count * struct.calcsize("<" + code))
    if code == "?":
      return [byte != 0 for byte in taken]
    values = array.array(code, taken)
    if sys.byteorder == "big":
      values.byteswap()
    return values.tolist()


# Key -> the role's name in Hugging Face's words.
_ROLES = {
  "bos": "bos_token",
  "eos": "eos_token",
  "unknown": "unk_token",
  "padding": "pad_token",
}


def token_names(
  fields: dict[str, Any], name: str
) -> tuple[dict[str, str], tuple[int, ...]]:
  """(role -> token text, further ids that end a turn) of tokenizer.ggml.*.

  Raises:
    BadFileError: an id lies outside the vocabulary.
  """
  tokens = fields["tokenizer.ggml.tokens"]

  def checked(key: str) -> int | None:
    id = fields.get(f"tokenizer.ggml.{key}_token_id")
    if id is not None and not 0 <= id < len(tokens):
      raise errors.BadFileError(
        f"{name}: tokenizer.ggml.{key}_token_id={id} is not below the"
        f" {len(tokens)} tokens."
      )
    return id

  named = {
    role: tokens[id]
    for key, role in _ROLES.items()
    if (id := checked(key)) is not None
  }
  stops = (checked("eot"), checked("eom"))
  return named, tuple(i for i in stops if i is not None)
