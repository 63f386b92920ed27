"""Metrics of stored features. `METRICS` lists all of them: results, scores during training, the summary for wandb and the
printed table walk it."""

from __future__ import annotations

from rear_scale.evaluate.metrics.base import Metric
from rear_scale.evaluate.metrics.classes import ClassAccuracy, ClassifierDistance, NearestDistance
from rear_scale.evaluate.metrics.frechet import FrechetDistance
from rear_scale.evaluate.metrics.inception_score import InceptionScoreMetric
from rear_scale.evaluate.metrics.kernel import KernelDistance
from rear_scale.evaluate.metrics.precision_recall import NeighbourMetrics
from rear_scale.evaluate.metrics.reconstruction import Lpips, Psnr, TokenUse
from rear_scale.evaluate.metrics.sliced import SlicedDistance

METRICS: list[Metric] = [
    FrechetDistance("fid", "inception", "pool", title="FID", published="fid"),
    FrechetDistance("sfid", "inception", "spatial", title="sFID"),
    InceptionScoreMetric(),
    NeighbourMetrics("inception", "pool", in_table=True),
    KernelDistance("kid", "inception", "pool", images=5000),
    SlicedDistance("mind", "inception", "pool"),
    FrechetDistance("fd_dinov2", "dinov2", "cls"),
    NeighbourMetrics("dinov2", "cls", prefix="dinov2_"),
    FrechetDistance("fd_efficientnet", "efficientnet", "average", title="FD (EfficientNet)"),
    KernelDistance("kd_efficientnet", "efficientnet", "average", title="KD (EfficientNet)"),
    NeighbourMetrics("efficientnet", "average", prefix="efficientnet_"),
    SlicedDistance("mind_efficientnet", "efficientnet", "average"),
    ClassAccuracy(),
    ClassifierDistance(),
    NearestDistance(),
    Psnr(),
    Lpips(),
    TokenUse(),
]


def register(metric: Metric) -> Metric:
    """The metric, after adding it to METRICS; for metrics defined in other files. Its name must be new."""
    assert metric.name not in [other.name for other in METRICS], metric.name
    METRICS.append(metric)
    return metric


def metrics_of(network: str) -> list[Metric]:
    """The metrics that read a network's features, in the order of the list."""
    return [metric for metric in METRICS if metric.network == network]


def distance_on(feature: str) -> str:
    """The name of the Fréchet distance on a feature, or the feature's own name where there is none."""
    names = (metric.name for metric in METRICS if isinstance(metric, FrechetDistance) and metric.feature == feature)
    return next(names, feature)
