"""A SHA-256 of every file of a checkpoint, so that no damage is ever loaded.

Orbax and TensorStore do not notice a flipped bit of an array. The manifest is
what `sha256sum` writes: `sha256sum -c manifest.sha256` in the folder checks it
without us. It is compared as a text with that of the files as they are, and so
vouches for itself, for what is missing and for what is too many.
"""

import concurrent.futures
import hashlib
import os
import pathlib

from llama_jax import errors
from llama_jax.checkpoint import atomic

NAME = "manifest.sha256"

_THREADS = 4  # hashlib works outside the interpreter's lock
_MOST_BYTES = 64 << 20


def write(folder: pathlib.Path) -> None:
  """Writes the manifest of a folder that is whole; all of it is on the disk
  when this returns."""
  lines = _lines(folder, _paths(folder), flush=True)
  file = folder / NAME
  file.write_text("".join(lines.values()), encoding="utf-8")
  for path in (file, *(p for p in folder.rglob("*") if p.is_dir()), folder):
    atomic.flush(path)


def check(folder: pathlib.Path, part: str | None = None) -> None:
  """Raises BadFileError, which names a file, unless all are as they were.

  Args:
    folder: holds a manifest and what it vouches for.
    part: a folder in it; only its files and those beside it are read.
  """
  file = folder / NAME
  try:
    with open(file, "rb") as opened:
      raw = opened.read(_MOST_BYTES)
    paths = [path for path in _paths(folder) if _belongs(path, part)]
    found = _lines(folder, paths)
  except OSError as error:
    raise errors.BadFileError(
      f"{error.filename or file}: cannot be read ({error.strerror}), so the"
      " checkpoint cannot be verified."
    ) from error
  whole = part is None and raw == "".join(found.values()).encode()
  # A line that no longer names a file is compared like any other.
  listed = raw.decode("utf-8", "replace").splitlines(keepends=True)
  wanted = {
    path: line for line in listed if _belongs(path := line[66:-1], part)
  }
  if whole or (part is not None and wanted == found):
    return
  bad = sorted(
    path
    for path in wanted.keys() | found.keys()
    if wanted.get(path) != found.get(path)
  )
  if not bad:  # the same lines in another order
    raise errors.BadFileError(f"{file} is damaged.")
  if bad[0] not in wanted:
    what = "is not listed in"
  elif bad[0] not in found:
    what = "is missing, but listed in"
  else:
    what = "does not match"
  shown = ascii(bad[0])[1:-1][:200]
  others = f" ({len(bad)} files in all)" if len(bad) > 1 else ""
  raise errors.BadFileError(f"{folder}: {shown} {what} {NAME}{others}.")


def _belongs(path: str, part: str | None) -> bool:
  return part is None or "/" not in path or path.startswith(f"{part}/")


def _paths(folder: pathlib.Path) -> list[str]:
  """Every entry but folders and the manifest, sorted."""
  found = []
  for root, folders, files in os.walk(folder, onerror=_raise):
    links = [name for name in folders if os.path.islink(f"{root}/{name}")]
    for name in [*files, *links]:
      found.append(os.path.relpath(f"{root}/{name}", folder))
  return sorted(path for path in found if path != NAME)


def _raise(error: OSError) -> None:
  raise error


def _lines(
  folder: pathlib.Path, paths: list[str], flush: bool = False
) -> dict[str, str]:
  """path -> its line of the manifest."""

  def line(path: str) -> str:
    file = folder / path
    # A link or a pipe is none of ours, and might never end.
    if file.is_symlink() or not file.is_file():
      return f"{'no plain file':64}  {path}\n"
    with open(file, "rb") as opened:
      digest = hashlib.file_digest(opened, "sha256")
      if flush:
        os.fsync(opened.fileno())
    return f"{digest.hexdigest()}  {path}\n"

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(paths, pool.map(line, paths), strict=True))
