"""Batch inference: a file of prompts in, a file of answers out.

While it is being made, the answers lie in FILE.parts: the rows in blocks, one
file a block, a line for each row as soon as its answers are whole. Whoever
works on a block holds an flock on its file, so that any number of processes
share the rows, and what a dead one leaves is free at once. Who finds all blocks
whole joins them, in the order of the input, and the folder goes.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import tqdm

from llama_jax import completion, errors
from llama_jax.checkpoint import atomic
from llama_jax.decoding import engine as engine_lib
from llama_jax.decoding import request as request_lib
from llama_jax.decoding import sampling as sampling_lib
from llama_jax.text import constraint, stream

# Rows of a block at least, and blocks of a file at most.
_BLOCK, _BLOCKS = 16, 1000


@dataclasses.dataclass(frozen=True)
class Settings:
  """How every row is answered.

  Attributes:
    samples: answers a row.
    sampling: how tokens are chosen; row i of the file has seed + i.
    max_new_tokens, min_new_tokens, logprobs: as decoding.request.Request.
    stop: texts that end an answer.
    json_schema, regex: what an answer must be, if not empty; one of the two.
  """

  samples: int
  sampling: sampling_lib.SamplingConfig
  max_new_tokens: int
  min_new_tokens: int
  logprobs: int | None
  stop: tuple[str, ...]
  json_schema: str
  regex: str

  def __post_init__(self):
    def check(right, name, allowed):
      if not right:
        raise errors.UserError(
          f"--{name}={getattr(self, name, self.samples)} must be {allowed}."
        )

    check(self.samples >= 1, "n", "1 or more")
    check(self.max_new_tokens >= 1, "max_new_tokens", "1 or more")
    check(
      0 <= self.min_new_tokens <= self.max_new_tokens,
      "min_new_tokens",
      f"from 0 to --max_new_tokens={self.max_new_tokens}",
    )
    check(self.logprobs is None or self.logprobs >= 0, "logprobs", "0 or more")
    if self.json_schema and self.regex:
      raise errors.UserError("give either --json_schema or --regex.")
    stream.check_stop_strings(self.stop)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a file of prompts.

  Raises BadFileError for a line that is none, by its number.
  """
  rows = []
  try:
    with open(path, encoding="utf-8") as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          rows.append(_row(path, number, line))
  except (OSError, UnicodeDecodeError) as error:
    raise errors.BadFileError(f"--prompts={path}: {error}.") from error
  if not rows:
    raise errors.BadFileError(f"--prompts={path} has no rows.")
  return rows


def _row(path, number, line):
  where = f"--prompts={path}, line {number}"
  try:
    row = json.loads(line)
  except ValueError as error:
    raise errors.BadFileError(f"{where} is not JSON: {error}.") from error
  if not isinstance(row, dict):
    raise errors.BadFileError(f"{where} is not a JSON object.")
  if ("prompt" in row) == ("messages" in row):
    raise errors.BadFileError(
      f"{where} must have either `prompt` or `messages`."
    )
  if not isinstance(row.get("prompt", ""), str):
    raise errors.BadFileError(f"{where}: `prompt` must be a text.")
  return row


class Output:
  """The file that is being made, and its parts.

  Args:
    target: the file.
    rows: how many there will be.
    identity: what must be alike for parts to be gone on with; JSON.
  """

  def __init__(self, target: pathlib.Path, rows: int, identity: dict[str, Any]):
    self._target, self._rows = target, rows
    self._parts = target.with_name(target.name + ".parts")
    self._identity = identity
    self._size = max(_BLOCK, -(-rows // _BLOCKS))

  @property
  def whole(self) -> bool:
    """Whether the file is there already."""
    return self._target.exists()

  def check(self) -> None:
    """Raises UserError where parts are there that were made otherwise."""
    note = self._parts / "settings.json"
    try:
      found = json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
      return
    except (OSError, ValueError) as error:
      raise errors.UserError(f"--out={self._target}: {error}.") from error
    asked = json.loads(json.dumps(self._identity))
    differing = sorted(
      name for name in {*found, *asked} if found.get(name) != asked.get(name)
    )
    if differing:
      raise errors.UserError(
        f"{self._parts} was begun with other {', '.join(differing)}; give the"
        " same to go on, name another --out, or remove that folder."
      )

  def begin(self) -> None:
    """Makes the folder of the parts, unless it is there; checks it too."""
    note = self._parts / "settings.json"
    try:
      self._parts.mkdir(parents=True, exist_ok=True)
      if not note.exists():
        atomic.write_text(note, json.dumps(self._identity, indent=2))
    except OSError as error:
      raise errors.UserError(f"--out={self._target}: {error}.") from error
    self.check()

  def blocks(self) -> Iterator["Block"]:
    """Those that nobody works on and that are not whole, now held."""
    for number, first in enumerate(range(0, self._rows, self._size)):
      last = min(first + self._size, self._rows)
      block = Block(self._parts / f"{number:05d}.jsonl", range(first, last))
      if block.hold():
        yield block

  def done(self) -> int:
    """Rows in all parts."""
    with contextlib.suppress(FileNotFoundError):
      return sum(
        path.read_bytes().count(b"\n") for path in self._parts.glob("*.jsonl")
      )
    return self._rows

  def join(self) -> bool:
    """Makes the file where all parts are whole; says whether it is there."""
    if self._target.exists():
      return True
    with contextlib.ExitStack() as stack:
      try:
        lock = stack.enter_context(open(self._parts / "join.lock", "w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
      except FileNotFoundError:
        return self._target.exists()
      if self._target.exists():
        return True
      if self.done() < self._rows:
        return False
      part = self._parts / "joined"
      with open(part, "w", encoding="utf-8") as joined:
        for path in sorted(self._parts.glob("*.jsonl")):
          lines = [json.loads(line) for line in path.open(encoding="utf-8")]
          for _, row in sorted(lines, key=lambda line: line[0]):
            joined.write(json.dumps(row, ensure_ascii=False) + "\n")
      atomic.flush(part)
      part.replace(self._target)
      atomic.flush(self._target.parent)
      shutil.rmtree(self._parts)
    return True


class Block:
  """Some rows of the file, and the lines that are there of them."""

  def __init__(self, path: pathlib.Path, rows: range):
    self._path, self._rows = path, rows
    self.missing: set[int] = set()

  def hold(self) -> bool:
    """Takes it, unless another has it or it is whole."""
    try:
      file = open(self._path, "a+b")  # noqa: SIM115  (held while it is worked on)
    except FileNotFoundError:
      return False  # Joined meanwhile.
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.close()
      return False
    file.seek(0)
    kept, there = 0, set()
    for line in file:
      # The last line of one that died may be cut.
      if not line.endswith(b"\n"):
        break
      there.add(json.loads(line)[0])
      kept += len(line)
    file.truncate(kept)
    self.missing = set(self._rows) - there
    if not self.missing:
      file.close()
      return False
    self._file = file
    return True

  def add(self, row: int, content: dict[str, Any]) -> None:
    """A row's answers; the last one closes the block."""
    line = json.dumps([row, content], ensure_ascii=False) + "\n"
    self._file.write(line.encode())
    self._file.flush()
    self.missing.discard(row)
    if not self.missing:
      os.fsync(self._file.fileno())
      self._file.close()


def identity(rows, settings: Settings, **rest) -> dict[str, Any]:
  """What must be alike for a run to be gone on with."""
  digest = hashlib.sha256()
  for row in rows:
    digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
  return {
    "prompts": digest.hexdigest(),
    **dataclasses.asdict(settings),
    **rest,
  }


def answer(
  llama,
  engine: completion.TextEngine,
  rows: list[dict[str, Any]],
  output: Output,
  settings: Settings,
  bound: request_lib.Constraint | None,
  ahead: int,
) -> Iterator[tuple[int, int]]:
  """Answers what is left of the rows; yields (rows, tokens) as they are done.

  A row that can never be answered gets an `error` and no completions.

  Args:
    llama: for its templates and tokenizer.
    engine: of the same.
    bound: what an answer must be; see bind.
    ahead: rows to have in the engine at once.
  """
  blocks = output.blocks()
  todo: collections.deque[tuple[Block, int]] = collections.deque()
  asked: dict[int, tuple[Block, int, list[completion.Answer | None]]] = {}
  while True:
    while len(asked) < ahead:
      if not todo:
        block = next(blocks, None)
        if block is None:
          break
        todo.extend((block, row) for row in sorted(block.missing))
      block, row = todo.popleft()
      try:
        number = _submit(llama, engine, rows[row], row, settings, bound)
      except errors.UserError as error:
        content = rows[row] | {"completions": [], "error": str(error)}
        block.add(row, content)
        yield 1, 0
        continue
      asked[number] = (block, row, [None] * settings.samples)
    if not asked:
      return
    for piece in engine.step():
      if piece.answer is None:
        continue
      block, row, answers = asked[piece.request]
      answers[piece.sample] = piece.answer
      if None not in answers:
        del asked[piece.request]
        found = [_completion(one, settings) for one in answers]
        block.add(row, rows[row] | {"completions": found})
        yield 1, sum(len(one.tokens) for one in answers)


def bind(llama, settings: Settings) -> request_lib.Constraint | None:
  """What every answer must be; raises UserError for what cannot be kept."""
  if not settings.json_schema and not settings.regex:
    return None
  return constraint.compile(
    llama.need_tokenizer(),
    json_schema=settings.json_schema or None,
    regex=settings.regex or None,
    vocab_size=llama.config.vocab_size,
  )


def run(
  llama,
  rows: list[dict[str, Any]],
  output: Output,
  settings: Settings,
  config: engine_lib.EngineConfig,
  draft=None,
) -> str:
  """Answers what is left of a file with a bar; a line on how it ended.

  llama, draft: a llama.Llama each.
  """
  bound = bind(llama, settings)
  engine = completion.TextEngine(
    llama.need_tokenizer(),
    engine_lib.Engine(
      *llama.unrolled, config, draft=draft.unrolled if draft else None
    ),
  )
  # Not before all that can be refused is.
  output.begin()
  tokens = mine = 0
  began = time.monotonic()
  bar = tqdm.tqdm(
    total=len(rows),
    initial=output.done(),
    unit="row",
    desc="generate",
    mininterval=1,
  )
  with bar:
    for more, new in answer(
      llama, engine, rows, output, settings, bound, 2 * config.max_batch
    ):
      mine += more
      tokens += new
      rate = tokens / max(time.monotonic() - began, 1e-9)
      bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
      bar.update(more)
  if not output.join():
    return (
      f"{mine} rows done; the others are with other processes, of which the"
      " last makes the file."
    )
  return f"{mine} rows done here, {len(rows)} in all."


def _submit(llama, engine, row, index, settings, bound) -> int:
  chat = "messages" in row
  ids = (
    llama.encode_chat(row["messages"])
    if chat
    else llama.encode_prompt(row["prompt"])
  )
  request = request_lib.Request(
    ids,
    settings.max_new_tokens,
    dataclasses.replace(settings.sampling, seed=settings.sampling.seed + index),
    samples=settings.samples,
    stop_ids=tuple(llama.need_tokenizer().stop_ids),
    min_new_tokens=settings.min_new_tokens,
    logprobs=settings.logprobs,
    constraint=bound,
  )
  return engine.submit(request, settings.stop, continues=not chat)


def _completion(answer_: completion.Answer, settings) -> dict[str, Any]:
  found = {
    "text": answer_.text,
    "tokens": list(answer_.tokens),
    "finish_reason": answer_.finish_reason,
  }
  if answer_.error:
    found["error"] = answer_.error
  if settings.logprobs is not None:
    found["logprobs"] = [one.chosen for one in answer_.logprobs]
    if settings.logprobs:
      found["top_logprobs"] = [list(one.top) for one in answer_.logprobs]
  return found
