#!/usr/bin/env bash
# The whole path on real images, on this machine: see `launchers/demo.sh --help`. Run again after a kill, it continues.
set -euo pipefail
words=("$@")
for number in "${!words[@]}"; do
    # A folder of images is meant from the folder of the caller, which is left below.
    if [[ $number -gt 0 && ${words[number - 1]} == --data && ! ${words[number]} =~ ^(digits|fashion)$ && -d ${words[number]} ]]; then
        words[number]=$(realpath "${words[number]}")
    fi
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ " $* " == *" -h "* || " $* " == *" --help "* ]]; then
    # Installs nothing: without the environment, the text of the help alone.
    .venv/bin/python launchers/demo.py --help 2>/dev/null || sed -n '/^"""/,/"""$/p' launchers/demo.py | tr -d '"'
    exit
fi
bash launchers/setup.sh
exec .venv/bin/python launchers/demo.py ${words[@]+"${words[@]}"}
