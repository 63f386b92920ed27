"""Scaling studies: a grid of runs that are trained, scored and gathered; and tools that read such results.

python launchers/study.py COMMAND ...        COMMAND --help says what each takes
"""

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec

from rear_scale import cli
from rear_scale.config import InputError

# First word -> the module whose main(arguments) does it.
_COMMANDS = {
    "coordinates": "rear_scale.scaling.coordinates",
    "panel": "rear_scale.scaling.panel",
    "table": "rear_scale.scaling.table",
    "transfer": "rear_scale.scaling.transfer",
}


def main() -> None:
    words = sys.argv[1:]
    known = {word: module for word, module in _COMMANDS.items() if find_spec(module)}
    if words and words[0] in known:
        import_module(known[words[0]]).main(words[1:])
        return
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", help=f"one of {', '.join(known) or 'none yet'}")
    args = parser.parse_args()
    raise InputError(
        f"{args.command or 'no word'} is not a command of a study. Use one of {', '.join(known) or 'none'}"
    )


if __name__ == "__main__":
    cli.run(main)
