"""Batch inference: a file of prompts in, a file of answers out (answers.py)."""

import collections
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm

from llama_jax import answers as answers_lib
from llama_jax import completion, errors
from llama_jax.decoding import engine as engine_lib
from llama_jax.decoding import request as request_lib
from llama_jax.decoding import sampling as sampling_lib
from llama_jax.text import chat, constraint, stream


@dataclasses.dataclass(frozen=True)
class Settings:
  """How every row is answered.

  Attributes:
    samples: answers a row.
    sampling: how tokens are chosen; row i of the file has a seed made of
      this one and i.
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
    self.request([0], row=0)  # Refuses what none could ask for.
    if self.json_schema and self.regex:
      raise errors.UserError("give either --json_schema or --regex.")
    stream.check_stop_strings(self.stop)

  def request(
    self, prompt: Sequence[int], row: int, **rest: Any
  ) -> request_lib.Request:
    """What is asked for a row; rest: stop_ids and constraint."""
    # Not seed + row: files drawn with seeds side by side would share draws.
    drawn = hashlib.blake2b(
      f"{self.sampling.seed} {row}".encode(), digest_size=4
    ).digest()
    seed = int.from_bytes(drawn, "little") >> 1
    return request_lib.Request(
      prompt,
      self.max_new_tokens,
      dataclasses.replace(self.sampling, seed=seed),
      samples=self.samples,
      min_new_tokens=self.min_new_tokens,
      logprobs=self.logprobs,
      **rest,
    )


# Whether an answer goes on from a prompt, so that a space before it is its own
# -> what it must be; empty where it may be anything.
Bound = dict[bool, request_lib.Constraint]


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a file of prompts.

  Raises BadFileError for a line that is none, by its number.
  """
  rows = []
  try:
    with open(path, encoding="utf-8-sig") as file:
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
    row = json.loads(line, parse_constant=_refuse)
  except (ValueError, RecursionError) as error:
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


def _refuse(constant: str):
  raise ValueError(f"{constant} is no number of JSON's")


def identity(rows, settings: Settings, **rest) -> dict[str, Any]:
  """How a file is made, name -> value: what must be alike to be the same."""
  digest = hashlib.sha256()
  for row in rows:
    digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
  asked = dataclasses.asdict(settings)
  sampling = asked.pop("sampling")
  return {"prompts": digest.hexdigest(), **asked, **sampling, **rest}


def answer(
  llama,
  engine: completion.TextEngine,
  rows: list[dict[str, Any]],
  output: answers_lib.Output,
  settings: Settings,
  bound: Bound,
  ahead: int,
  failed: list[str],
) -> Iterator[tuple[int, int]]:
  """Answers what is left of the rows; yields (rows, tokens) as they are done.

  A row that can never be answered gets an `error` and no completions.

  Args:
    llama: for its templates and tokenizer.
    engine: of the same.
    bound: what an answer must be; see bind.
    ahead: rows to have in the engine at once.
    failed: takes the errors of such rows.
  """
  blocks = output.blocks()
  todo: collections.deque[tuple[answers_lib.Block, int]] = collections.deque()
  asked: dict[
    int, tuple[answers_lib.Block, int, list[completion.Answer | None]]
  ] = {}
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
        failed.append(content["error"])
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


def bind(llama, rows: list[dict[str, Any]], settings: Settings) -> Bound:
  """What every answer must be; raises UserError for what cannot be kept."""
  if not settings.json_schema and not settings.regex:
    return {}
  return {
    continues: constraint.compile(
      llama.need_tokenizer(),
      json_schema=settings.json_schema or None,
      regex=settings.regex or None,
      continues=continues,
      vocab_size=llama.config.vocab_size,
    )
    for continues in {"prompt" in row for row in rows}
  }


def run(
  llama,
  rows: list[dict[str, Any]],
  output: answers_lib.Output,
  settings: Settings,
  config: engine_lib.EngineConfig,
  draft=None,
) -> str:
  """Answers what is left of a file with a bar; a line on how it ended.

  llama, draft: a llama.Llama each, on one mesh.
  """
  if any("messages" in row for row in rows):
    chat.check_template(llama.need_tokenizer())
  bound = bind(llama, rows, settings)
  engine = engine_lib.Engine(
    *llama.unrolled,
    config,
    mesh=llama.mesh,
    draft=draft.unrolled if draft else None,
  )
  engine.check(settings.request([0], row=0))
  texts = completion.TextEngine(llama.need_tokenizer(), engine)
  # Not before all that can be refused is.
  output.begin()
  tokens = mine = 0
  failed: list[str] = []
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
      llama, texts, rows, output, settings, bound, 2 * config.max_batch, failed
    ):
      mine += more
      tokens += new
      rate = tokens / max(time.monotonic() - began, 1e-9)
      bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
      bar.update(more)
  told = ""
  if failed:
    told = f" {len(failed)} of them have an `error`; the first: {failed[0]}"
  if not output.join():
    return (
      f"{mine} rows done; the others are with other processes, of which the"
      f" last makes the file.{told}"
    )
  return f"{mine} rows done here, {len(rows)} in all.{told}"


def _submit(llama, engine, row, index, settings, bound) -> int:
  continues = "prompt" in row
  ids = (
    llama.encode_prompt(row["prompt"])
    if continues
    else llama.encode_chat(row["messages"])
  )
  stop_ids = tuple(llama.need_tokenizer().stop_ids)
  request = settings.request(
    ids, index, stop_ids=stop_ids, constraint=bound.get(continues)
  )
  return engine.submit(request, settings.stop, continues=continues)


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
