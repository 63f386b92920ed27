"""Sizes of a real evaluation, in processes of their own, whose peak memory is measured."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, environment

MIB = 2**20


def measured(code: str, *arguments: str | Path, timeout: float = 1800) -> dict:
    """What a program prints as its last line, as JSON; `peak()` in it is its peak resident size in MiB."""
    # Of this program alone: getrusage's peak would count the process that started it too.
    prelude = (
        "import re, sys, json\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) / 1024\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", prelude + code, *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, env=environment(PYTHONPATH=str(ROOT)), check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


_WRITE = """
from pathlib import Path
import numpy as np
from rear_scale.sample.npz_writer import write_samples
count, path = int(sys.argv[1]), Path(sys.argv[2])
def blocks():
    for start in range(0, count, 500):
        size = min(500, count - start)
        # Cheap to make, different in every image, and no two blocks alike.
        block = np.empty((size, 256, 256, 3), np.uint8)
        block[:] = (np.arange(start, start + size) * 37 % 251)[:, None, None, None]
        block[:, 0, :4, 0] = np.arange(start, start + size)[:, None] >> np.array([0, 8, 16, 24])
        yield block
write_samples(path, blocks(), count, 256, np.arange(count) % 1000)
print(json.dumps({"peak": peak()}))
"""
_READ = """
import numpy as np
from rear_scale.evaluate.images.npz import read_samples
images, labels = read_samples(sys.argv[1])
numbers = []
for start in range(0, len(images), 500):
    block = images[start : start + 500]
    numbers += (block[:, 0, :4, 0].astype(np.int64) << np.array([0, 8, 16, 24])).sum(1).tolist()
right = numbers == list(range(len(images))) and labels.tolist() == [n % 1000 for n in numbers]
print(json.dumps({"peak": peak(), "right": right, "count": len(images)}))
"""
# What ADM's evaluator does: numpy.load for the names, then the member as a stream behind a header of its own parsing.
_READ_AS_ADM = """
import zipfile
import numpy as np
with zipfile.ZipFile(sys.argv[1]) as archive, archive.open("arr_0.npy") as member:
    assert np.lib.format.read_magic(member) == (1, 0)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    assert not fortran
    first = np.frombuffer(member.read(int(np.prod(shape[1:]))), dtype)
    bad = archive.testzip() if shape[0] < 2000 else None
lazy = np.load(sys.argv[1])
print(json.dumps({"shape": shape, "names": sorted(lazy.files), "bad": bad, "label": int(lazy["label"][-1])}))
"""


def check_npz(folder: Path, count: int) -> None:
    files = [folder / "a.npz", folder / "b.npz"]
    sums = set()
    for file in files:
        assert measured(_WRITE, count, file)["peak"] < 500
        with open(file, "rb") as stream:
            sums.add(hashlib.file_digest(stream, "sha256").hexdigest())
        if file != files[-1]:
            file.rename(files[-1])  # one of them on the disk at a time
    assert len(sums) == 1
    read = measured(_READ, files[-1])
    assert read["right"]
    assert read["count"] == count
    assert read["peak"] < 500
    adm = measured(_READ_AS_ADM, files[-1])
    assert adm == {"shape": [count, 256, 256, 3], "names": ["arr_0", "label"], "bad": None, "label": (count - 1) % 1000}


def test_1200_images_are_written_and_read_in_little_memory(tmp_path: Path) -> None:
    check_npz(tmp_path, 1200)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_50000_images_beyond_4_gib_are_written_and_read_in_little_memory(tmp_path: Path) -> None:
    check_npz(tmp_path, 50_000)


_SCORE = """
import time
import numpy as np, torch
from rear_scale.evaluate.metrics.distances import frechet_distance
from rear_scale.evaluate.metrics.moments import moments_of
from rear_scale.evaluate.metrics.precision_recall import overlap, radii
samples, reference, width = int(sys.argv[1]), int(sys.argv[2]), 2048
torch.set_num_threads(int(sys.argv[4]))
class Generated:
    "Rows that are made when they are read, as a file would give them."
    def __init__(self, count, seed, shift):
        self.count, self.seed, self.shift = count, seed, shift
        self.mix = np.random.default_rng(9).standard_normal((24, width), np.float32)
    def __len__(self):
        return self.count
    def __getitem__(self, part):
        start, end, _ = part.indices(self.count)
        blocks = range(start // 500, -(-end // 500))
        rows = np.concatenate([self.block(block) for block in blocks])
        return rows[start - 500 * blocks[0] :][: end - start]
    def block(self, block):
        draw = np.random.default_rng([self.seed, block])
        latent = draw.standard_normal((500, 24), np.float32)
        noise = draw.standard_normal((500, width), np.float32)
        return np.maximum(latent @ self.mix * 0.05 + noise * 0.2 + self.shift, 0)
times = {}
def timed(name, function):
    started = time.monotonic()
    found = function()
    times[name] = round(time.monotonic() - started, 1)
    return found
sets = Generated(reference, 1, 0.2), Generated(samples, 2, 0.21)
def blocks_of(rows):
    for start in range(0, len(rows), 500):
        yield rows[start : start + 500]
moments = [timed(f"moments {number}", lambda: moments_of(blocks_of(rows))) for number, rows in enumerate(sets)]
fid = timed("fid", lambda: frechet_distance(*moments))
found = {}
for mode in sys.argv[3].split(","):
    own = [timed(f"radii {mode}", lambda: radii(rows, mode)) for rows in sets]
    both = timed(f"overlap {mode}", lambda: overlap(*sets, *own, mode))
    found[mode] = [both.precision, both.recall]
print(json.dumps({"peak": peak(), "fid": fid, "found": found, "times": times}))
"""


def test_rows_of_width_2048_are_scored_in_little_memory() -> None:
    found = measured(_SCORE, 700, 600, "exact,adm_fp16", 1)
    assert found["peak"] < 1500
    assert 0 < found["fid"] < 100
    for shares in found["found"].values():
        assert all(0 <= share <= 1 for share in shares)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_50000_rows_of_width_2048_are_scored_in_little_memory() -> None:
    found = measured(_SCORE, 50_000, 10_000, "exact", 2, timeout=7000)
    assert found["peak"] < 1500
    print(found)
