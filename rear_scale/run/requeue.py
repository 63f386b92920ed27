"""The decision whether an ended SLURM job is requeued, for launchers/slurm/train.sbatch on the first node of a job.

    python -m rear_scale.run.requeue begin --config rear_xl.yaml ...    prints "STEPS FOLDER" of the run, as in "8,4 runs/x"
    python -m rear_scale.run.requeue end STEPS FOLDER CODE              prints "again" or "leave", and why to stderr

This module does not import torch, so that it answers within a second.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rear_scale import config
from rear_scale.checkpoint.folder import last_step, saved_steps
from rear_scale.config import InputError
from rear_scale.files import write_text_atomically

_EXIT_INPUT_ERROR = 2


def verdict(folder: str | Path, step_before: int, code: int) -> tuple[bool, str]:
    """Whether to start the run again, and why, after a start that ended with this exit code.

    Not after wrong input or non-finite numbers, which need a person, and not after a start that saved no new checkpoint,
    because the next start would probably end in the same way.
    """
    state, step, reason = read_status(folder)
    if state == "done" and code == 0:
        return False, f"{folder} is done: {step} steps"
    if code == _EXIT_INPUT_ERROR:
        return False, "exit code 2: the input is wrong, see the error above"
    if state == "failed" and reason.startswith("FloatingPointError"):
        return False, reason
    what = f"{state} with exit code {code}" + (f" ({reason})" if reason else "")
    saved = last_step(folder)
    if saved <= step_before:
        return False, f"{folder}: {what}, and nothing was saved after step {step_before}"
    return True, f"{folder}: {what}; saved to step {saved}, from {step_before} at this start"


def read_status(folder: str | Path) -> tuple[str, int, str]:
    """state, step and reason in status.json; the state "unknown" without such a file."""
    try:
        values = json.loads((Path(folder) / "status.json").read_text())
        return str(values["state"]), int(values["step"]), str(values["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown", 0, ""


def close(folder: str | Path, code: int) -> None:
    """Marks a run as failed that is still marked as running, because its ranks were killed and could not write a status."""
    if read_status(folder)[0] == "running":
        reason = f"its ranks ended with exit code {code} without recording a reason"
        values = {"state": "failed", "step": last_step(folder), "reason": reason}
        path = Path(folder) / "status.json"
        write_text_atomically(path, json.dumps(values) + "\n")


def _run_dir(arguments: list[str]) -> str:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*")
    args, _ = parser.parse_known_intermixed_args(arguments)
    try:
        return config.with_home(config.load(args.config, args.overrides)).run.dir
    except InputError:
        # It may be a YAML of the released trainers. load_config reads these too, but imports torch.
        from rear_scale.checkpoint.open import load_config

        return config.with_home(load_config(args.config, args.overrides)).run.dir


def main() -> None:
    """Prints what the batch script asks for; ends with code 2 for bad input."""
    command, *arguments = sys.argv[1:]
    if command == "begin":
        try:
            folder = _run_dir(arguments)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(_EXIT_INPUT_ERROR)
        print(",".join(map(str, saved_steps(folder))) or 0, folder)
        return
    steps, folder, code = [int(step) for step in arguments[0].split(",")], arguments[1], int(arguments[2])
    close(folder, code)
    # Checkpoints of the start that no longer exist were damaged and set aside; the start has resumed from an earlier one.
    again, why = verdict(folder, max({*steps} & {*saved_steps(folder)}, default=0), code)
    print(why, file=sys.stderr)
    print("again" if again else "leave")


if __name__ == "__main__":
    main()
