#!/usr/bin/env bash
# From a clone to a finetuned Llama: environment, weights, training, result.
#   launch/quickstart.sh [--workdir=DIR] [--steps=N] [--weights=gguf:FILE]
# PYTHON= names the interpreter to use; see environment.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment
# A folder llama_jax in the current directory is not to be taken for this clone.
export PYTHONSAFEPATH=1
exec "$python" -m llama_jax.quickstart "$@"
