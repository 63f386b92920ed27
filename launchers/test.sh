#!/usr/bin/env bash
# The test suite, in the project's own environment. Arguments go to pytest: launchers/test.sh -k shards, -m long, ...
# Without them the suite runs three files at a time.
# With --install-slurm as the first argument, SLURM and MUNGE are installed with apt if they are missing, so that
# tests/test_slurm.py can run its two nodes; where that is not possible, its tests are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' launchers/test.sh # help installs nothing
    exit
fi

install_slurm() {
    local PATH=$PATH:/usr/sbin:/sbin as_root=()
    if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null; then return; fi
    if ! command -v apt-get >/dev/null; then
        echo "note: SLURM is not installed, and there is no apt-get to install it" >&2
        return
    fi
    if [[ $(id -u) != 0 ]]; then
        if ! sudo -n true 2>/dev/null; then
            echo "note: SLURM is not installed, because installing it needs root, or sudo without a password" >&2
            return
        fi
        as_root=(sudo -n)
    fi
    echo "Installing slurm-wlm and munge" >&2
    {
        "${as_root[@]}" apt-get update -qq &&
            "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge
    } >.venv/slurm.log 2>&1 || {
        tail -n 3 .venv/slurm.log >&2
        echo "note: SLURM could not be installed (see above); its tests are skipped" >&2
    }
}

bash launchers/setup.sh
if [[ "${1:-}" == --install-slurm ]]; then
    shift
    install_slurm
fi
if (($# == 0)); then
    # The whole suite, three files at a time on two cores: many tests wait for processes that they started. The longest files
    # come first (tests/conftest.py), so that none of them is left for the end, alone.
    # One thread each: two would wait for one another.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    set -- --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 15 --durations-min 20
fi
unset PYTHONDONTWRITEBYTECODE # the suite starts many processes, and each would compile the package anew
exec .venv/bin/python -m pytest "$@"
