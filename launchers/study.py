"""Scaling studies: a grid of runs that are trained, scored and gathered; and tools that read such results.

    python launchers/study.py --config study/table4.yaml ...     a grid of runs; --help says more
    python launchers/study.py COMMAND ...                        a tool; COMMAND --help says what it takes

docs/studies.md describes both.
"""

import sys
from importlib import import_module
from importlib.util import find_spec

from rear_scale import cli
from rear_scale.config import InputError
from rear_scale.config.fields import suggest
from rear_scale.scaling.study import main as run_study

# First word -> the module whose main(arguments) does it: rear_scale.scaling.study for a grid.
_COMMANDS = {
    "coordinates": "rear_scale.scaling.coordinates",
    "curve": "rear_scale.scaling.curve",
    "panel": "rear_scale.scaling.panel",
    "table": "rear_scale.scaling.table",
    "transfer": "rear_scale.scaling.transfer",
}


def main() -> None:
    words = sys.argv[1:]
    known = {word: module for word, module in _COMMANDS.items() if find_spec(module)}
    first = words[0] if words else "--help"
    if first in known:
        import_module(known[first]).main(words[1:])
    elif first.startswith("-") or "=" in first:
        run_study(words or ["--help"])
    else:
        raise InputError(
            f"{first} is not a command of launchers/study.py{suggest(first, list(known)) or '.'} Use "
            f"{', '.join([*known, '--config with a study for a grid'])}"
        )


if __name__ == "__main__":
    cli.run(main)
