"""The one pickle in a .pth file: what torch.save says of a dict of tensors.

Pickle is a program for a machine that can call anything. load() is a machine
of our own that knows only the instructions torch.save emits for such a dict
and the names of GLOBALS. It imports nothing and calls nothing: a name
stands for itself, and what would be a call makes a plain record.

Format: https://docs.python.org/3/library/pickletools.html
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax import errors
from llama_jax.checkpoint import names

# 405B in eight files takes some 0.3 MB and 50,000 instructions a file.
MAX_BYTES = 4 << 20
_MAX_STEPS = 150_000
_MAX_AXES = 8


@dataclasses.dataclass(frozen=True)
class Storage:
  """A run of numbers that tensors are views of.

  Attributes:
    key: the entry data/KEY of the archive holds it.
    stored: the word for its type, such as "BF16".
    length: in numbers.
  """

  key: str
  stored: str
  length: int

  @property
  def dtype(self) -> np.dtype:
    return names.DTYPES[self.stored]


@dataclasses.dataclass(frozen=True)
class View:
  """A tensor: which numbers of a storage, by what strides.

  Attributes:
    storage: where its numbers are.
    offset: of its first, in numbers.
    shape: of at most eight axes, none of them empty.
    strides: in numbers, one an axis; none leads out of the storage.
  """

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


# A name of the pickle -> what it stands for here: a word for what is built, or
# the type of a storage.
_DICT, _TENSOR, _PARAMETER = "dict", "tensor", "parameter"
GLOBALS = {
  "collections OrderedDict": _DICT,
  "torch._utils _rebuild_tensor_v2": _TENSOR,
  "torch._utils _rebuild_parameter": _PARAMETER,
  "torch FloatStorage": "F32",
  "torch HalfStorage": "F16",
  "torch BFloat16Storage": "BF16",
}


@dataclasses.dataclass(frozen=True)
class _Global:
  meaning: str


class _Bad(Exception):
  """What is wrong, to be said with the file's name."""


_MARK = object()


def load(content: bytes, file: str) -> dict[str, View]:
  """The tensors that a pickle speaks of, by name.

  Args:
    content: of data.pkl.
    file: what messages call it.

  Raises:
    BadFileError: it is cut off or makes no sense, or holds anything else
      than a dict of tensors; nothing of it has been run.
  """
  if len(content) > MAX_BYTES:
    raise errors.BadFileError(
      f"{file} has {len(content)} bytes; {MAX_BYTES} are allowed."
    )
  try:
    found = _Machine(content).run()
    if type(found) is not dict or not found:
      raise _Bad("it holds something else than a dict of tensors")
    for name, value in found.items():
      if not isinstance(value, View):
        raise _Bad(
          f"its entry {name[:60]!r} is not a tensor; save the model's"
          " state_dict alone"
        )
      # Messages quote names: no line ends or terminal codes in them.
      if not name.isprintable():
        raise _Bad(f"it holds the tensor name {name[:40]!r}")
  except _Bad as error:
    raise errors.BadFileError(
      f"{file} is not what torch.save writes of a dict of tensors: {error}."
    ) from None
  return found


class _Machine:
  """The pickle machine, without its calls."""

  def __init__(self, content: bytes):
    self._content = content
    self._at = 0
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}

  def run(self) -> Any:
    for _ in range(_MAX_STEPS):
      start = self._at
      code = self._take(1)
      if code == b".":
        if self._at != len(self._content) or len(self._stack) != 1:
          raise _Bad("it goes on after its end")
        return self._stack[0]
      step = _STEPS.get(code)
      if step is None:
        raise _Bad(
          f"the instruction {code!r} at byte {start} is none that is run here"
        )
      step(self)
    raise _Bad(f"it has more than {_MAX_STEPS} instructions")

  def _take(self, count: int) -> bytes:
    taken = self._content[self._at : self._at + count]
    if len(taken) != count:
      raise _Bad(f"it is cut off at byte {len(self._content)}")
    self._at += count
    return taken

  def _size(self, count: int) -> int:
    return int.from_bytes(self._take(count), "little")

  def _text(self, count: int) -> str:
    try:
      return self._take(count).decode()
    except UnicodeDecodeError:
      raise _Bad(f"the text before byte {self._at} is not UTF-8") from None

  def _line(self) -> str:
    end = self._content.find(b"\n", self._at)
    if not 0 <= end - self._at <= 200:
      raise _Bad(f"the name at byte {self._at} has no end")
    text = self._text(end - self._at)
    self._at += 1
    return text

  def _push(self, value: Any) -> None:
    self._stack.append(value)

  def _pop(self) -> Any:
    if not self._stack or self._stack[-1] is _MARK:
      raise _Bad(f"nothing is there to be taken at byte {self._at}")
    return self._stack.pop()

  def _since_mark(self) -> list[Any]:
    for start in range(len(self._stack) - 1, -1, -1):
      if self._stack[start] is _MARK:
        values = self._stack[start + 1 :]
        del self._stack[start:]
        return values
    raise _Bad(f"a mark is missing at byte {self._at}")

  def _protocol(self) -> None:
    if not 2 <= self._size(1) <= 5 or self._at != 2:
      raise _Bad(f"a second pickle, or one of another age, at byte {self._at}")

  def _tuple(self, count: int) -> None:
    values = [self._pop() for _ in range(count)]
    self._push(tuple(reversed(values)))

  def _remember(self, place: int) -> None:
    value = self._pop()
    self._push(value)
    self._memo[place] = value

  def _recall(self, place: int) -> None:
    if place not in self._memo:
      raise _Bad(f"nothing was kept under {place}")
    self._push(self._memo[place])

  def _name(self, module: Any, name: Any) -> None:
    if not isinstance(module, str) or not isinstance(name, str):
      raise _Bad(f"a name is none at byte {self._at}")
    whole = f"{module} {name}"
    if whole not in GLOBALS:
      raise _Bad(
        f"it names {module[:60]!r} {name[:60]!r}, which a dict of float32,"
        " float16 or bfloat16 tensors has no need of"
      )
    self._push(_Global(GLOBALS[whole]))

  def _stacked_name(self) -> None:
    name, module = self._pop(), self._pop()
    self._name(module, name)

  def _set_items(self, items: Sequence[Any]) -> None:
    target = self._pop()
    if type(target) is not dict or len(items) % 2:
      raise _Bad(f"what is filled at byte {self._at} is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
      # Nested tuples could take for ever to hash.
      if type(key) is not str:
        raise _Bad(f"a key before byte {self._at} is no text")
      if key in target:
        raise _Bad(f"the key {key[:60]!r} occurs twice")
      target[key] = value
    self._push(target)

  def _set_item(self) -> None:
    value, key = self._pop(), self._pop()
    self._set_items((key, value))

  def _storage(self) -> None:
    match self._pop():
      case ("storage", _Global(meaning), str(key), str(), int(length)) if (
        meaning in names.DTYPES and _counts(length)
      ):
        self._push(Storage(key, meaning, length))
      case _:
        raise _Bad(f"the storage before byte {self._at} is malformed")

  def _reduce(self) -> None:
    arguments, function = self._pop(), self._pop()
    match function, arguments:
      case _Global("dict"), ():
        self._push({})
      case (
        _Global("tensor"),
        (Storage() as storage, offset, shape, strides, bool(), dict()),
      ):
        self._push(_view(storage, offset, shape, strides))
      case _Global("parameter"), (View() as view, bool(), dict()):
        self._push(view)
      case _:
        raise _Bad(f"a call before byte {self._at} is none that builds tensors")

  def _build(self) -> None:
    """The attributes of an OrderedDict: versions of modules."""
    state = self._pop()
    target = self._pop()
    if type(target) is not dict or type(state) is not dict:
      raise _Bad(f"attributes are set before byte {self._at}")
    self._push(target)

  def _long(self) -> None:
    # Eight bytes hold every number of a file.
    count = self._size(1)
    if count > 8:
      raise _Bad(f"the number at byte {self._at} has {count} bytes")
    self._push(int.from_bytes(self._take(count), "little", signed=True))


def _counts(value: Any) -> bool:
  """Whether it is a whole number, 0 or more, and no truth value."""
  return type(value) is int and value >= 0


def _view(storage: Storage, offset: Any, shape: Any, strides: Any) -> View:
  """A view that stays in its storage and is no larger."""
  for axes in (shape, strides):
    if type(axes) is not tuple or not all(map(_counts, axes)):
      raise _Bad("a tensor's shape or strides are malformed")
  if not 1 <= len(shape) == len(strides) <= _MAX_AXES or not min(shape):
    raise _Bad("a tensor has no rows, too many axes or not a stride for each")
  last = sum(
    (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
  )
  if not _counts(offset) or offset + last >= storage.length:
    raise _Bad(
      f"a tensor leads out of its storage {storage.key[:40]!r} of"
      f" {storage.length} numbers"
    )
  if math.prod(shape) > storage.length:
    raise _Bad(
      f"a tensor of {math.prod(shape)} numbers repeats those of its storage"
      f" {storage.key[:40]!r}, which has {storage.length}"
    )
  return View(storage, offset, shape, strides)


_STEPS = {
  b"\x80": _Machine._protocol,
  b"\x95": lambda m: m._take(8),  # a frame: where to read ahead
  b"(": lambda m: m._push(_MARK),
  b")": lambda m: m._push(()),
  b"}": lambda m: m._push({}),
  b"t": lambda m: m._push(tuple(m._since_mark())),
  b"\x85": lambda m: m._tuple(1),
  b"\x86": lambda m: m._tuple(2),
  b"\x87": lambda m: m._tuple(3),
  b"s": _Machine._set_item,
  b"u": lambda m: m._set_items(m._since_mark()),
  b"X": lambda m: m._push(m._text(m._size(4))),
  b"\x8c": lambda m: m._push(m._text(m._size(1))),
  b"K": lambda m: m._push(m._size(1)),
  b"M": lambda m: m._push(m._size(2)),
  b"J": lambda m: m._push(int.from_bytes(m._take(4), "little", signed=True)),
  b"\x8a": _Machine._long,
  b"N": lambda m: m._push(None),
  b"\x88": lambda m: m._push(True),
  b"\x89": lambda m: m._push(False),
  b"q": lambda m: m._remember(m._size(1)),
  b"r": lambda m: m._remember(m._size(4)),
  b"\x94": lambda m: m._remember(len(m._memo)),
  b"h": lambda m: m._recall(m._size(1)),
  b"j": lambda m: m._recall(m._size(4)),
  b"c": lambda m: m._name(m._line(), m._line()),
  b"\x93": _Machine._stacked_name,
  b"Q": _Machine._storage,
  b"R": _Machine._reduce,
  b"b": _Machine._build,
}


def dump(views: Mapping[str, View]) -> bytes:
  """The pickle of a dict of tensors, as torch.load(weights_only=True) reads."""
  words = {meaning: name for name, meaning in GLOBALS.items()}

  def name(meaning: str) -> bytes:
    return b"c" + words[meaning].replace(" ", "\n").encode() + b"\n"

  parts = [b"\x80\x02}("]
  for key, view in views.items():
    storage = view.storage
    parts += (
      _dump_text(key),
      name(_TENSOR),
      b"((",
      _dump_text("storage"),
      name(storage.stored),
      _dump_text(storage.key),
      _dump_text("cpu"),
      _dump_whole(storage.length),
      b"tQ",
      _dump_whole(view.offset),
      _dump_wholes(view.shape),
      _dump_wholes(view.strides),
      b"\x89",
      name(_DICT),
      b")RtR",
    )
  return b"".join((*parts, b"u."))


def _dump_text(text: str) -> bytes:
  raw = text.encode()
  return b"X" + len(raw).to_bytes(4, "little") + raw


def _dump_whole(value: int) -> bytes:
  if value < 1 << 31:
    return b"J" + value.to_bytes(4, "little")
  return b"\x8a\x08" + value.to_bytes(8, "little")


def _dump_wholes(values: Iterable[int]) -> bytes:
  return b"(" + b"".join(map(_dump_whole, values)) + b"t"
