#!/usr/bin/env bash
# Creates or updates .venv with everything that the demo and the tests need. Does nothing when it is up to date.
# PYTHON=/path/to/python3.12 chooses the interpreter (3.11 to 3.13) of a new .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' launchers/setup.sh # help installs nothing
    exit
elif (($#)); then
    echo "error: launchers/setup.sh takes no arguments, but was given $*. Leave them out; --help says what it does" >&2
    exit 2
fi

# One set-up at a time: a second caller waits, then finds the environment ready.
exec 9>.venv.lock
if ! refusal=$(flock 9 2>&1); then
    # No locks here (Lustre without -o flock, some NFS), or no flock: a file that one process alone can make takes their place.
    holder=.venv.lock.holder
    started() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20; }
    until (set -o noclobber && echo "$HOSTNAME $$ $(started $$)" >"$holder") 2>/dev/null; do
        if [ ! -e "$holder" ]; then
            if [ -n "${failed:-}" ]; then
                echo "error: no file can be made in $PWD, so its set-up cannot be locked ($refusal)" >&2
                exit 1
            fi
            failed=1 # or another process has just removed it
            continue
        fi
        failed=
        read -r host pid start <"$holder" || true
        if [ "${host:-}" = "$HOSTNAME" ] && [ "$(started "${pid:-0}")" != "${start:-}" ]; then
            rm -f "$holder"
            continue
        fi
        if [ -z "${waits:-}" ]; then
            waits=1
            echo "waiting for a set-up by process ${pid:-?} on ${host:-?}. If it is gone: rm '$PWD/$holder'" >&2
        fi
        sleep 1
    done
    trap 'rm -f "$holder"' EXIT
fi

# Neither other packages nor another standard library than the interpreter's own.
unset PYTHONHOME PYTHONPATH
export PYTHONNOUSERSITE=1

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

# Of pip's own settings (pip.conf, PIP_* variables), only where packages come from is kept: others (user, target, prefix,
# no-deps, constraint ...) would put packages beside .venv or choose other versions.
kept=$(.venv/bin/python - <<'PYTHON'
import ast, os, shlex, subprocess, sys

SOURCES = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "cert", "client-cert", "proxy",
           "timeout", "default-timeout", "retries", "cache-dir", "keyring-provider")
# "user = true" would list the settings of the user alone.
every = {**os.environ, "PIP_USER": "0", "PIP_GLOBAL": "0", "PIP_SITE": "0"}
command = [sys.executable, "-m", "pip", "config", "list"]
listed = subprocess.run(command, env=every, capture_output=True, text=True).stdout
for section in ("global", "install", ":env:"):  # as pip reads them: later ones win
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        name = key.removeprefix(f"{section}.")
        if name in SOURCES:
            text = ast.literal_eval(value).strip().replace("\n", " ")
            print(f"export PIP_{name.upper().replace('-', '_')}={shlex.quote(text)}")
PYTHON
)
unset "${!PIP_@}"
eval "$kept"
export PIP_CONFIG_FILE=/dev/null

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
DS_BUILD_OPS=0 install --no-build-isolation --editable '.[train,demo,test,wandb]'
.venv/bin/python -m pip check --disable-pip-version-check >>"$log" 2>&1 || {
    tail -n 5 "$log" >&2
    echo "error: the packages in .venv do not fit together (see above). Remove .venv and run the same command again." >&2
    exit 1
}

echo "$wanted" >.venv/installed
