"""How many cores there are."""

import os


def usable() -> int:
  """Cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):  # of Linux alone
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
