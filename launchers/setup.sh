#!/usr/bin/env bash
# Creates or updates .venv with everything that the demo and the tests need. Does nothing when it is up to date.
# PYTHON=/path/to/python3.12 chooses the interpreter (3.11 to 3.13) of a new .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# One set-up at a time: a second caller waits, then finds the environment ready.
exec 9>.venv.lock
flock 9

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.11 python3.12 python3.13 python; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
    return 1
}

wanted=$({ cat constraints.txt pyproject.toml launchers/setup.sh; pwd; } | sha256sum | cut -d ' ' -f 1)
if [ -f .venv/installed ] && [ "$(cat .venv/installed)" = "$wanted" ] && .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

# A .venv of an unsuitable or vanished interpreter cannot be updated: start it again.
if ! .venv/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
    python=$(find_python)
    echo "Creating .venv with $("$python" --version)" >&2
    rm -rf .venv
    "$python" -m venv .venv || {
        echo "error: '$python -m venv' failed; on Debian and Ubuntu it needs the package python3-venv" >&2
        rm -rf .venv
        exit 1
    }
fi
rm -f .venv/installed

echo "Installing pinned packages into .venv (a few minutes the first time)" >&2
log=.venv/install.log
: >"$log"
install() {
    .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt "$@" >>"$log" 2>&1 || {
        tail -n 30 "$log" >&2
        echo "error: pip install $* failed; the whole log is in $log. Run the same command again to continue." >&2
        exit 1
    }
}
install pip setuptools wheel
# DeepSpeed is published as source and imports torch while it is built, so torch goes in first and the build is not
# isolated. DS_BUILD_OPS=0: its kernels are compiled when they are first used on a GPU, and never here.
install torch
DS_BUILD_OPS=0 install --no-build-isolation deepspeed
install --no-build-isolation --editable '.[demo,test,wandb]'
.venv/bin/python -m pip check --disable-pip-version-check >>"$log" 2>&1 || {
    tail -n 5 "$log" >&2
    echo "error: the packages in .venv do not fit together (see above). Remove .venv and run the same command again." >&2
    exit 1
}

echo "$wanted" >.venv/installed
