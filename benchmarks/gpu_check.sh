#!/usr/bin/env bash
# The first GPU at hand, checked and timed with one command: at most eight minutes on one H200, no network needed.
#
#   bash benchmarks/gpu_check.sh             writes gpu_check.json and gpu_check.md, and prints the table and one JSON line
#   bash benchmarks/gpu_check.sh --tiny      the same parts in tiny sizes, on the CPU too: whether it runs, not how fast
#   bash benchmarks/gpu_check.sh --only step_2 profile
#
# PYTHON names the interpreter (default: the one of .venv, else python3). Options are those of benchmarks/gpu_check.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
exec "$PYTHON" benchmarks/gpu_check.py "$@"
