"""Seconds of the first training step and the first sampled batch under torch.compile, with a cold and a warm cache.

    python -m rear_scale.bench.compile_start [--config rear_s.yaml] [--small] [section.field=value ...]

Runs launchers/bench.py twice in processes of their own, with a cache of compiled kernels that is empty at first. On a CPU, blocks
and steps are compiled here although they are not by default; without a C++ compiler there it says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rear_scale import cli
from rear_scale.places import ROOT

TINY = ("model.depth=2", "model.width=32", "train.micro_batch_size=2", "sample.batch_size=2")
_CACHES = ("cold", "warm")
# by mode of the bench: its options, and the values of its object for the first call and for a later one
_MODES = {"train": ("--global-batch", "first_step_s"), "sample": ("--alone", "first_batch_s")}


def measure(name: str, overrides: list[str], images: int, folder: Path) -> dict[str, dict[str, float]]:
    """By mode: seconds of the first call with a cold and a warm cache, and of a later one. Raises RuntimeError where a process
    fails, with its last line. images: the batch size of training."""
    found: dict[str, dict[str, float]] = {mode: {} for mode in _MODES}
    for state in _CACHES:
        for mode in _MODES:
            values = _bench(mode, name, overrides, images, folder)
            found[mode][state] = values[_MODES[mode][1]]
            batch = values["global_batch_size" if mode == "train" else "batch_size"]
            found[mode]["later"] = batch / values["images_per_s"]
    return found


def _bench(mode: str, name: str, overrides: list[str], images: int, folder: Path) -> dict[str, Any]:
    option, _ = _MODES[mode]
    words = [mode, "--config", name, *overrides, f"{mode}.compile=true", "--rounds", "1", option]
    words += [str(images)] if mode == "train" else []
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    done = subprocess.run(
        [sys.executable, "launchers/bench.py", *words],
        cwd=ROOT,
        env={**os.environ, **cache},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"launchers/bench.py {mode} ended with exit code {done.returncode}: {last[:300]}")
    return json.loads(done.stdout)


def line(found: dict[str, dict[str, float]]) -> str:
    """One line on the seconds of both modes."""
    what = {"train": "training step", "sample": "sampled batch"}
    return "; ".join(
        f"first {what[mode]} {times['cold']:.1f} s (cold cache), {times['warm']:.1f} s (warm), later {times['later']:.3f} s"
        for mode, times in found.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="rear_s.yaml", metavar="NAME.yaml", help="default: rear_s.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--images", type=int, default=64, help="images of a training step (default: 64)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for any device")
    arguments = parser.parse_intermixed_args()
    name, images, overrides = arguments.config, arguments.images, arguments.overrides
    if arguments.small:
        name, images, overrides = "bench_cpu.yaml", 2, [*TINY, *overrides]
    else:
        overrides = [f"train.micro_batch_size={images}", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        try:
            print(line(measure(name, overrides, images, Path(folder))))
        except RuntimeError as error:
            print(f"torch.compile could not be measured here: {error}")


if __name__ == "__main__":
    cli.run(main)
