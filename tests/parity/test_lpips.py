"""LPIPS and PSNR against lpips 0.1.4, with seeded weights."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from seeded import images_of, stored

from rear_scale.evaluate.metrics.distances import psnr
from rear_scale.evaluate.networks.lpips import LpipsDistance


def pair_of(case) -> tuple[np.ndarray, np.ndarray]:
    a, b, faint = images_of(case, case.json["pairs"])
    b[1] = a[1]
    b[2] = np.clip(a[2].astype(int) + faint[0].astype(int) // 16 - 8, 0, 255)
    for name, images in (("sha_a", a), ("sha_b", b)):
        assert stored(case.json, name) in (None, hashlib.sha256(images.tobytes()).hexdigest())
    return a, b


def test_distances(case, compare, tmp_path) -> None:
    if "lpips" not in case.json:
        return
    filled = case.weights.fill(case.json["shapes"], case.json["seed"], {".weight": 1.4142135})
    state = {
        name: np.abs(value) / np.float32(value.shape[1]) if name.startswith("lin") else value
        for name, value in filled.items()
    }
    for file, prefix in (("vgg", "features"), ("lpips", "lin")):
        part = {name: torch.from_numpy(value) for name, value in state.items() if name.startswith(prefix)}
        torch.save(part, tmp_path / f"{file}.pth")
    distance = LpipsDistance(str(tmp_path / "vgg.pth"), str(tmp_path / "lpips.pth"), torch.device("cpu"))
    expected = np.array(case.json["lpips"])
    # Relative 1e-6 plus 1e-9 in float32, as the json has it.
    compare(
        "lpips / (1e-6 of it + 1e-9)", (distance(*pair_of(case)) - expected) / (1e-6 * expected + 1e-9), 0 * expected, 1
    )
    distance.network.double()
    compare("lpips float64", distance(*pair_of(case)), expected, 1e-9)


def test_psnr(case) -> None:
    found = psnr(*pair_of(case))
    if "psnr_per_image" in case.json:
        expected = [float(value) for value in case.json["psnr_per_image"]]
        assert found.tolist() == pytest.approx(expected, rel=1e-12)
    if "mse255" in case.json and "psnr_of_mean_mse" in case.json:
        mean_error = np.mean(case.json["mse255"])
        assert 10 * np.log10(255**2 / mean_error) == pytest.approx(case.json["psnr_of_mean_mse"], rel=1e-12)
