"""Documents from files: JSONL, plain text, either gzipped, or folders."""

import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Iterator

from llama_jax import errors

JSONL = (".jsonl", ".jsonl.gz")


def expand(
  text: str | list[str] | tuple[str, ...], knob: str = "data.text"
) -> list[pathlib.Path]:
  """Files meant by config.data.text (or another knob), in a fixed order.

  A string may name several paths with commas between; a folder stands for all
  files below it, by name, hidden ones left out.
  """
  files: list[pathlib.Path] = []
  for entry in named(text):
    path = pathlib.Path(entry)
    if not entry or not path.exists():
      raise errors.BadFileError(
        f"{knob}={entry} does not exist; give a JSONL or text file"
        " (.gz too), a folder of them, or several with commas between."
      )
    if path.is_dir():
      below = sorted(
        p
        for p in path.rglob("*")
        if p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(path).parts)
      )
      if not below:
        raise errors.BadFileError(f"{knob}={entry} is an empty folder.")
      files += below
    else:
      files.append(path)
  return files


def named(text: str | list[str] | tuple[str, ...]) -> list[str]:
  """The paths as they were given, one by one."""
  if isinstance(text, str):
    return [text] if os.path.exists(text) else text.split(",")
  return list(text)


def read(path: pathlib.Path) -> Iterator[str]:
  """Documents of one file: a JSONL row's "text" each, else the whole file.

  Raises BadFileError with file and line where something is not readable.
  """
  name = path.name.lower()
  try:
    with _open(path) as file:
      if not name.endswith(JSONL):
        text = file.read().decode("utf-8-sig")
        if text:
          yield text
        return
      # By bytes: str.splitlines would also cut at U+2028 and its like.
      for number, line in enumerate(file, start=1):
        if line.strip():
          text = _row(path, number, line)
          if text:
            yield text
  except UnicodeDecodeError as error:
    raise errors.BadFileError(
      f"{path}: byte {error.start} is not UTF-8 text."
    ) from error
  except (OSError, EOFError, zlib.error) as error:
    raise errors.BadFileError(
      f"{path}: cannot be read ({error}); is it whole?"
    ) from error


def _open(path: pathlib.Path):
  return (
    gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")
  )


def _row(path: pathlib.Path, number: int, line: bytes) -> str:
  try:
    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
  except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
    raise errors.BadFileError(
      f"{path}, line {number}: not a JSON object ({error})."
    ) from error
  if not isinstance(row, dict) or not isinstance(row.get("text"), str):
    raise errors.BadFileError(
      f'{path}, line {number}: needs an object with a string "text".'
    )
  return row["text"]


def stream(
  text: str | list[str] | tuple[str, ...], knob: str = "data.text"
) -> Iterator[tuple[pathlib.Path, str]]:
  """(file, document) of config.data.text, in order, a document at a time.

  In a folder, files that are not UTF-8 text are passed over; a file that was
  named must be readable.
  """
  by_name = {pathlib.Path(path) for path in named(text)}
  for path in expand(text, knob):
    try:
      for document in read(path):
        yield path, document
    except errors.BadFileError as error:
      binary = isinstance(error.__cause__, UnicodeDecodeError)
      if path in by_name or not binary or path.name.lower().endswith(JSONL):
        raise


def documents(
  text: str | list[str] | tuple[str, ...], knob: str = "data.text"
) -> list[str]:
  """All documents of `stream`; BadFileError where there is none."""
  found = [document for _, document in stream(text, knob)]
  if not found:
    raise errors.BadFileError(f"{knob}={text} holds no text.")
  return found
