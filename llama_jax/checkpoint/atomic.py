"""Small files that appear whole or not at all, and what to ask before more.

building.py does the same for whole checkpoints.
"""

import json
import os
import pathlib
import shutil
from typing import Any

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


def flush(path: pathlib.Path) -> None:
  """Puts a file's bytes, or a folder's names, on the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


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


def json_line(content: Any) -> bytes:
  """A line of JSONL for people; half a surrogate pair, no text, is escaped."""
  try:
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"
  except UnicodeEncodeError:
    return json.dumps(content).encode() + b"\n"
