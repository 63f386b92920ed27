"""Times a part of the system beside a plain reference and prints one JSON object.

    python launchers/bench.py data

stdout holds the object and nothing else; progress goes to stderr. --out FILE writes it to a file too; --dry-run shows the
settings and measures nothing.
"""

import argparse
import importlib
import importlib.util
import json
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from rear_scale import cli
from rear_scale.bench import reference
from rear_scale.device import uses_cuda
from rear_scale.files import write_text_atomically
from rear_scale.run.versions import commit


def main() -> None:
    modes = [name for name in ("train", "sample", "data") if importlib.util.find_spec(f"rear_scale.bench.{name}")]
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="mode", required=True, metavar="MODE", help=", ".join(modes))
    chosen = None
    for name in modes:
        command = commands.add_parser(name)
        if name in sys.argv[1:2]:
            # Only the mode that runs is imported: each measures with nothing loaded that it does not need.
            mode = importlib.import_module(f"rear_scale.bench.{name}")
            command.description = mode.__doc__
            command.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object here too")
            command.add_argument("--dry-run", action="store_true", help="print the settings and stop")
            mode.add_arguments(command)
            command.set_defaults(mode=name, run=mode.run)
            chosen = command
    if chosen is None:
        parser.parse_args()  # ends here: help, or what is wrong
        return
    # The mode's own parser: overrides may stand between its options, which sub-commands do not allow.
    arguments = chosen.parse_intermixed_args(sys.argv[2:])
    if arguments.dry_run:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("run", "dry_run")}
        print(json.dumps({**settings, **machine()}, indent=1, default=str))
        return
    reference.check_there()
    found = arguments.run(arguments)
    if found is None:
        return  # not the first of several ranks
    text = json.dumps({"mode": arguments.mode, **found, **machine()}, indent=1)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(arguments.out, text + "\n")
    print(text)


def machine() -> dict[str, object]:
    """Where the figures were measured."""
    device = torch.cuda.get_device_name() if uses_cuda() else _processor()
    packages = ("torch", "numpy", "webdataset")
    return {
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _processor() -> str:
    """The CPU's own name, which Linux knows; platform.processor() mostly says its architecture."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    cli.run(main)
