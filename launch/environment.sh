# shellcheck shell=bash
# What quickstart.sh and test.sh share: the environment they run in.
# Sourced, not run; needs bash.
#
#   prepare_environment [EXTRA]    sets `python` to an interpreter in which this
#                                  clone is installed, with its extra if named
#
# PYTHON=            names the interpreter to build on (a path or a command).
#                    One that lies in a virtual environment is used as it is,
#                    and the project is installed there; else a virtual
#                    environment is made from it: .venv in the clone, or
#                    .venv-X.Y where .venv is of another version.
# LLAMA_JAX_SPACE_MB space to ask for before installing (MB)
#
# Typed again, it goes on where it was interrupted: .venv-launch/unfinished
# marks an environment that is being made, and the note `llama_jax-installed`
# inside the environment is written after an install and names what it was of.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
state="$root/.venv-launch"
log="$state/install.log"

say() { printf '%s\n' "$*" >&2; }

stop() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# A pyenv shim is there and does not run, so running is the test.
is_recent() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

has_uv() { uv --version >/dev/null 2>&1; }

in_environment() {
  "$1" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null
}

version_of() { "$1" -c 'import platform; print(platform.python_version())'; }

# Whether an environment can be started from this interpreter.
is_usable() {
  in_environment "$1" || has_uv ||
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

# Sets `interpreter` to the one to build on, or stops with what is missing.
find_interpreter() {
  local name path tried="python3.12 python3.11 python3" unusable=""
  interpreter=""
  if [ -n "${PYTHON:-}" ]; then
    tried="$PYTHON"
    command -v "$PYTHON" >/dev/null ||
      stop "PYTHON=$PYTHON: there is no such command or file"
    "$PYTHON" -c "" >/dev/null 2>&1 ||
      stop "PYTHON=$PYTHON does not run as a Python interpreter"
    is_recent "$PYTHON" ||
      stop "PYTHON=$PYTHON is Python $(version_of "$PYTHON");" \
        "Python 3.11 or newer is needed"
    is_usable "$PYTHON" && interpreter="$(command -v "$PYTHON")"
    unusable="$PYTHON"
  else
    for name in $tried; do
      path="$(command -v "$name")" || continue
      is_recent "$path" || continue
      if is_usable "$path"; then
        interpreter="$path"
        return
      fi
      unusable="$path"
    done
  fi
  if [ -n "$interpreter" ]; then
    return
  elif [ -n "$unusable" ]; then
    stop "$unusable cannot make virtual environments (venv or ensurepip is" \
      "missing); on Debian or Ubuntu: apt-get install python3-venv"
  fi
  stop "no Python 3.11 or newer found (tried $tried); install one, on Debian" \
    "or Ubuntu: apt-get install python3 python3-venv, or name one with" \
    "PYTHON=/path/to/python"
}

# Free space before anything is written: half an install helps nobody.
check_space() {
  local needed="${LLAMA_JAX_SPACE_MB:-2500}" free
  free="$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1024) }')"
  if [ "${free:-0}" -lt "$needed" ]; then
    stop "no space in $root: the installation needs $needed MB," \
      "$free MB are free"
  fi
}

# Runs a command with its output in the log, showing only large downloads.
logged() {
  "$@" 2>&1 </dev/null | tee "$log" |
    awk '/^ *Downloading .*[0-9] ?Mi?B/ { print "  " $0; fflush() }' >&2
}

# One line that says why, below what the log says of errors.
explain() {
  local why="the last lines of the log say why"
  if grep -qiE 'no space left|disk quota' "$log"; then
    why="no space left on the disk"
  elif grep -qiE 'certificate.?verif|CERTIFICATE_VERIFY|UnknownIssuer' "$log"
  then
    why="the certificate of the package index is not trusted here; set"
    why="$why PIP_CERT (uv: SSL_CERT_FILE)"
  elif grep -qiE 'name resolution|name or service|resolve host|dns error|establish a new|unreachable|connection (refused|reset|broken|aborted)|ConnectTimeout|timed out|max retries|ProxyError|tunnel connection|error sending request|client error \(connect' "$log"; then
    why="the package index cannot be reached; check the network, or point"
    why="$why PIP_INDEX_URL at a mirror"
  elif grep -qiE 'no matching distribution|not find a version|no solution found' "$log"
  then
    why="the package index does not have what is needed for this Python"
  fi
  { grep -i 'error' "$log" | grep -v 'originates from' || tail -n 3 "$log"; } |
    tail -n 3 | sed 's/^/  | /' >&2
  stop "$1 failed: $why (log: $log)"
}

# What an installation is of: the declared dependencies, clone and Python.
fingerprint() {
  "$1" - "$root" "$root/setup.cfg" "$root/pyproject.toml" <<'PYTHON'
import hashlib, pathlib, platform, sys
digest = hashlib.sha256(f"{platform.python_version()} {sys.argv[1]}".encode())
for path in sys.argv[2:]:
  digest.update(pathlib.Path(path).read_bytes())
print(digest.hexdigest())
PYTHON
}

# Sets `python` to the interpreter of the virtual environment of the clone,
# making the environment if need be.
make_environment() {
  local folder="$root/.venv" version
  if [ -e "$state/unfinished" ]; then
    rm -rf "$(cat "$state/unfinished")"
    rm "$state/unfinished"
  fi
  python="$folder/bin/python"
  if [ -z "${PYTHON:-}" ] && is_recent "$python"; then
    return
  fi
  find_interpreter
  if in_environment "$interpreter"; then
    python="$interpreter"
    return
  fi
  version="$(version_of "$interpreter")"
  if "$python" -c "" >/dev/null 2>&1 &&
    [ "$(version_of "$python")" != "$version" ]; then
    folder="$root/.venv-${version%.*}"
    python="$folder/bin/python"
  fi
  if ! is_recent "$python"; then
    check_space
    say "making $folder from $interpreter (Python $version)"
    printf '%s\n' "$folder" >"$state/unfinished"
    rm -rf "$folder"
    if has_uv; then
      logged uv venv --python "$interpreter" "$folder" || explain "uv venv"
    else
      logged "$interpreter" -m venv "$folder" || explain "python -m venv"
    fi
    rm "$state/unfinished"
  fi
}

# Installs the clone, editable, with the extra if named.
install_project() {
  local what="$root${1:+[$1]}"
  say "installing the project${1:+ with its $1 extra}; some minutes at first" \
    "(log: $log)"
  if has_uv; then
    # uv does not read what pip is told.
    if [ -n "${PIP_INDEX_URL:-}" ] && [ -z "${UV_INDEX_URL:-}" ]; then
      export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
    fi
    if [ -n "${PIP_CERT:-}" ]; then
      export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"
    fi
    logged uv pip install --python "$python" --editable "$what" ||
      explain "uv pip install"
  else
    "$python" -m pip --version >/dev/null 2>&1 ||
      stop "$python has no pip; type: $python -m ensurepip"
    logged "$python" -m pip install --disable-pip-version-check \
      --progress-bar off --editable "$what" || explain "pip install"
  fi
}

prepare_environment() {
  local extra="${1:-}" note print
  # pip answers Ctrl-C with an ordinary failure, which is none.
  trap 'say "interrupted; type the same command again to go on"; exit 130' INT
  mkdir -p "$state" 2>/dev/null || stop "cannot write to $root"
  # Two at once would spoil each other's installation.
  if command -v flock >/dev/null 2>&1; then
    exec 9>"$state/lock" || stop "cannot write to $state"
    flock -n 9 || {
      say "another launch is preparing this clone; waiting for it"
      flock 9
    }
  fi
  make_environment
  note="$("$python" -c 'import sys; print(sys.prefix)')/llama_jax-installed"
  print="$(fingerprint "$python")"
  if ! grep -qsxF "$print ${extra:-plain}" "$note"; then
    [ -e "$note" ] || check_space
    rm -f "$note"
    install_project "$extra"
    # The extra comes on top of the plain installation.
    printf '%s\n' "$print plain" "$print ${extra:-plain}" >"$note"
  fi
  exec 9>&-
  trap - INT
}
