"""Files and folders that appear whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from llama_jax import errors


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a small UTF-8 file, its folders too."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".{path.name}.part")
  try:
    part.write_text(text, encoding="utf-8")
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)


def check_free(
  path: str | os.PathLike,
  needed: float,
  remedy: str = "name a place on another disk",
) -> None:
  """Refuses to begin what the disk under path cannot hold.

  Args:
    path: where to; it and its folders need not be there yet.
    needed: bytes.
    remedy: what the user can do, besides freeing some.
  """
  place = pathlib.Path(path).absolute()
  while not place.exists():
    place = place.parent
  free = shutil.disk_usage(place).free
  if free < needed:
    raise errors.UserError(
      f"no space in {path}: {needed / 1e6:,.0f} MB are needed,"
      f" {free / 1e6:,.0f} MB are free; free some, or {remedy}."
    )


def check_new(path: str | os.PathLike) -> None:
  """Refuses a destination that holds something already."""
  final = pathlib.Path(path).absolute()
  if final.exists() and (not final.is_dir() or any(final.iterdir())):
    raise errors.UserError(
      f"{final} exists and is not an empty folder; name another or remove it."
    )


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A folder to fill, which takes the path's name when all went well.

  Refuses a path that holds something already. Whatever goes wrong, a kill
  apart, nothing is left behind; after a kill a hidden .NAME.part-... remains,
  which nothing takes for the real one.

  Raises:
    UserError: the path is taken, or the disk refuses.
  """
  check_new(path)
  final = pathlib.Path(path).absolute()
  part = None
  try:
    final.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{final.name}.part-"
    part = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
    umask = os.umask(0)
    os.umask(umask)
    part.chmod(0o777 & ~umask)
    yield part
    for file in part.rglob("*"):
      # Some writers make files that only their owner may read.
      if file.is_file():
        file.chmod(0o666 & ~umask)
        _flush(file)
    _flush(part)
    os.rename(part, final)
    _flush(final.parent)
  except OSError as error:
    raise errors.UserError(
      f"{final} cannot be written ({error.strerror or error}); nothing was left"
      " behind."
    ) from error
  finally:
    if part is not None and part.exists():
      shutil.rmtree(part, ignore_errors=True)


def _flush(path: pathlib.Path) -> None:
  """Puts a file or folder on the disk before the rename that shows it."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
