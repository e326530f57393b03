"""Documents from files: JSONL, Parquet, plain text, packed or not, folders."""

import os
import pathlib
from collections.abc import Iterator

from llama_jax import errors
from llama_jax.data import records


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
        f"{knob}={entry} does not exist; give a JSONL, Parquet or text file"
        " (.gz, .zst too), a folder of them, or several with commas between."
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


def stream(
  text: str | list[str] | tuple[str, ...], knob: str = "data.text"
) -> Iterator[tuple[pathlib.Path, str]]:
  """(file, document) of config.data.text, in order, a document at a time.

  In a folder, files that are not UTF-8 text are passed over; a file that was
  named must be readable.
  """
  by_name = {pathlib.Path(path) for path in named(text)}
  for path in expand(text, knob):
    for record in records.Records(path):
      if not isinstance(record, records.Bad):
        if record:
          yield path, record
      elif path in by_name or not record.binary:
        raise errors.BadFileError(record.at(path))


def documents(
  text: str | list[str] | tuple[str, ...], knob: str = "data.text"
) -> list[str]:
  """All documents of `stream`; BadFileError where there is none."""
  found = [document for _, document in stream(text, knob)]
  if not found:
    raise errors.BadFileError(f"{knob}={text} holds no text.")
  return found
