#!/usr/bin/env bash
# The test suite, in the project's own environment. Arguments go to pytest: launchers/test.sh -k shards, -m long, ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launchers/setup.sh
exec .venv/bin/python -m pytest "$@"
