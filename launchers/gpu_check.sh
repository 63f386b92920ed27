#!/usr/bin/env bash
# Measures and checks a GPU machine in half an hour: see `launchers/gpu_check.sh --help`. The same command continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi
exec "$python" -m rear_scale.bench.gpu_check "$@"
