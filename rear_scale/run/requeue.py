"""Whether a job that has ended goes on by itself: asked by launchers/slurm/train.sbatch on the first node of a job.

    python -m rear_scale.run.requeue begin --config rear_xl.yaml ...    prints "STEPS FOLDER" of the run, as in "8,4 runs/x"
    python -m rear_scale.run.requeue end STEPS FOLDER CODE              prints "again" or "leave", and why to stderr

It imports no torch, so the answer is there within a second.
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
    """Whether to go on, and why, after a start of the run ended with this exit code.

    A start that has saved nothing new would end the same way again, so it is left to a person. So is what a person must
    look at: wrong input, and numbers that are not finite.
    """
    state, step, reason = read_status(folder)
    if state == "done" and code == 0:
        return False, f"{folder} is done: {step} steps"
    if code == _EXIT_INPUT_ERROR:
        return False, "the input is wrong"
    if state == "failed" and reason.startswith("FloatingPointError"):
        return False, reason
    what = f"{state} with exit code {code}" + (f" ({reason})" if reason else "")
    saved = last_step(folder)
    if saved <= step_before:
        return False, f"{folder}: {what}, and nothing was saved after step {step_before}"
    return True, f"{folder}: {what}; saved to step {saved}, from {step_before} at this start"


def read_status(folder: str | Path) -> tuple[str, int, str]:
    """state, step and reason of status.json; state "unknown" without one."""
    try:
        values = json.loads((Path(folder) / "status.json").read_text())
        return str(values["state"]), int(values["step"]), str(values["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown", 0, ""


def close(folder: str | Path, code: int) -> None:
    """Ranks that were killed say nothing: their run is marked as failed, so that nobody takes it for a running one."""
    if read_status(folder)[0] == "running":
        values = {"state": "failed", "step": last_step(folder), "reason": f"its ranks ended with code {code}, unsaid"}
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
        # Perhaps a YAML of the released trainers: reading those imports torch.
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
    # Of the steps at the start, one that was found damaged since is set aside: what was resumed from is an earlier one.
    again, why = verdict(folder, max({*steps} & {*saved_steps(folder)}, default=0), code)
    print(why, file=sys.stderr)
    print("again" if again else "leave")


if __name__ == "__main__":
    main()
