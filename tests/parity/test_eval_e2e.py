"""Images in, scores out: against ADM's evaluator and reAR's, with seeded Inception weights."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from helpers import launch
from seeded import images_of, inception_state, stored

from rear_scale.evaluate.metrics.distances import codebook_use, frechet_distance
from rear_scale.evaluate.metrics.inception_score import InceptionScoreSums
from rear_scale.evaluate.metrics.moments import Moments, moments_of
from rear_scale.evaluate.metrics.precision_recall import overlap, radii
from rear_scale.evaluate.networks.base import InceptionFeatures
from rear_scale.evaluate.networks.inception import Inception
from rear_scale.sample.uint8_rounding import to_uint8

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


_known: dict[tuple[int, bytes], dict[str, np.ndarray]] = {}


def features_of(extractor: InceptionFeatures, images: np.ndarray) -> dict[str, np.ndarray]:
    """Those of an image that was there before are not computed again."""
    keys = [(id(extractor), hashlib.sha256(image.tobytes()).digest()) for image in images]
    new = [index for index, key in enumerate(keys) if key not in _known]
    for start in range(0, len(new), BATCH):
        chosen = new[start : start + BATCH]
        found = extractor(images[chosen])
        _known.update({keys[index]: {name: found[name][n] for name in found} for n, index in enumerate(chosen)})
    return {name: np.stack([_known[key][name] for key in keys]) for name in _known[keys[0]]}


def score_of(extractor: InceptionFeatures, pool: np.ndarray) -> float:
    sums = InceptionScoreSums(len(pool), 1008)
    sums.add(torch.from_numpy(pool).double() @ extractor.classifier.T, torch.arange(len(pool)))
    return sums.score().value


@pytest.fixture(scope="module")
def found(case, extractor) -> dict[str, dict[str, np.ndarray]]:
    described = {"ref": "ref_arr_0", "refx": "ref_extra", "smp": "smp_arr_0"}
    pixels = {name: images_of(case, case.json["sets"][key])[0] for name, key in described.items()}
    for name, array in pixels.items():
        sha256 = stored(case.json, "sets", "sha256", name)
        assert sha256 in (None, hashlib.sha256(array.tobytes()).hexdigest())
    return {name: features_of(extractor, array) for name, array in pixels.items()}


def test_features(case, compare, found) -> None:
    for key, (name, kind) in {
        "ref_pool_first4": ("ref", "pool"),
        "smp_pool_first4": ("smp", "pool"),
        "smp_sfid_first2": ("smp", "spatial"),
    }.items():
        if key in case:
            expected = case.arrays[key]
            compare(key, found[name][kind][: len(expected)], expected, 2e-5)


def references(found, kind: str) -> dict[str, Moments]:
    """Of the file without statistics, and of the one whose statistics (mean in float32) are those of more images."""
    more = moments(np.concatenate([found["ref"][kind], found["refx"][kind]]))
    virtual = Moments(more.mean.float().double(), more.covariance, more.count)
    return {"plain": moments(found["ref"][kind]), "virtual": virtual}


def test_distances(case, compare, found) -> None:
    for name, kind, adm_tolerance in (("FID", "pool", 2e-4), ("sFID", "spatial", 1e-3)):
        samples = moments(found["smp"][kind])
        for form, reference in references(found, kind).items():
            distance = frechet_distance(reference, samples)
            for source in ("from_adm_tf_features", "from_torch_features"):
                expected = stored(case.json, "exact", source, form, name)
                if expected is not None:
                    compare(f"{name} {form} {source}, relative", distance / expected, 1, 1e-5)
            expected = stored(case.json, "adm", form, name)
            if expected is not None:
                compare(f"{name} {form}, ADM", distance, expected, adm_tolerance)


def test_inception_score_precision_and_recall(case, compare, extractor, found) -> None:
    value = score_of(extractor, found["smp"]["pool"])
    for column, keys in (
        ("exact", ("exact", "from_torch_features", "IS")),
        ("ADM", ("adm", "plain", "Inception Score")),
    ):
        expected = stored(case.json, *keys)
        if expected is not None:
            compare(f"IS, {column}, relative", value / expected, 1, 1e-6)
    reference, samples = found["ref"]["pool"], found["smp"]["pool"]
    for mode, suffix, flips in (("exact", "_fp32", 1), ("adm_fp16", "", 3)):
        both = overlap(reference, samples, radii(reference, mode), radii(samples, mode), mode)
        for kind, share, count in (("Precision", both.precision, samples), ("Recall", both.recall, reference)):
            expected = stored(case.json, "adm", "plain", f"{kind}{suffix}")
            if expected is not None:
                compare(f"{kind} {mode}, ADM", share, expected, (flips + 0.5) / len(count))
            expected = stored(case.json, "exact", "from_torch_features", kind)
            if expected is not None and mode == "exact":
                compare(f"{kind}, exact", share, expected, 1.5 / len(count))


@pytest.mark.long
def test_the_command_gives_the_scores_that_adm_prints(case, compare, tmp_path) -> None:
    """`python -m rear_scale evaluate` on the files that ADM's evaluator gets, with nothing else."""
    weights = tmp_path / "seeded.pth"
    torch.save(inception_state(case, Inception()), weights)
    for name, key in (("b", "ref_arr_0"), ("a", "smp_arr_0")):
        np.savez(tmp_path / f"{name}.npz", arr_0=images_of(case, case.json["sets"][key])[0])
    done = launch(
        "python", "-m", "rear_scale", "evaluate", "--samples", "a.npz", "--json",
        "evaluate.reference.adm=b.npz", f"evaluate.inception_weights={weights}", cwd=tmp_path, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores, expected = json.loads(done.stdout)["scores"], case.json["adm"]["plain"]
    compare("FID", scores["fid/adm"], expected["FID"], 2e-4)
    compare("sFID", scores["sfid/adm"], expected["sFID"], 1e-3)
    compare("IS, relative", scores["inception_score"] / expected["Inception Score"], 1, 1e-6)
    for kind, count in (("Precision", 48), ("Recall", 32)):
        compare(kind, scores[f"{kind.lower()}_adm_fp16/adm"], expected[kind], 3.5 / count)


def test_reconstructions_as_the_released_evaluator_scores_them(case, compare, extractor) -> None:
    if "rear_evaluator" not in case.json:
        return
    expected, seed = case.json["rear_evaluator"], case.json["seed"]
    originals = images_of(case, expected["inputs"])
    fractions = np.random.default_rng([seed, 2, 0]).uniform(0.1, 0.9, size=(2, *originals[0].shape))
    sets = {}
    for name, pixels, fraction in zip(("real", "fake"), originals, fractions, strict=True):
        floats = (np.minimum(pixels + fraction, 255) / 255).astype(np.float32).transpose(0, 3, 1, 2)
        floats = np.ascontiguousarray(floats)
        sha256 = stored(expected, "sha256", f"{name}_float32_nchw")
        assert sha256 in (None, hashlib.sha256(floats.tobytes()).hexdigest())
        sets[name] = torch.from_numpy(floats)
    for rule, key in (("truncate", "result_truncation"), ("nearest", "result_if_rounded_instead")):
        if key not in expected:
            continue
        pools = {name: features_of(extractor, to_uint8(images, rule))["pool"] for name, images in sets.items()}
        distance = frechet_distance(moments(pools["real"]), moments(pools["fake"]))
        compare(f"rFID {rule}", distance, expected[key]["rFID"], 2e-4)
        compare(f"IS {rule}, relative", score_of(extractor, pools["fake"]) / expected[key]["InceptionScore"], 1, 1e-6)
    codes = np.random.default_rng([seed, 2, 1]).integers(0, 700, size=(24, 64))
    sha256 = stored(expected, "sha256", "codes_int64")
    assert sha256 in (None, hashlib.sha256(codes.tobytes()).hexdigest())
    use = codebook_use(np.bincount(codes.ravel(), minlength=1024))
    for found, key in ((use.used, "CodebookUsage"), (use.entropy, "CodebookEntropy")):
        if stored(expected, "result_truncation", key) is not None:
            compare(key, found, expected["result_truncation"][key], 1e-12)
