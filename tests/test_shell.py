"""What a verb's process sets up before anything is compiled."""

import json
import os
import platform
import subprocess
import sys
import textwrap

import pytest

# A heap like a compiler's: many small blocks, one in a thousand kept.
PROBE = """
  import ctypes, json, os, sys
  import jax
  from llama_jax import shell

  for _ in range(2):
    shell.set_up_compiling()
  libc = ctypes.CDLL(None)
  libc.malloc.restype = ctypes.c_void_p
  libc.malloc.argtypes = [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]

  def resident():
    with open("/proc/self/statm") as statm:
      return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

  events = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: events.append(event)
  )
  jax.jit(lambda x: x + 1)(1.0)
  blocks = []
  for _ in range(4000):
    blocks.append(libc.malloc(16384))
    ctypes.memset(blocks[-1], 1, 16384)
  for index, block in enumerate(blocks):
    if index % 1000 != 999:
      libc.free(block)
  sizes = [resident()]
  for seconds in (0.5, 5.0):
    jax.monitoring.record_event_duration_secs(shell._COMPILED, seconds)
    sizes.append(resident())
  print(json.dumps({"event": shell._COMPILED in events, "sizes": sizes}))
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="glibc alone can be asked"
)
def test_a_compilers_memory_goes_back_to_the_system(tmp_path):
  """Of 64 MB freed within the heap; JAX still calls a compile by that name."""
  said = json.loads(
    subprocess.run(
      [sys.executable, "-c", textwrap.dedent(PROBE)],
      check=True,
      capture_output=True,
      text=True,
      env={**os.environ, "LLAMA_JAX_CACHE": str(tmp_path)},
    ).stdout
  )
  assert said["event"]
  freed, kept, given_back = said["sizes"]
  assert abs(freed - kept) < 5e6  # Not for a compile of half a second.
  assert freed - given_back > 50e6
