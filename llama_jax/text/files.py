"""Files of others, read with one kind of error.

Whatever is wrong with one, absent or a pipe or cut off, ends in BadFileError
that names it.
"""

import contextlib
import json
import os
import pathlib
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from llama_jax import errors

# The largest known to us, a tokenizer_config.json, has some 0.3 MB.
MAX_JSON_BYTES = 16 << 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """A file to read; what goes wrong while it is open is BadFileError too."""
  try:
    # Opening a pipe would wait for ever.
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise errors.BadFileError(f"{os.fspath(path)} is not a file.")
    with open(path, "rb") as file:
      yield file
  except errors.UserError:
    raise
  except (OSError, ValueError) as error:  # ValueError: NUL in a path
    reason = getattr(error, "strerror", None) or error
    raise errors.BadFileError(
      f"cannot read {os.fspath(path)}: {reason}."
    ) from error


def read_json(
  path: pathlib.Path, pairs_hook: Callable[[list], dict] | None = None
) -> dict[str, Any]:
  """The JSON object of a file; pairs_hook makes each object of its pairs."""
  with opened(path) as file:
    if os.fstat(file.fileno()).st_size > MAX_JSON_BYTES:
      raise errors.BadFileError(
        f"{path} has more than the {MAX_JSON_BYTES} bytes that are allowed."
      )
    content = file.read()
  value = parse_json(content, str(path), pairs_hook)
  if not isinstance(value, dict):
    raise errors.BadFileError(f"{path} does not hold a JSON object.")
  return value


def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A pairs_hook that refuses a key that occurs twice: readers differ in which
  they believe."""
  value = dict(pairs)
  if len(value) != len(pairs):
    raise ValueError("a key occurs twice")
  return value


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
  """The path of a plain file of a folder of weights.

  Links may lead to where a Hugging Face cache keeps the files of a snapshot,
  ../../blobs (one deeper for original/), and nowhere else.

  Raises:
    BadFileError: the name leads elsewhere, or to something that is no file.
  """
  path = folder / name
  if name != path.name or "\\" in name or "\0" in name or name in (".", ".."):
    raise errors.BadFileError(
      f"{folder} names the file {name!r}; only plain names of files in the"
      " folder are opened."
    )
  try:
    real, home = path.resolve(strict=True), folder.resolve()
    caches = [parent / "blobs" for parent in home.parents[1:3]]
    if real.parent not in (home, *caches):
      raise errors.BadFileError(
        f"{path} is a link to {real}, outside the folder; copy the file."
      )
    # Opening a pipe would wait for ever.
    if not stat.S_ISREG(real.stat().st_mode):
      raise errors.BadFileError(f"{path} is not a file.")
  except (OSError, RuntimeError) as error:
    raise errors.BadFileError(f"{path} cannot be read: {error}.") from error
  return path


def parse_json(
  content: bytes, name: str, pairs_hook: Callable[[list], dict] | None = None
) -> Any:
  """The JSON value of what the file `name` holds."""
  try:
    value = json.loads(content, object_pairs_hook=pairs_hook)
    # Half a surrogate pair is let through, and could never be written again.
    if _SURROGATE.search(content):
      json.dumps(value, ensure_ascii=False).encode()
  except (ValueError, RecursionError) as error:
    raise errors.BadFileError(f"{name} is not sound JSON: {error}.") from error
  return value


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a small JSON file, whole or not at all."""
  text = json.dumps(value, indent=2, ensure_ascii=False)
  write(path, text.encode() + b"\n")


def write(path: pathlib.Path, content: bytes) -> None:
  """Writes a file whole or not at all."""
  handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(content)
    os.chmod(name, 0o644)  # mkstemp makes a private file
    os.replace(name, path)
  except BaseException:
    pathlib.Path(name).unlink(missing_ok=True)
    raise
