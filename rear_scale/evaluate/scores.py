"""From stored features to scores: Fréchet distances, Inception Score, nearest neighbours, with their counts and caveats."""

# n images, F features

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from rear_scale.config import EvaluateConfig
from rear_scale.evaluate.metrics.distances import frechet_distance
from rear_scale.evaluate.metrics.inception_score import InceptionScore, InceptionScoreSums, unbalanced_splits
from rear_scale.evaluate.metrics.moments import MomentSums
from rear_scale.evaluate.metrics.precision_recall import NEIGHBOURS, overlap, radii
from rear_scale.evaluate.metrics.statistics_file import KINDS
from rear_scale.evaluate.networks.base import FeatureNetwork
from rear_scale.evaluate.networks.feature_cache import FeatureBlocks
from rear_scale.evaluate.reference import Reference, block_moments
from rear_scale.world import World

_EXTRAPOLATION_POINTS = 8
_INTERVAL = (2.5, 97.5)  # percentiles


def network_scores(
    network: FeatureNetwork,
    samples: FeatureBlocks,
    references: Sequence[Reference],
    cfg: EvaluateConfig,
    world: World,
) -> dict[str, Any]:
    """All scores by one network's features. All ranks must call this; each computes some, and all get the whole."""
    jobs = [_distances_job(kind, samples, references, world) for kind in network.sizes]
    if network.classifier is not None:
        jobs.append(lambda: {"inception_score": _inception_score(network, samples)})
    if cfg.extrapolate:
        jobs += [_extrapolation_job(kind, samples, references, world, cfg.seed) for kind in network.sizes]
    jobs += [
        _bootstrap_job(kind, draw, network, samples, references, world, cfg.seed)
        for draw in range(cfg.bootstrap)
        for kind in network.sizes
    ]
    found = _shared_out(jobs, world)
    scores: dict[str, Any] = {"weights_sha256": network.weights_sha256, "weights_are_published": network.is_published}
    scores["samples"] = samples.count
    score = next((part["inception_score"] for part in found if "inception_score" in part), None)
    if score is not None:
        scores["inception_score"] = _describe_inception_score(score, samples, network)
    scores["references"] = {}
    for reference in references:
        mine = [part[reference.name] for part in found if reference.name in part]
        merged: dict[str, Any] = {"samples": samples.count}
        for part in mine:
            if "draw" not in part:
                merged.update(part)
        merged.update(_neighbour_scores(network.neighbours, samples, reference, cfg, world))
        caveats = [merged.pop(key) for key in list(merged) if key.endswith("_caveat")]
        merged["notes"] = [*reference.notes, *caveats, *_singular_notes(network, samples)]
        if cfg.bootstrap:
            merged["bootstrap"] = _intervals(merged, [part for part in mine if "draw" in part], samples, reference, cfg)
        scores["references"][reference.name] = merged
    if cfg.bootstrap and score is not None:
        draws = [part["bootstrap_inception_score"] for part in found if "bootstrap_inception_score" in part]
        scores["inception_score"]["bootstrap"] = _interval(score.value, draws)
    return scores


def _shared_out(jobs: Sequence[Callable[[], dict[str, Any]]], world: World) -> list[dict[str, Any]]:
    """The results of all jobs, in order, on every rank; each is computed by one rank."""
    mine = {number: jobs[number]() for number in range(world.rank, len(jobs), world.size)}
    merged: dict[int, dict[str, Any]] = {}
    for part in world.gather(mine):
        merged.update(part)
    return [merged[number] for number in range(len(jobs))]


def _distances_job(
    kind: str, samples: FeatureBlocks, references: Sequence[Reference], world: World
) -> Callable[[], dict[str, Any]]:
    def job() -> dict[str, Any]:
        metric, own = KINDS[kind].metric, block_moments(samples, kind, world.device)
        found: dict[str, Any] = {}
        for reference in references:
            other = reference.moments(kind, world.device)
            found[reference.name] = {
                metric: None if other is None or samples.count < 2 else frechet_distance(own, other),
                f"{metric}_reference_images": None if other is None else other.count,
            }
            if other is not None and other.is_singular:
                found[reference.name][f"{metric}_caveat"] = _singular(metric, other.count, len(other.mean), "reference")
        return found

    return job


def _singular(metric: str, count: int, size: int, whose: str) -> str:
    return (
        f"{metric}: {count:,} {whose} images give a singular covariance of {size} features; the value is exact for them, but "
        "compares only with values of as many"
    )


def _singular_notes(network: FeatureNetwork, samples: FeatureBlocks) -> list[str]:
    return [
        _singular(KINDS[kind].metric, samples.count, size, "sample")
        for kind, size in network.sizes.items()
        if samples.count <= size
    ]


def _inception_score(
    network: FeatureNetwork, samples: FeatureBlocks, weights: np.ndarray | None = None
) -> InceptionScore:
    """weights: int [n] by image number, how often each image counts; null = once."""
    sums = InceptionScoreSums(samples.count, len(network.classifier))
    for number, ids in enumerate(samples.ids):
        chosen = None if weights is None else torch.from_numpy(weights[ids]).double()
        sums.add(_logits(network, samples, number), torch.from_numpy(ids), chosen)
    return sums.score()


def _logits(network: FeatureNetwork, samples: FeatureBlocks, number: int) -> torch.Tensor:
    """float64 [n, classes] of a block."""
    pool = torch.from_numpy(samples.array(number, network.neighbours)).to(network.classifier.device)
    return pool.double() @ network.classifier.T


def _describe_inception_score(score: InceptionScore, samples: FeatureBlocks, network: FeatureNetwork) -> dict[str, Any]:
    labels, known = samples.column("label"), "classes"
    if labels is None:
        predicted = [_logits(network, samples, number).argmax(1).cpu().numpy() for number in range(len(samples.ids))]
        labels = np.concatenate(predicted)[np.argsort(np.concatenate(samples.ids))]
        known = "predicted classes (the file has no labels)"
    found = asdict(score) | {"std": None if len(score.per_split) < 2 else score.std, "split_images": 5000}
    if unbalanced := unbalanced_splits(labels):
        found["warning"] = (
            f"the {known} of splits {unbalanced} are not distributed as those of all images, which lowers the score: put the "
            f"images in an order that mixes classes (image i of class i mod C), or read the one-split value"
        )
    return found


def _neighbour_scores(
    kind: str, samples: FeatureBlocks, reference: Reference, cfg: EvaluateConfig, world: World
) -> dict[str, Any]:
    """Precision, recall, density and coverage in each arithmetic. All ranks must call this."""
    rows = reference.rows(kind, cfg.neighbour_reference_images)
    if rows is None or min(len(rows), samples.count) <= NEIGHBOURS:
        return dict.fromkeys(("precision", "recall", "density", "coverage"))
    sample_rows = samples.rows(kind)
    found: dict[str, Any] = {"precision": {}, "recall": {}, "density": {}, "coverage": {}}
    for mode in cfg.neighbour_modes:
        reference_radii = reference.radii(kind, mode, rows, world)
        sample_radii = radii(sample_rows, mode, world)
        both = overlap(rows, sample_rows, reference_radii, sample_radii, mode, world)
        for name in found:
            found[name][mode] = getattr(both, name)
    return {**found, "neighbours": NEIGHBOURS, "neighbour_reference_images": len(rows)}


def _extrapolation_job(
    kind: str, samples: FeatureBlocks, references: Sequence[Reference], world: World, seed: int
) -> Callable[[], dict[str, Any]]:
    """The distance at infinitely many samples: a line in 1/N through growing subsets (Chong & Forsyth 2020, arXiv:1911.07023)."""

    def job() -> dict[str, Any]:
        count = samples.count
        metric = KINDS[kind].metric
        sizes = np.unique(np.linspace(count / 4, count, _EXTRAPOLATION_POINTS).round().astype(int))
        sizes = sizes[sizes >= 2]  # images that have a covariance
        if len(sizes) < 2:
            return {reference.name: {f"{metric}_extrapolated": None} for reference in references}
        # Image i joins at a place of its own, so the subsets do not depend on the blocks.
        places = np.random.default_rng([seed, 1]).permutation(count)
        groups = np.searchsorted(sizes, places, side="right")
        sums: dict[int, MomentSums] = {}
        shift: torch.Tensor | None = None
        for number, ids in enumerate(samples.ids):
            features = torch.from_numpy(samples.array(number, kind))
            if shift is None:
                shift = features.to(world.device).double().mean(0)
            for group in np.unique(groups[ids]):
                sums.setdefault(int(group), MomentSums(features.shape[1], world.device, shift)).add(
                    features[torch.from_numpy(groups[ids] == group)]
                )
        total = MomentSums(features.shape[1], world.device, shift)
        values: dict[str, list[float]] = {reference.name: [] for reference in references}
        for group in range(len(sizes)):
            total.add_sums(sums[group])
            own = total.moments()
            for reference in references:
                other = reference.moments(kind, world.device)
                if other is not None:
                    values[reference.name].append(frechet_distance(own, other))
        return {
            name: {f"{metric}_extrapolated": _line(sizes, found) if found else None} for name, found in values.items()
        }

    return job


def _line(sizes: np.ndarray, values: list[float]) -> dict[str, Any]:
    slope, intercept = np.polyfit(1 / sizes, values, 1)
    return {"value": float(intercept), "slope": float(slope), "samples": sizes.tolist(), "values": values}


def _bootstrap_job(
    kind: str,
    draw: int,
    network: FeatureNetwork,
    samples: FeatureBlocks,
    references: Sequence[Reference],
    world: World,
    seed: int,
) -> Callable[[], dict[str, Any]]:
    """One resampling of the samples, with replacement; the references stay as they are."""

    def job() -> dict[str, Any]:
        count = samples.count
        weights = np.random.default_rng([seed, 2, draw]).multinomial(count, np.full(count, 1 / count))
        sums: MomentSums | None = None
        for number, ids in enumerate(samples.ids):
            features = torch.from_numpy(samples.array(number, kind))
            sums = sums or MomentSums(features.shape[1], world.device)
            sums.add(features, torch.from_numpy(weights[ids]).double())
        assert sums is not None
        own, metric = sums.moments() if count > 1 else None, KINDS[kind].metric
        found: dict[str, Any] = {}
        for reference in references:
            other = reference.moments(kind, world.device)
            value = None if own is None or other is None else frechet_distance(own, other)
            found[reference.name] = {"draw": draw, "metric": metric, "value": value}
        if kind == network.neighbours and network.classifier is not None:
            found["bootstrap_inception_score"] = _inception_score(network, samples, weights).value
        return found

    return job


def _intervals(
    scores: dict[str, Any],
    draws: list[dict[str, Any]],
    samples: FeatureBlocks,
    reference: Reference,
    cfg: EvaluateConfig,
) -> dict[str, Any]:
    """By metric. A share's bootstrap needs no draws of images: the resampled mean of its flags is binomial, balls held fixed."""
    found: dict[str, Any] = {"draws": cfg.bootstrap}
    for metric in sorted({part["metric"] for part in draws}):
        values = [part["value"] for part in draws if part["metric"] == metric and part["value"] is not None]
        found[metric] = _interval(scores[metric], values) if values else None
    counts = {"precision": samples.count, "recall": scores.get("neighbour_reference_images")}
    for name, count in counts.items():
        if scores[name]:
            generator = np.random.default_rng([cfg.seed, 3])
            found[name] = {
                mode: _interval(share, generator.binomial(count, share, 1000) / count)
                for mode, share in scores[name].items()
            }
    return found


def _interval(value: float, draws: Sequence[float]) -> dict[str, Any]:
    """The basic bootstrap interval, 95 %: percentiles mirrored about the value, because resampling biases distances upwards."""
    low, high = np.percentile(draws, _INTERVAL)
    return {"low": float(2 * value - high), "high": float(2 * value - low), "std": float(np.std(draws, ddof=1))}
