"""The process in which a grammar is tried; started by `grammar`, never
imported.

A schema is a program from outside, and the library that compiles it has no
limit of time, and none of depth: it may take the process down with it. What
comes through here, on single bytes as a vocabulary, may be compiled at home.
Standard input is JSON, {"grammar", "limits"}; standard output what the library
refuses, or nothing.
"""

import concurrent.futures
import contextlib
import json
import random
import resource
import signal
import sys
import threading

import llguidance

CPU_SECONDS = 1.0
# A process that waits instead of computing; also a machine under heavy load.
WALL_SECONDS = 120.0
# Of address space, of which Python, the library and the stack take some 150.
MEGABYTES = 512
# Half of what `grammar` gives: what fits in here has room there.
STACK_BYTES = 32 << 20
# Of a text written at random: some schemas compile, and then ask too much of
# every step.
STEPS = 64


def main() -> None:
  limit = MEGABYTES << 20
  # Where the system has no such limit, that of time must do.
  with contextlib.suppress(OSError, ValueError):
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to decide
  # Nobody handles these signals, so they end even a call into the library.
  signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
  signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
  request = json.load(sys.stdin.buffer)
  threading.stack_size(STACK_BYTES)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    refusal = pool.submit(_refusal, request).result()
  sys.stdout.buffer.write(refusal.encode())


def _refusal(request: dict) -> str:
  matcher = llguidance.LLMatcher(
    llguidance.LLTokenizer("byte"),
    request["grammar"],
    log_level=0,
    limits=llguidance.LLParserLimits(**request["limits"]),
  )
  pick = random.Random(0)
  for _ in range(STEPS):
    allowed = matcher.compute_logit_bias()
    if matcher.is_error() or matcher.is_stopped():
      break
    # White space leads nowhere new.
    chosen = [b for b in range(256) if allowed[b] and chr(b) not in " \t\r\n"]
    if not chosen:
      break
    matcher.consume_token(pick.choice(chosen))
  return matcher.get_error()


if __name__ == "__main__":
  main()
