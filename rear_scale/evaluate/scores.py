"""Scores from stored features: runs the metrics of a network, distributed over ranks, and merges their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rear_scale.config import EvaluateConfig
from rear_scale.evaluate.metrics import metrics_of
from rear_scale.evaluate.metrics.base import FeatureSet, Inputs, Metric, Output
from rear_scale.evaluate.metrics.bootstrap import interval, resampling
from rear_scale.evaluate.networks.base import FeatureNetwork
from rear_scale.evaluate.networks.feature_cache import FeatureBlocks
from rear_scale.evaluate.reference import Reference
from rear_scale.evaluate.result import NetworkScores
from rear_scale.world import World


def network_scores(
    network: FeatureNetwork,
    samples: FeatureBlocks,
    references: Sequence[Reference],
    cfg: EvaluateConfig,
    world: World,
) -> NetworkScores:
    """All scores by one network's features. All ranks must call this; each computes a part, and all return all scores."""
    inputs = Inputs(network, FeatureSet("samples", samples, world.device), references, cfg, world)
    computed = run_metrics(metrics_of(network.name), inputs)
    scores = {}
    for reference in references:
        values = {"samples": samples.count, **computed.by_reference[reference.name]}
        values["notes"] = [*reference.notes, *computed.notes[reference.name], *computed.sample_notes]
        if cfg.bootstrap:
            values["bootstrap"] = {"draws": cfg.bootstrap, **computed.intervals[reference.name]}
        scores[reference.name] = values
    return NetworkScores(network.weights_sha256, network.is_published, samples.count, computed.of_samples, scores)


@dataclass
class MetricValues:
    """The values of metrics for one set of images."""

    of_samples: dict[str, Any] = field(default_factory=dict)  # values without a reference, by key of result.json
    sample_notes: list[str] = field(default_factory=list)
    by_reference: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name of the reference and key
    notes: dict[str, list[str]] = field(default_factory=dict)  # by name of the reference
    intervals: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name of the reference and key

    def add(self, part: Output) -> None:
        if part.reference is None:
            self.of_samples.update(part.values)
            self.sample_notes += part.notes
        else:
            self.by_reference[part.reference].update(part.values)
            self.notes[part.reference] += part.notes
            self.intervals[part.reference].update(part.intervals)


def run_metrics(metrics: Sequence[Metric], inputs: Inputs) -> MetricValues:
    """The values of the metrics, with bootstrap intervals under evaluate.bootstrap. All ranks must call this."""
    names = [reference.name for reference in inputs.references]
    merged = MetricValues(
        by_reference={name: {} for name in names},
        notes={name: [] for name in names},
        intervals={name: {} for name in names},
    )
    tasks = [task for metric in metrics for task in metric.tasks(inputs)]
    resampled = [metric for metric in metrics if metric.resamples]
    draws = [partial(_draw, metric, inputs, number) for number in range(inputs.cfg.bootstrap) for metric in resampled]
    done = _distributed([*tasks, *draws], inputs.world)
    for parts in done[: len(tasks)]:
        for part in parts:
            merged.add(part)
    if inputs.cfg.bootstrap:
        for number, metric in enumerate(resampled):
            _add_intervals(merged, metric, done[len(tasks) + number :: len(resampled)])
    for metric in metrics:
        for part in metric.together(inputs):
            merged.add(part)
    return merged


def _draw(metric: Metric, inputs: Inputs, number: int) -> dict[str | None, float | None]:
    return metric.resampled(inputs, resampling(inputs.cfg.seed, number, inputs.samples.count))


def _add_intervals(merged: MetricValues, metric: Metric, draws: Sequence[Mapping[str | None, float | None]]) -> None:
    """Adds the bootstrap interval of one metric, computed from its value in each draw."""
    for reference in draws[0]:
        values = [value for draw in draws if (value := draw[reference]) is not None]
        own = merged.of_samples if reference is None else merged.by_reference[reference]
        (score,) = metric.numbers(own).values()
        around = interval(score, values) if values and score is not None else None
        if reference is None:
            own[metric.name]["bootstrap"] = around
        else:
            merged.intervals[reference][metric.name] = around


def _distributed(jobs: Sequence[Callable[[], Any]], world: World) -> list[Any]:
    """The results of all jobs, in order, on every rank; each job runs on one rank."""
    mine = {number: jobs[number]() for number in range(world.rank, len(jobs), world.size)}
    merged: dict[int, Any] = {}
    for part in world.gather(mine):
        merged.update(part)
    return [merged[number] for number in range(len(jobs))]
