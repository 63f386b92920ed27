#!/usr/bin/env bash
# What a GPU machine can do, measured in half an hour: see `launchers/gpu_check.sh --help`. The same command continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi
exec "$python" -m rear_scale.bench.gpu_check "$@"
