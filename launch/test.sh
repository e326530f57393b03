#!/usr/bin/env bash
# Style and the whole test suite, in an environment of its own.
#   launch/test.sh [pytest arguments, for instance -m slow or -k rope]
# PYTHON= names the interpreter to use; see environment.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment test
cd "$root"
"$python" -m ruff format --check
"$python" -m ruff check
SECONDS=0
status=0
# A process for each core, four at the most: each has eight simulated devices.
workers=$("$python" -c 'import os; print(min(4, os.cpu_count() or 1))')
"$python" -m pytest --numprocesses="$workers" --dist=loadfile "$@" || status=$?
echo "test suite: $SECONDS s"
exit "$status"
