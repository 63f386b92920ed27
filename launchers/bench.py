"""Benchmarks a part of the system against a plain reference implementation and prints one JSON object.

    python launchers/bench.py data

stdout holds only this object; progress goes to stderr. --out FILE also writes it to a file; --dry-run prints the settings and
measures nothing.
"""

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
    parser = cli.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="mode", required=True, metavar="MODE", help=", ".join(modes))
    chosen = None
    for name in modes:
        command = commands.add_parser(name)
        if name in sys.argv[1:2]:
            # Import only the selected mode, so that a benchmark runs without packages that it does not need.
            mode = importlib.import_module(f"rear_scale.bench.{name}")
            command.description = mode.__doc__
            command.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object here too")
            command.add_argument("--dry-run", action="store_true", help="print the settings and stop")
            mode.add_arguments(command)
            command.set_defaults(mode=name, run=mode.run)
            chosen = command
    if chosen is None:
        parser.parse_args()  # ends the process with the help text or an error
        return
    # Use the mode's own parser, because sub-commands do not allow overrides between options.
    arguments = chosen.parse_intermixed_args(sys.argv[2:])
    if arguments.dry_run:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("run", "dry_run")}
        print(json.dumps({**settings, **machine()}, indent=1, default=str))
        return
    reference.check_there()
    result = arguments.run(arguments)
    if result is None:
        return  # a rank other than 0
    text = json.dumps({"mode": arguments.mode, **result, **machine()}, indent=1)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(arguments.out, text + "\n")
    print(text)


def machine() -> dict[str, object]:
    """The command, commit, device and versions of a measurement."""
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
    """The name of the CPU from /proc/cpuinfo; platform.processor() often gives only the architecture."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    cli.run(main)
