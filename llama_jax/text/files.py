"""Files of others, read with one kind of error.

Whatever is wrong with one, absent or a pipe or cut off, ends in BadFileError
that names it.
"""

import contextlib
import json
import os
import pathlib
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from llama_jax import errors

# The largest known to us, a tokenizer_config.json, has some 0.3 MB.
MAX_JSON_BYTES = 16 << 20


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
    content = file.read(MAX_JSON_BYTES + 1)
  if len(content) > MAX_JSON_BYTES:
    raise errors.BadFileError(
      f"{path} has more than the {MAX_JSON_BYTES} bytes that are allowed."
    )
  value = parse_json(content, str(path), pairs_hook)
  if not isinstance(value, dict):
    raise errors.BadFileError(f"{path} does not hold a JSON object.")
  return value


def parse_json(
  content: bytes, name: str, pairs_hook: Callable[[list], dict] | None = None
) -> Any:
  """The JSON value of what the file `name` holds."""
  try:
    return json.loads(content, object_pairs_hook=pairs_hook)
  except (ValueError, RecursionError) as error:
    raise errors.BadFileError(f"{name} is not sound JSON: {error}.") from error


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
