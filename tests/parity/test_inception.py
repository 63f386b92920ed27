"""The Inception of 2015-12-05 against torch-fidelity's, with seeded weights."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from seeded import inception_state, recipe

from rear_scale.evaluate.features import InceptionFeatures
from rear_scale.evaluate.inception import Inception, resize_tf1

TOLERANCES = {"float64": 5e-6, "float32_cpu": 2e-5}  # absolute, as in the json


@pytest.fixture(scope="module")
def network(case) -> Inception:
    network = Inception().eval().requires_grad_(False)
    network.load_state_dict(inception_state(case, network), strict=False)
    return network


def images_of(case, name: str) -> np.ndarray:
    if name == "main":
        return case.arrays["images"]
    height, width = map(int, name.split("x"))
    number = 100 + ["64x64", "299x299", "512x512", "200x320"].index(name)
    images = recipe(case.json["images"]["python"])["images"](case.json["seed"], number, 1, height, width)
    assert hashlib.sha256(images.tobytes()).hexdigest() == case.json["extra_images_sha256"][name]
    return images


def test_names_and_shapes_are_the_public_files(case, network) -> None:
    if "state_dict" not in case.json:
        return
    found = {name: list(value.shape) for name, value in network.state_dict().items() if "num_batches" not in name}
    assert found == case.json["state_dict"]
    for name, (total, squares) in case.json.get("weight_checks", {}).items():
        value = network.state_dict()[name].double()
        assert value.sum().item() == pytest.approx(total, abs=1e-6 * squares)


@pytest.mark.parametrize("precision", ["float32_cpu", "float64"])
def test_features(case, compare, network, precision: str) -> None:
    network = network.double() if precision == "float64" else network.float()
    tolerance = TOLERANCES[precision]
    sizes = {"main": "", **{name: f"extra/{name}/" for name in case.json.get("extra_images_sha256", {})}}
    for name, prefix in sizes.items():
        if f"{prefix}pool" not in case:
            continue
        pixels = torch.from_numpy(images_of(case, name)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            pool, spatial = network(pixels)
        compare(f"{prefix}pool {precision}", pool, case.arrays[f"{prefix}pool"], tolerance)
        compare(f"{prefix}sfid {precision}", spatial, case.arrays[f"{prefix}sfid"], tolerance)
        if f"{prefix}logits_unbiased" in case:
            logits = pool.double() @ network.fc.weight.double().T
            # The logits multiply the features by weights of norm 30: the reference's own float32 parts from its float64
            # by what the json records, and more than the tolerance with some seeds. Two roundings may add up.
            rounding = case.json.get("float32_vs_float64_maxabs", {}).get("logits_unbiased", 0)
            limit = tolerance if precision == "float64" else max(tolerance, 2 * rounding)
            compare(f"{prefix}logits_unbiased {precision}", logits, case.arrays[f"{prefix}logits_unbiased"], limit)
    network.float()


def test_resize(case, compare) -> None:
    for name, prefix in {
        "main": "",
        **{name: f"extra/{name}/" for name in case.json.get("extra_images_sha256", {})},
    }.items():
        stored = "resized_every13" if name == "main" else f"{prefix}resized_corner"
        if stored not in case:
            continue
        images = torch.from_numpy(images_of(case, name)).permute(0, 3, 1, 2).double()
        resized = resize_tf1(images)[:, :, ::13, ::13]
        compare(f"resize {name}", resized.reshape(case.arrays[stored].shape), case.arrays[stored], 2e-5)
        if f"resized_mean_{name}" in case.json:
            assert resize_tf1(images).mean().item() == pytest.approx(case.json[f"resized_mean_{name}"], abs=1e-6)


def test_the_extractor_reads_the_weights_from_a_file(case, compare, network, tmp_path) -> None:
    torch.save(network.state_dict(), tmp_path / "seeded.pth")
    found = InceptionFeatures(str(tmp_path / "seeded.pth"), torch.device("cpu"))(case.arrays["images"])
    compare("pool, extractor", found["pool"], case.arrays["pool"], TOLERANCES["float32_cpu"])
    compare("sfid, extractor", found["spatial"], case.arrays["sfid"], TOLERANCES["float32_cpu"])
