"""Answers as text: the engine's ids, put into words as they come.

What a terminal, a file of prompts, an evaluation or a server works with.
"""

import dataclasses
from collections.abc import Sequence

from llama_jax.decoding import engine as engine_lib
from llama_jax.decoding import request as request_lib
from llama_jax.text import stream
from llama_jax.text import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class Answer:
  """A whole one.

  Attributes:
    text: without its stop token or stop string.
    tokens: ids, with the stop token; up to the one that ended a stop string.
    finish_reason: "stop", "length", "cancelled" or "error".
    error: what went wrong, where its constraint did.
    logprobs, prompt_logprobs: as decoding.request.Completion has them.
  """

  text: str
  tokens: tuple[int, ...]
  finish_reason: str
  error: str
  logprobs: tuple[request_lib.Logprob, ...]
  prompt_logprobs: tuple[request_lib.Logprob, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
  """What became certain of one answer.

  Attributes:
    request, sample: as decoding.request.Progress.
    text: new text, often none.
    answer: the whole, with the last piece.
  """

  request: int
  sample: int
  text: str
  answer: Answer | None


class _Writer:
  """One answer on its way."""

  def __init__(self, tokenizer, request, stop, continues):
    self._text = stream.Detokenizer(
      tokenizer, continues=continues, stop_strings=stop
    )
    self._ends = set(request.stop_ids)
    self.parts: list[str] = []
    self.tokens = 0
    self.stopped = False

  def write(self, tokens: Sequence[int]) -> str:
    """Text of new tokens, up to a stop string."""
    new = ""
    for token in tokens:
      self.tokens += 1
      if token not in self._ends:
        new += self._text.push(token)
      if self._text.stopped is not None:
        self.stopped = True
        break
    self.parts.append(new)
    return new

  def flush(self) -> str:
    rest = self._text.flush()
    self.parts.append(rest)
    return rest


class TextEngine:
  """An engine whose answers are text and may end by strings.

  Args:
    tokenizer: of the engine's model.
    engine: nobody else steps it.
  """

  def __init__(
    self, tokenizer: tokenizer_lib.Tokenizer, engine: engine_lib.Engine
  ):
    self._tokenizer, self._engine = tokenizer, engine
    self._writers: dict[tuple[int, int], _Writer] = {}

  def submit(
    self,
    request: request_lib.Request,
    stop: Sequence[str] = (),
    continues: bool = False,
  ) -> int:
    """Queues a request: its number.

    stop: texts that end an answer too; continues: as in stream.Detokenizer.
    """
    stream.check_stop_strings(stop)
    number = self._engine.submit(request)
    for sample in range(request.samples):
      self._writers[number, sample] = _Writer(
        self._tokenizer, request, stop, continues
      )
    return number

  def cancel(self, number: int, sample: int | None = None) -> None:
    """Ends a request or one answer of it, as it is."""
    self._engine.cancel(number, sample)

  def step(self) -> list[Piece]:
    """The pieces that the last step of the engine brought.

    The next one is on its way before they are put into words, so the first
    brings none, and what ended by a stop string draws once more for nobody.
    """
    brought = self._engine.finish()
    self._engine.start()
    pieces = []
    for progress in brought:
      key = (progress.request, progress.sample)
      writer = self._writers.get(key)
      if writer is None:
        continue  # It ended by a string; this is the engine's word of it.
      new = writer.write(progress.tokens)
      reason = progress.completion.finish_reason
      if writer.stopped:
        if reason is None:
          self._engine.cancel(*key)
        reason = request_lib.STOP
      if reason is None:
        pieces.append(Piece(*key, new, None))
        continue
      new += writer.flush()
      del self._writers[key]
      completion = progress.completion
      pieces.append(
        Piece(
          *key,
          new,
          Answer(
            "".join(writer.parts),
            tuple(completion.tokens[: writer.tokens]),
            reason,
            completion.error,
            tuple(completion.logprobs[: writer.tokens]),
            tuple(completion.prompt_logprobs),
          ),
        )
      )
    return pieces
