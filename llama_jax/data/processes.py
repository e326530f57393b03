"""Work shared out among processes, its results in the order it was given."""

import collections
import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llama_jax import errors


class Pool:
  """Processes that end with their parent; for `with`."""

  def __init__(
    self, workers: int, make: Callable, args: tuple[Any, ...], advice: str
  ):
    """workers processes, each with what make(*args) gives there.

    advice: what to do where memory ran out, a sentence.
    """
    self._workers = workers
    self._advice = advice
    # Not forked: the parent may hold JAX's threads.
    self._pool = concurrent.futures.ProcessPoolExecutor(
      workers,
      multiprocessing.get_context("spawn"),
      _begin,
      (make, args),
    )

  def __enter__(self) -> "Pool":
    return self

  def __exit__(self, *error) -> None:
    self._pool.shutdown(wait=True, cancel_futures=True)

  def map(self, function: Callable, items: Iterable) -> Iterator[Any]:
    """function(what was made, item) of each item, of which few are taken ahead.

    Raises:
      UserError: a process was killed.
    """
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
      for item in items:
        # Enough that no process waits for the reader.
        while len(pending) >= 2 * self._workers:
          yield pending.popleft().result()
        pending.append(self._pool.submit(_call, function, item))
      while pending:
        yield pending.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
      raise errors.UserError(
        "a worker process was killed, as the system does when memory runs out;"
        f" {self._advice}"
      ) from None


_made: Any = None  # of a worker process


def _call(function: Callable, item: Any) -> Any:
  return function(_made, item)


def _begin(make: Callable, args: tuple[Any, ...]) -> None:
  global _made
  # A killed parent tells nobody.
  parent = multiprocessing.parent_process()

  def follow() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
  _made = make(*args)
