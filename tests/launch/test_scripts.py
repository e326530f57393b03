"""The launch scripts: what they say when something is missing.

Nothing is installed here: pythons that pretend stand first, or alone, on PATH.
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"])
# What environment.sh calls; all else is kept off PATH.
TOOLS = "awk bash cat df dirname env flock grep mkdir rm sed sh tail tee"

# Runs as python, except for what a test takes away.
RECENT = f'exec {shlex.quote(sys.executable)} -I "$@"'
# Answers like a Python of 3.10: it runs, but no check of its version passes.
OLD = 'case "$2" in *3,*11*) exit 1;; esac; echo 3.10.1'
# A plain Python that is recent, without ensurepip.
WITHOUT_VENV = (
  'case "$2" in *ensurepip*|*base_prefix*) exit 1;; esac; ' + RECENT
)
SHIM = "echo 'pyenv: python3.12: command not found' >&2; exit 127"
# A plain Python whose `-m venv` makes a folder and whose pip says $PIP_SAYS.
TOY = f"""
case "$*" in
  *base_prefix*) exit ${{TOY_IN_VENV:-1}};;
  *sys.prefix*) echo "$(dirname "$0")/..";;
  "-m venv "*) echo "venv $3" >>"$TOY_CALLS"
    [ -z "${{TOY_CUT:-}}" ] || {{ kill -9 $PPID; exit 1; }}
    mkdir -p "$3/bin" && cat "$0" >"$3/bin/python" &&
    /bin/chmod +x "$3/bin/python";;
  "-m pip --version") ;;
  "-m pip install"*) echo "pip ${{*##*--editable }}" >>"$TOY_CALLS"
    [ -z "${{PIP_SAYS:-}}" ] || {{ echo "$PIP_SAYS"; exit 1; }};;
  "-m llama_jax.quickstart"*) shift 2; printf 'ran %s\\n' "$*"; pwd;;
  *) {RECENT};;
esac
"""


def _executable(path, body):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/sh\n{body}\n")
  path.chmod(0o755)
  return path


@pytest.fixture
def launch(tmp_path):
  """launch(**environment) runs quickstart.sh of a clone with a space in it."""
  if not shutil.which("bash"):
    pytest.skip("bash is not installed")
  clone = tmp_path / "a clone"
  shutil.copytree(ROOT / "launch", clone / "launch")
  for name in ("setup.cfg", "pyproject.toml"):
    shutil.copy(ROOT / name, clone)
  tools = tmp_path / "tools"
  tools.mkdir()
  for name in TOOLS.split():
    if found := shutil.which(name):
      (tools / name).symlink_to(found)

  def run(*arguments, **environment):
    return subprocess.run(
      [str(clone / "launch" / "quickstart.sh"), *arguments],
      env={
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{tools}",
        "TOY_CALLS": str(tmp_path / "calls"),
        "LLAMA_JAX_SPACE_MB": "1",
        **environment,
      },
      cwd=tmp_path,
      capture_output=True,
      text=True,
      timeout=60,
    )

  run.clone, run.bin = clone, tmp_path / "bin"
  run.calls = lambda: (tmp_path / "calls").read_text().splitlines()
  return run


def _error(result):
  """The one error line of a run that failed as it should."""
  assert result.returncode == 2, result
  assert "Traceback" not in result.stderr
  lines = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
  assert len(lines) == 1, result.stderr
  return lines[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_parse_it(script):
  subprocess.run(["bash", "-n", script], check=True)


def test_shellcheck_finds_nothing():
  if not shutil.which("shellcheck"):
    pytest.skip("shellcheck is not installed")
  subprocess.run(["shellcheck", "-x", *SCRIPTS], check=True, cwd=ROOT)


def test_no_python_at_all(launch):
  error = _error(launch())
  assert "no Python 3.11 or newer found" in error
  assert "PYTHON=" in error


def test_old_pythons_and_shims_do_not_count(launch):
  _executable(launch.bin / "python3", OLD)
  _executable(launch.bin / "python3.12", SHIM)
  assert "no Python 3.11 or newer found" in _error(launch())


def test_python_without_venv(launch):
  _executable(launch.bin / "python3", WITHOUT_VENV)
  assert "apt-get install python3-venv" in _error(launch())


def test_python_named_but_wrong(launch):
  old = _executable(launch.bin / "mine", OLD)
  assert "is Python 3.10.1; Python 3.11" in _error(launch(PYTHON=str(old)))
  assert "no such command" in _error(launch(PYTHON="nosuch"))
  shim = _executable(launch.bin / "shim", SHIM)
  assert "does not run" in _error(launch(PYTHON=str(shim)))


def test_no_space(launch):
  _executable(launch.bin / "python3", TOY)
  result = launch(LLAMA_JAX_SPACE_MB="999999999")
  assert "the installation needs 999999999 MB" in _error(result)
  assert not (launch.clone / ".venv").exists()


@pytest.mark.parametrize(
  "says, told",
  [
    ("Temporary failure in name resolution", "cannot be reached"),
    ("ERROR: [Errno 28] No space left on device", "no space left on the disk"),
    ("SSL: CERTIFICATE_VERIFY_FAILED", "PIP_CERT"),
    ("ERROR: No matching distribution found for jax", "does not have"),
    ("ERROR: something else", "the log"),
  ],
)
def test_install_that_fails_says_why(launch, says, told):
  _executable(launch.bin / "python3", TOY)
  result = launch(PIP_SAYS=says)
  assert told in _error(result)
  assert says in result.stderr  # the log's own words
  assert str(launch.clone / ".venv-launch" / "install.log") in result.stderr
  # Typed again when mended, it goes on with the environment it has.
  assert launch().returncode == 0
  assert [call.split()[0] for call in launch.calls()] == ["venv", "pip", "pip"]


def test_installs_once_and_again_when_dependencies_change(launch):
  _executable(launch.bin / "python3", TOY)
  result = launch("--steps=3", "--workdir=a b")
  assert result.returncode == 0, result.stderr
  # Runs where it was typed, with the words as they were typed.
  assert result.stdout.splitlines() == [
    "ran --steps=3 --workdir=a b",
    str(launch.clone.parent),
  ]
  venv = launch.clone / ".venv"
  assert launch.calls() == [f"venv {venv}", f"pip {launch.clone}"]
  assert launch().returncode == 0
  assert len(launch.calls()) == 2
  with open(launch.clone / "setup.cfg", "a") as file:
    file.write("# changed\n")
  assert launch().returncode == 0
  assert launch.calls()[2:] == [f"pip {launch.clone}"]


def test_half_made_environment_is_made_again(launch):
  _executable(launch.bin / "python3", TOY)
  (launch.clone / ".venv" / "bin").mkdir(parents=True)
  assert launch(TOY_CUT="1").returncode != 0
  _executable(launch.clone / ".venv" / "bin" / "python", TOY)  # a part of it
  assert launch().returncode == 0
  made = [call for call in launch.calls() if call.startswith("venv")]
  assert len(made) == 2


def test_python_inside_an_environment_is_used_as_it_is(launch):
  mine = _executable(launch.clone.parent / "env" / "bin" / "python", TOY)
  result = launch(PYTHON=str(mine), TOY_IN_VENV="0")
  assert result.returncode == 0, result.stderr
  assert launch.calls() == [f"pip {launch.clone}"]
  assert not (launch.clone / ".venv").exists()
  assert (mine.parent.parent / "llama_jax-installed").exists()
