"""launchers/evaluate.py on real images with Inception of seeded weights: ranks, kills, and the size of a real evaluation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, command_line, environment, launch
from sklearn.datasets import load_digits

from rear_scale.evaluate.networks.inception import Inception
from rear_scale.sample.npz_writer import write_samples

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("weights") / "seeded.pth"
    torch.save(network.state_dict(), path)
    return path


def digits(start: int, count: int) -> np.ndarray:
    """uint8 [count, 24, 24, 3]: handwritten digits as the demo has them."""
    images = torch.from_numpy(load_digits().images[start : start + count]).float()[:, None] / 16
    images = torch.nn.functional.interpolate(images, 24, mode="bicubic").clamp(0, 1)
    return (images * 255).byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def evaluation(folder: Path, weights: Path, *more: str) -> list[str]:
    return [
        "launchers/evaluate.py", "--samples", str(folder / "samples.npz"), "--out", str(folder / "result.json"),
        f"evaluate.reference.real={folder / 'reference.npz'}", f"evaluate.inception_weights={weights}", *more,
    ]  # fmt: skip


def scores(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())["images"]


@pytest.mark.timeout(1800)
def test_the_same_numbers_on_one_two_and_three_ranks_and_after_a_kill(tmp_path: Path, weights: Path) -> None:
    labels = load_digits().target
    found = {}
    for name, ranks in (("one", 1), ("two", 2), ("three", 3), ("killed", 2)):
        folder = tmp_path / name
        folder.mkdir()
        write_samples(folder / "samples.npz", iter([digits(0, 700)]), 700, 24, labels[:700])
        np.savez(folder / "reference.npz", arr_0=digits(700, 300))
        command = ["torchrun", "--nproc-per-node", str(ranks), *evaluation(folder, weights)]
        if name == "killed":
            _kill_after_the_first_block(command, folder)
        result = launch(*command, fresh=True, cwd=ROOT, timeout=1500)
        assert result.returncode == 0, result.stderr[-3000:]
        found[name] = scores(folder)
        for reference in found[name]["reference_sets"].values():
            del reference["path"]
    assert found["two"] == found["one"]
    assert found["three"] == found["one"]
    assert found["killed"] == found["one"]


def _kill_after_the_first_block(command: list[str], folder: Path) -> None:
    with open(folder / "killed.log", "w") as log:
        process = subprocess.Popen(
            command_line(*command), cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
    while not (written := list(folder.rglob("block_*.npz"))):
        assert process.poll() is None, (folder / "killed.log").read_text()[-3000:]
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(written) < 3, "the job was killed before its end"


# A launcher ends through os._exit.
_PEAK = """
import os, re, runpy, sys
target, end = sys.argv.pop(), os._exit
sys.argv = sys.argv[1:]
def note_and_end(code):
    with open(target, "w") as file:
        file.write(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
    end(code)
os._exit = note_and_end
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("count", [1000, pytest.param(50_000, marks=pytest.mark.gpu)])
@pytest.mark.timeout(7200)
def test_images_of_256_pixels_from_end_to_end(tmp_path: Path, weights: Path, count: int) -> None:
    """Written in the ADM form and scored from there, in memory that does not grow with their number."""

    def photographs(number: int, seed: int):
        """Smooth colours, a block at a time: uint8 [n, 256, 256, 3]."""
        for start in range(0, number, 100):
            coarse = torch.rand(
                min(100, number - start), 3, 8, 8, generator=torch.Generator().manual_seed(seed + start)
            )
            images = torch.nn.functional.interpolate(coarse, 256, mode="bicubic").clamp(0, 1)
            yield (images * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()

    write_samples(tmp_path / "samples.npz", photographs(count, 0), count, 256, np.arange(count) % 1000)
    write_samples(tmp_path / "reference.npz", photographs(200, 10**6), 200, 256, np.arange(200))
    result = subprocess.run(
        [sys.executable, "-c", _PEAK, *evaluation(tmp_path, weights), str(tmp_path / "peak")],
        cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=7000, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    peak = int((tmp_path / "peak").read_text()) / 1024
    found = scores(tmp_path)["inception"]["references"]["real"]
    assert found["fid"] > 0
    assert found["precision"]["exact"] >= 0
    assert peak < 3000
    print(f"{count:,} images of 256 pixels: {peak:.0f} MiB")
