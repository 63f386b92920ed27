"""The table of experiments, by name. A new experiment is one file, and one line here."""

from __future__ import annotations

from rear_scale.analysis import cka, embedding, errors, exposure, generalization, memorization
from rear_scale.analysis.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (generalization, exposure, embedding, cka, errors, memorization)
}
