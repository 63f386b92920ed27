"""Images in, scores out: against ADM's evaluator and reAR's, with seeded Inception weights."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from seeded import inception_state, recipe

from rear_scale.evaluate.features import InceptionFeatures
from rear_scale.evaluate.inception import Inception
from rear_scale.evaluate.inception_score import InceptionScoreSums
from rear_scale.evaluate.metrics import codebook_use, frechet_distance
from rear_scale.evaluate.moments import Moments, moments_of
from rear_scale.evaluate.neighbours import overlap, radii
from rear_scale.sample.quantise import to_uint8

BATCH = 16


def moments(features: np.ndarray) -> Moments:
    """Added up in blocks, as an evaluation does."""
    return moments_of(features[start : start + 500] for start in range(0, len(features), 500))


@pytest.fixture(scope="module")
def extractor(case, tmp_path_factory) -> InceptionFeatures:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "seeded.pth"
    torch.save(inception_state(case, Inception()), path)
    return InceptionFeatures(str(path), torch.device("cpu"))


def features_of(extractor: InceptionFeatures, images: np.ndarray) -> dict[str, np.ndarray]:
    batches = [extractor(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def score_of(extractor: InceptionFeatures, pool: np.ndarray) -> float:
    sums = InceptionScoreSums(len(pool), 1008)
    sums.add(torch.from_numpy(pool).double() @ extractor.classifier.T, torch.arange(len(pool)))
    return sums.score().value


@pytest.fixture(scope="module")
def found(case, extractor) -> dict[str, dict[str, np.ndarray]]:
    images = recipe(case.json["images"]["python"])["images"]
    sets = {"ref": (1000, 32), "refx": (2000, 32), "smp": (3000, 48)}
    pixels = {name: images(case.json["seed"], *place) for name, place in sets.items()}
    for name, array in pixels.items():
        assert hashlib.sha256(array.tobytes()).hexdigest() == case.json["sets"]["sha256"][name]
    return {name: features_of(extractor, array) for name, array in pixels.items()}


def test_features(case, compare, found) -> None:
    for stored, (name, kind) in {
        "ref_pool_first4": ("ref", "pool"),
        "smp_pool_first4": ("smp", "pool"),
        "smp_sfid_first2": ("smp", "spatial"),
    }.items():
        if stored in case:
            expected = case.arrays[stored]
            compare(stored, found[name][kind][: len(expected)], expected, 2e-5)


def references(found, kind: str) -> dict[str, Moments]:
    """Of the file without statistics, and of the one whose statistics (mean in float32) are those of more images."""
    more = moments(np.concatenate([found["ref"][kind], found["refx"][kind]]))
    return {"plain": moments(found["ref"][kind]), "virtual": Moments(more.mean.float().double(), more.covariance, 64)}


def test_distances(case, compare, found) -> None:
    for name, kind, adm_tolerance in (("FID", "pool", 2e-4), ("sFID", "spatial", 1e-3)):
        samples = moments(found["smp"][kind])
        for form, reference in references(found, kind).items():
            distance = frechet_distance(reference, samples)
            for source in ("from_adm_tf_features", "from_torch_features"):
                expected = case.json["exact"][source][form][name]
                compare(f"{name} {form} {source}, relative", distance / expected, 1, 1e-5)
            compare(f"{name} {form}, ADM", distance, case.json["adm"][form][name], adm_tolerance)


def test_inception_score_precision_and_recall(case, compare, extractor, found) -> None:
    value = score_of(extractor, found["smp"]["pool"])
    compare("IS, relative", value / case.json["exact"]["from_torch_features"]["IS"], 1, 1e-6)
    compare("IS, ADM, relative", value / case.json["adm"]["plain"]["Inception Score"], 1, 1e-6)
    reference, samples = found["ref"]["pool"], found["smp"]["pool"]
    for mode, suffix, flips in (("exact", "_fp32", 1), ("adm_fp16", "", 3)):
        both = overlap(reference, samples, radii(reference, mode), radii(samples, mode), mode)
        compare(
            f"precision {mode}", both.precision, case.json["adm"]["plain"][f"Precision{suffix}"], (flips + 0.5) / 48
        )
        compare(f"recall {mode}", both.recall, case.json["adm"]["plain"][f"Recall{suffix}"], (flips + 0.5) / 32)


def test_reconstructions_as_the_released_evaluator_scores_them(case, compare, extractor) -> None:
    if "rear_evaluator" not in case.json:
        return
    images, seed = recipe(case.json["images"]["python"])["images"], case.json["seed"]
    expected = case.json["rear_evaluator"]
    fractions = np.random.default_rng([seed, 2, 0]).uniform(0.1, 0.9, size=(2, 24, 256, 256, 3))
    sets = {}
    for name, start, fraction in (("real", 1000, fractions[0]), ("fake", 3000, fractions[1])):
        floats = (np.minimum(images(seed, start, 24) + fraction, 255) / 255).astype(np.float32).transpose(0, 3, 1, 2)
        floats = np.ascontiguousarray(floats)
        assert hashlib.sha256(floats.tobytes()).hexdigest() == expected["sha256"][f"{name}_float32_nchw"]
        sets[name] = torch.from_numpy(floats)
    for rule, key in (("trunc255", "result_truncation"), ("round", "result_if_rounded_instead")):
        pools = {name: features_of(extractor, to_uint8(images, rule))["pool"] for name, images in sets.items()}
        distance = frechet_distance(moments(pools["real"]), moments(pools["fake"]))
        compare(f"rFID {rule}", distance, expected[key]["rFID"], 2e-4)
        compare(f"IS {rule}, relative", score_of(extractor, pools["fake"]) / expected[key]["InceptionScore"], 1, 1e-6)
    codes = np.random.default_rng([seed, 2, 1]).integers(0, 700, size=(24, 64))
    assert hashlib.sha256(codes.tobytes()).hexdigest() == expected["sha256"]["codes_int64"]
    use = codebook_use(np.bincount(codes.ravel(), minlength=1024))
    compare("codebook used", use.used, expected["result_truncation"]["CodebookUsage"], 1e-12)
    compare("codebook entropy", use.entropy, expected["result_truncation"]["CodebookEntropy"], 1e-12)
