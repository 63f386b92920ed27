"""The Inception of 2015-12-05 against torch-fidelity's, with seeded weights."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from seeded import images_of, inception_state, stored

from rear_scale.evaluate.networks.base import InceptionFeatures
from rear_scale.evaluate.networks.inception import Inception, resize_tf1

TOLERANCES = {"float64": 5e-6, "float32_cpu": 2e-5}  # absolute, as in the json


@pytest.fixture(scope="module")
def network(case) -> Inception:
    network = Inception().eval().requires_grad_(False)
    network.load_state_dict(inception_state(case, network), strict=False)
    return network


def prefixes(case) -> dict[str, str]:
    """Of the arrays of each set of images."""
    return {
        "main": "",
        **{name.removeprefix("extra/"): f"{name}/" for name in stored(case.json, "images", "extra") or ()},
    }


def pixels_of(case, name: str) -> np.ndarray:
    if name == "main":
        images = case.arrays["images"] if "images" in case else images_of(case, case.json["images"]["main"])[0]
        sha256 = stored(case.json, "images_sha256")
    else:
        (images,) = images_of(case, case.json["images"]["extra"][f"extra/{name}"])
        sha256 = stored(case.json, "extra_images_sha256", name)
    assert sha256 in (None, hashlib.sha256(images.tobytes()).hexdigest())
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
    for name, prefix in prefixes(case).items():
        if not any(f"{prefix}{kind}" in case for kind in ("pool", "sfid", "logits_unbiased")):
            continue
        pixels = torch.from_numpy(pixels_of(case, name)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            pool, spatial = network(pixels)
        for kind, found in (("pool", pool), ("sfid", spatial)):
            if f"{prefix}{kind}" in case:
                compare(f"{prefix}{kind} {precision}", found, case.arrays[f"{prefix}{kind}"], tolerance)
        if f"{prefix}logits_unbiased" in case:
            logits = pool.double() @ network.fc.weight.double().T
            # The logits multiply the features by weights of norm 30: the reference's own float32 parts from its float64
            # by what the json records, and more than the tolerance with some seeds. Two roundings may add up.
            rounding = case.json.get("float32_vs_float64_maxabs", {}).get("logits_unbiased", 0)
            limit = tolerance if precision == "float64" else max(tolerance, 2 * rounding)
            compare(f"{prefix}logits_unbiased {precision}", logits, case.arrays[f"{prefix}logits_unbiased"], limit)
    network.float()


def test_resize(case, compare) -> None:
    for name, prefix in prefixes(case).items():
        key = "resized_every13" if name == "main" else f"{prefix}resized_corner"
        if key not in case:
            continue
        images = torch.from_numpy(pixels_of(case, name)).permute(0, 3, 1, 2).double()
        resized = resize_tf1(images)[:, :, ::13, ::13]
        compare(f"resize {name}", resized.reshape(case.arrays[key].shape), case.arrays[key], 2e-5)
        if f"resized_mean_{name}" in case.json:
            assert resize_tf1(images).mean().item() == pytest.approx(case.json[f"resized_mean_{name}"], abs=1e-6)


def test_the_extractor_reads_the_weights_from_a_file(case, compare, network, tmp_path) -> None:
    torch.save(network.state_dict(), tmp_path / "seeded.pth")
    found = InceptionFeatures(str(tmp_path / "seeded.pth"), torch.device("cpu"))(pixels_of(case, "main"))
    for key, kind in (("pool", "pool"), ("sfid", "spatial")):
        if key in case:
            compare(f"{key}, extractor", found[kind], case.arrays[key], TOLERANCES["float32_cpu"])
