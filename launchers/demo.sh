#!/usr/bin/env bash
# The whole path on real images, on this machine: see `launchers/demo.sh --help`. Run again after a kill, it continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launchers/setup.sh
exec .venv/bin/python launchers/demo.py "$@"
