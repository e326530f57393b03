"""Processes that start themselves anew to have memory in huge pages."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from llama_jax import huge_pages

ROOT = pathlib.Path(__file__).parents[1]
PROBE = """
import json, os, pathlib, sys
from llama_jax import huge_pages
if __name__ == "__main__":
  huge_pages.ask(__spec__.name, pathlib.Path(os.environ["SETTING"]))
held = bytearray(b"x") * (1 << 28)  # not NumPy's, which asks by itself
smaps = pathlib.Path("/proc/self/smaps").read_text()
print(json.dumps({
  "pid": os.getpid(),
  "argv": sys.argv[1:],
  "tunables": os.environ.get("GLIBC_TUNABLES", ""),
  "prefix": sys.prefix,
  "read": sys.stdin.read(),
  "smaps": smaps,
}))
"""

pytestmark = pytest.mark.skipif(
  not sys.platform.startswith("linux"), reason="Linux alone has the setting"
)


@pytest.fixture
def run(tmp_path):
  """Runs a module that asks for huge pages; gives its pid and what it says."""
  (tmp_path / "probe.py").write_text(PROBE)
  (tmp_path / "other.py").write_text(
    "import runpy; runpy.run_module('probe', run_name='__main__')"
  )
  setting = tmp_path / "enabled"

  def go(given, *command, tunables=None):
    setting.write_text(given)
    environment = dict(os.environ, SETTING=str(setting))
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{tmp_path}"
    environment.pop(huge_pages.VARIABLE, None)
    if tunables is not None:
      environment[huge_pages.VARIABLE] = tunables
    process = subprocess.Popen(
      [sys.executable, *command],
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      cwd=tmp_path,
    )
    out, _ = process.communicate("typed")
    assert process.returncode == 0
    return process.pid, json.loads(out)

  return go


def has_tunables() -> bool:
  try:
    version = os.confstr("CS_GNU_LIBC_VERSION").split()[1]
  except (ValueError, OSError):
    return False
  return tuple(map(int, version.split(".")[:2])) >= (2, 35)


glibc = pytest.mark.skipif(not has_tunables(), reason="no glibc since 2.35")


@glibc
def test_the_process_is_the_same_but_for_its_memory(run):
  """pid, words with spaces, standard input and environment are kept."""
  words = ["--a=b c", "", "-m", "last"]
  pid, said = run("always [madvise] never", "-m", "probe", *words)
  assert said["pid"] == pid
  assert said["argv"] == words
  assert said["read"] == "typed"
  assert said["prefix"] == sys.prefix
  assert said["tunables"] == "glibc.malloc.hugetlb=1"


@glibc
def test_linux_gives_huge_pages(run):
  if "[madvise]" not in huge_pages.SETTING.read_text():
    pytest.skip("Linux gives huge pages to all here, or to nobody")

  def held(said) -> int:
    return sum(map(int, re.findall(r"AnonHugePages: +(\d+) kB", said["smaps"])))

  _, asked = run("[madvise]", "-m", "probe")
  _, not_asked = run("[never]", "-m", "probe")
  assert held(asked) > 200_000 > 20_000 > held(not_asked)


@glibc
def test_what_is_tuned_already_stays(run):
  _, said = run("[madvise]", "-m", "probe", tunables="glibc.malloc.check=0")
  assert said["tunables"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
  _, said = run("[madvise]", "-m", "probe", tunables="glibc.malloc.hugetlb=0")
  assert said["tunables"] == "glibc.malloc.hugetlb=0"


def test_left_alone(run):
  """Where Linux gives them to all or nobody, and where another program runs."""
  for given in ("[always] madvise never", "always madvise [never]", ""):
    assert run(given, "-m", "probe")[1]["tunables"] == ""
  # Started anew, this would be the other program.
  assert run("[madvise]", "other.py")[1]["tunables"] == ""
  assert run("[madvise]", "-m", "other")[1]["tunables"] == ""
