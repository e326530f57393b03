"""Real text that every machine has: Python's own standard library.

About 10 MB of source that people read and maintain, split into text to train
on and text that is held out. The split is by module and by a hash of its name,
so it is the same on every machine, and no module is on both sides.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import re
import sysconfig
import tokenize
from collections.abc import Iterator

HELDOUT_SHARE = 0.07  # of the modules
SHORTEST_PIECE = 500  # characters of a file that was cut

# Tests are no prose of the library; the rest are tables of numbers, generated
# text, other projects' code or what somebody installed.
SKIPPED_FOLDERS = frozenset(
  {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
  }
)
SKIPPED_FILES = re.compile(r"_sysconfigdata|sitecustomize|usercustomize")


@dataclasses.dataclass(frozen=True)
class Split:
  """What `write` wrote: names of modules, and bytes of text of each side."""

  train_modules: tuple[str, ...]
  heldout_modules: tuple[str, ...]
  train_bytes: int
  heldout_bytes: int


def is_held_out(module: str) -> bool:
  """Whether a top-level module is held out, by a hash of its name.

  `decimal`, `_decimal` and `_pydecimal` say much the same, so they share a
  side.
  """
  family = re.sub(r"^_(py)?", "", module)
  digest = hashlib.sha256(family.encode()).digest()
  return int.from_bytes(digest[:8], "big") < HELDOUT_SHARE * 2**64


def write(
  train_path: str | os.PathLike,
  heldout_path: str | os.PathLike,
  root: str | os.PathLike | None = None,
  heldout_bytes: int = 60_000,
) -> Split:
  """Writes the two sides as gzipped JSONL rows {"text", "source"}.

  A row is a file. The held-out side is cut to `heldout_bytes`, about 16,000
  tokens, shared out over all its modules, so that measuring on it is quick and
  not all about one module. The same library gives the same bytes. Each file is
  renamed into place when it is whole.

  Args:
    train_path: where the text to train on goes.
    heldout_path: where the held-out text goes.
    root: folder of the library; that of the running Python when None.
    heldout_bytes: cap of the held-out text.
  """
  root = pathlib.Path(root or sysconfig.get_paths()["stdlib"])
  modules: dict[str, list[dict[str, str]]] = {}
  for path in _sources(root):
    source = path.relative_to(root)
    try:
      with tokenize.open(path) as file:  # heeds the file's own encoding line
        text = file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
      continue
    if text.strip():
      name = source.parts[0].removesuffix(".py")
      row = {"text": text, "source": source.as_posix()}
      modules.setdefault(name, []).append(row)
  train = {k: v for k, v in modules.items() if not is_held_out(k)}
  heldout = {k: v for k, v in modules.items() if is_held_out(k)}
  heldout_rows = _share_out(heldout, heldout_bytes)
  train_rows = [row for name in sorted(train) for row in train[name]]
  _write_rows(heldout_path, heldout_rows)
  _write_rows(train_path, train_rows)
  return Split(
    train_modules=tuple(sorted(train)),
    heldout_modules=tuple(sorted(heldout)),
    train_bytes=sum(len(row["text"].encode()) for row in train_rows),
    heldout_bytes=sum(len(row["text"].encode()) for row in heldout_rows),
  )


def _sources(root: pathlib.Path) -> Iterator[pathlib.Path]:
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
    for name in sorted(names):
      if name.endswith(".py") and not SKIPPED_FILES.match(name):
        yield pathlib.Path(folder) / name


def _share_out(modules, budget: int) -> list[dict[str, str]]:
  """Cuts each module to its share; what small ones leave goes to the rest."""

  def size(name):
    return sum(len(row["text"].encode()) for row in modules[name])

  kept = []
  names = sorted(modules, key=lambda name: (size(name), name))
  for i, name in enumerate(names):
    share = budget // (len(names) - i)
    for row in modules[name]:
      text = _cut(row["text"], share)
      if len(text) < min(len(row["text"]), SHORTEST_PIECE):
        break  # a few lines of a file say nothing
      kept.append({"text": text, "source": row["source"]})
      share -= len(text.encode())
      budget -= len(text.encode())
  return sorted(kept, key=lambda row: row["source"])


def _cut(text: str, limit: int) -> str:
  """The whole lines at the start of `text` that fit into `limit` bytes."""
  kept = []
  for line in text.splitlines(keepends=True):
    limit -= len(line.encode())
    if limit < 0:
      break
    kept.append(line)
  return "".join(kept)


def _write_rows(path: str | os.PathLike, rows: list[dict[str, str]]):
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(f"{path.name}.tmp")
  try:
    with (
      open(unfinished, "wb") as raw,
      # No time and no name in the header: the same text, the same bytes.
      gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as file,
    ):
      for row in rows:
        file.write(json.dumps(row).encode() + b"\n")
    os.replace(unfinished, path)
  finally:
    unfinished.unlink(missing_ok=True)
