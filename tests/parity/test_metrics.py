"""FID, Inception Score, precision and recall against ADM's evaluation, torch-fidelity and float64, on seeded features."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from seeded import recipe, stored

from rear_scale.evaluate.metrics.distances import frechet_distance
from rear_scale.evaluate.metrics.inception_score import InceptionScoreSums, unbalanced_splits
from rear_scale.evaluate.metrics.moments import Moments, moments_of
from rear_scale.evaluate.metrics.precision_recall import overlap, radii

# As the json has them. The fp16 column varies with the hardware that made it.
FID_FULL, FID_SINGULAR, FID_ADM = 1e-12, 1e-8, 2e-6
ADM_FP16, FLIPS = 0.01, 2


def moments(features: np.ndarray) -> Moments:
    """Added up in blocks, as an evaluation does."""
    return moments_of(features[start : start + 500] for start in range(0, len(features), 500))


@pytest.fixture(scope="module")
def sets(case) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reference and sample features by sub-case."""
    make = recipe(case.json["recipe"]["python"])["make"]
    found = {name: make(case.json["seed"], name, sub["params"]) for name, sub in case.json.get("cases", {}).items()}
    for name, pair in found.items():
        for features, which in zip(pair, ("ref", "smp"), strict=True):
            stored = case.json["cases"][name].get(f"sha256_{which}")
            assert stored in (None, hashlib.sha256(features.tobytes()).hexdigest())
    return found


def test_fid(case, compare, sets) -> None:
    for name, (reference, samples) in sets.items():
        expected, adm = (stored(case.json, "cases", name, column, "fid") for column in ("exact", "adm"))
        a, b = moments(reference), moments(samples)
        found = frechet_distance(a, b)
        total = (a.covariance.trace() + b.covariance.trace()).item()
        singular = min(len(reference), len(samples)) <= reference.shape[1]
        if expected is not None:
            compare(f"{name} FID / traces", found / total, expected / total, FID_SINGULAR if singular else FID_FULL)
        if adm is not None:
            compare(f"{name} FID / traces, ADM", found / total, adm / total, FID_ADM)
        if np.array_equal(reference, samples):
            assert found == 0.0


def test_precision_and_recall(case, compare, sets) -> None:
    for name, (reference, samples) in sets.items():
        sub = case.json["cases"][name]
        found = overlap(reference, samples, radii(reference, "exact"), radii(samples, "exact"), "exact")
        for kind, value, count in (("precision", found.precision, samples), ("recall", found.recall, reference)):
            for column, expected in (
                ("exact", stored(sub, "exact", kind)),
                ("ADM fp32", stored(sub, "adm", f"{kind}_fp32")),
            ):
                if expected is not None:
                    compare(f"{name} {kind}, {column}", value, expected, (FLIPS + 0.5) / len(count))
        for key, flags in (("exact_smp_in_ref", found.sample_inside), ("exact_ref_in_smp", found.reference_inside)):
            if f"{name}/{key}" in case:
                expected = np.unpackbits(case.arrays[f"{name}/{key}"])[: len(flags)].astype(bool)
                assert (expected != flags).sum() <= FLIPS, (name, key)


def test_radii(case, compare, sets) -> None:
    for name, pair in sets.items():
        for features, which in zip(pair, ("ref", "smp"), strict=True):
            if f"{name}/exact_radii2_{which}" in case:
                expected = case.arrays[f"{name}/exact_radii2_{which}"]
                scale = np.square(features.astype(np.float64)).sum(1).mean()
                found = radii(features, "exact").numpy()[: len(expected)]
                compare(f"{name} radii {which} / norms", found / scale, expected / scale, 5e-6)


def test_half_precision_as_adm_runs_it(case, compare, sets) -> None:
    for name, (reference, samples) in sets.items():
        adm = case.json["cases"][name].get("adm")
        if adm is None or "precision_fp16" not in adm:
            continue
        mode = "adm_fp16"
        reference_radii = radii(reference, mode)
        found = overlap(reference, samples, reference_radii, radii(samples, mode), mode)
        # Where all halves overflow, the whole is float32 as in ADM and no rounding is left to differ.
        tolerance = ADM_FP16 if adm["fp16_path_taken"] else 0
        few = 1 / min(len(reference), len(samples)) if min(len(reference), len(samples)) < 300 else 0
        compare(f"{name} precision, fp16", found.precision, adm["precision_fp16"], max(tolerance, few) + 1e-12)
        compare(f"{name} recall, fp16", found.recall, adm["recall_fp16"], max(tolerance, few) + 1e-12)
        if f"adm/{name}/radii_ref_fp16" in case and adm["fp16_path_taken"]:
            expected = torch.from_numpy(case.arrays[f"adm/{name}/radii_ref_fp16"])
            # Every radius is a half, and differs from ADM's by what its reduction order rounds differently.
            assert torch.equal(reference_radii, reference_radii.half().float())
            scale = np.square(reference.astype(np.float64)).sum(1).mean()
            compare(f"{name} radii, fp16", reference_radii[: len(expected)] / scale, expected / scale, 8 * 2**-10)


def test_inception_score(case, compare) -> None:
    make = recipe(case.json["recipe"]["python"])["logits"]
    for name, sub in case.json.get("is_cases", {}).items():
        logits = make(case.json["seed"], name, **sub["params"])
        assert sub.get("sha256") in (None, hashlib.sha256(logits.tobytes()).hexdigest())
        sums = InceptionScoreSums(*logits.shape)
        # In an order and in parts of their own: the split belongs to the image.
        for ids in torch.randperm(len(logits), generator=torch.Generator().manual_seed(0)).split(700):
            sums.add(torch.from_numpy(logits)[ids], ids)
        score = sums.score()
        for key, found in (
            ("inception_score", score.value), ("per_split", score.per_split), ("one_split", score.one_split),
        ):  # fmt: skip
            expected = stored(sub, "exact", key)
            if expected is not None:
                ratios = np.array(found) / expected
                compare(f"{name} {key}, relative", ratios, np.ones_like(ratios), 1e-9)
        if sub.get("adm", {}).get("inception_score", "nan") != "nan":
            compare(f"{name} IS, ADM, relative", score.value / sub["adm"]["inception_score"], 1, 1e-6)
        if sub["params"]["order"] in ("cyclic", "sorted"):
            classes = sub["params"]["c"]
            numbers = np.arange(len(logits))
            cyclic = sub["params"]["order"] == "cyclic"
            labels = numbers % classes if cyclic else numbers * classes // len(logits)
            assert bool(unbalanced_splits(labels)) != cyclic
