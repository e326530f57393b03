"""What both sides of the CPU benchmark share: requests, clocks, memory.

A worker is a process that reads one JSON object a line from standard input,
{"call": METHOD, ...arguments}, and answers each with one line. Between two
requests it is blocked in a read, so that the other side has the cores to
itself. Only the standard library is imported here: what a side imports is
part of what is measured.

Both sides have these methods. `dtype` is "float32" or "bfloat16"; ids are
[B, T] lists of rows of one length; seconds everywhere.

  hello()                    versions and threads; imports the library
  load(weights)              the model, for all that follows
  rates()                    GEMM and copy rates of the library
  logits(ids, file)          float32 [B, T, vocab] into an .npy file
  warm(ids, new, dtype)      gets ready to decode; {"choice": TEXT}
  prefill(ids, dtype)        {"seconds"} to the next tokens' logits
  decode(ids, new, dtype)    greedy; {"tokens", "first", "rest"}: time to each
                             row's first token, and from it to the last
  start_training(optimizer)  fresh optimizer state around the weights
  train_step(ids, dtype)     {"seconds", "loss", "grad_norm"}
Ours alone has text(count), ids of real text, and export(folder), the model as
a Hugging Face folder in float32.
And these, which a fresh process is asked once; `began` is time.time() of its
start and `cache` a folder for compiled programs:
  speak(weights, ids, new, dtype, began, cache)
                             {"import", "first_token", "decoded", "compile",
                             "set_up"}
  learn(weights, ids, steps, optimizer, dtype, began, cache)
                             {"first_step", "loss", "grad_norm", "peak",
                             "compile", "set_up"}
Compile is XLA's part of set_up, which is all that a second call does not need
(tracing too). The peak is in bytes.
"""

import json
import os
import pathlib
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

# Rows of tokens, width in, width out: SmolLM2's MLP and its head.
GEMMS = ((2048, 576, 1536), (2048, 1536, 576), (512, 576, 49152))
COPY_BYTES = 256 << 20
REPEATS = 7


def serve(side: Any) -> None:
  """Answers requests with the side's methods until the input ends."""
  # Libraries print; the answers have a pipe of their own.
  answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)
  for line in sys.stdin:
    request = json.loads(line)
    try:
      answer = getattr(side, request.pop("call"))(**request)
    except Exception:  # the driver tells the user
      answer = {"error": traceback.format_exc()}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def peak_bytes() -> int:
  """The most memory that this process has held."""
  status = pathlib.Path("/proc/self/status")
  if status.exists():
    for line in status.read_text().splitlines():
      if line.startswith("VmHWM:"):
        return int(line.split()[1]) * 1024
  import resource

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def seconds_of(run: Callable[[], Any]) -> float:
  """Median over REPEATS calls, after two that are dropped."""
  times = []
  for _ in range(REPEATS + 2):
    began = time.perf_counter()
    run()
    times.append(time.perf_counter() - began)
  return statistics.median(times[2:])
