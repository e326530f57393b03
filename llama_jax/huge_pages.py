"""Memory in pages of 2 MiB, which a process must be started with.

A training step on CPU touches gigabytes that it was just given; in pages of 4
KiB the kernel's part in that is a tenth of the step. Where Linux gives huge
pages to those who ask for them (madvise), glibc asks if GLIBC_TUNABLES has
glibc.malloc.hugetlb=1, which it reads when a process starts and never again.

Nothing slow is imported here: it is what a verb does first.
"""

import os
import pathlib
import platform
import sys

SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
VARIABLE = "GLIBC_TUNABLES"
_TUNABLE = "glibc.malloc.hugetlb"
_SINCE = (2, 35)  # of glibc


def environment(setting: pathlib.Path = SETTING) -> dict[str, str]:
  """What a process's environment needs for huge pages; {} where nothing helps.

  That is where they are given to all or to nobody, where another C library or
  an older one is in use, and where the variable tells what to do already:
  glibc.malloc.hugetlb=0 in it turns this off.

  setting: the file in which Linux says whom it gives them to.
  """
  tunables = os.environ.get(VARIABLE, "")
  library, version = platform.libc_ver()
  if _TUNABLE in tunables or library != "glibc" or _numbers(version) < _SINCE:
    return {}
  try:
    asked = "[madvise]" in setting.read_text()
  except OSError:
    return {}
  if not asked:
    return {}
  return {VARIABLE: ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))}


def ask(module: str, setting: pathlib.Path = SETTING) -> None:
  """Starts this process anew with huge pages, if it is python -m `module`.

  It stays the same process to the outside. Run by anything else (a debugger, a
  notebook, a test) it goes on as it is. To be called before slow imports.
  """
  words = sys.orig_argv
  first = words.index("-m") if "-m" in words else len(words)
  if words[first + 1 : first + 2] != [module]:
    return
  more = environment(setting)
  if more and sys.executable:
    # By its whole path: that is how an interpreter finds its environment.
    os.execve(
      sys.executable, [sys.executable, *words[1:]], {**os.environ, **more}
    )


def _numbers(version: str) -> tuple[int, ...]:
  return tuple(int(part) for part in version.split(".") if part.isdigit())
