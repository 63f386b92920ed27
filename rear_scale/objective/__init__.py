"""The training objective: label dropout, noisy context, prediction order and loss terms of a micro-batch."""

# B images, U distinct classes of a micro-batch, N tokens of an image, K codes

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rear_scale import rng
from rear_scale.config import ExperimentConfig, Plan
from rear_scale.objective import noise, permutation, schedules
from rear_scale.objective.terms import Task, Term, features_of, terms_of

__all__ = ["MicroBatch", "Objective", "Task", "shared_classes", "worth_sharing"]

# All files of this folder are imported, because each may register a term.
for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

# Largest number of distinct classes per image at which images share the AdaLN modulation of their class. Sharing saves matrix
# products, but needs a gather in the forward pass and a sum over images in the backward pass, which cost about an eighth of the
# AdaLN work of an image: both read and write as much memory as the product writes. Beyond it, one row per image is faster.
_MOST_DISTINCT = 7 / 8


@dataclass
class MicroBatch:
    """One rank's images of one micro-step."""

    tokens: Tensor  # int64 [B, N], clean
    ids: Tensor  # int64 [B], sample ids, of which all random numbers of the images are functions
    epochs: Tensor  # int64 [B]
    classes: Tensor  # int64 [U], after label dropout
    class_index: Tensor | None  # int64 [B], index into classes of each image; None = one class per image, in order

    def to(self, device: torch.device) -> MicroBatch:
        return self._changed(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The micro-batch in page-locked memory, from where copies to a GPU are asynchronous."""
        return self._changed(Tensor.pin_memory)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        class_index = None if self.class_index is None else change(self.class_index)
        return MicroBatch(change(self.tokens), change(self.ids), change(self.epochs), change(self.classes), class_index)


def worth_sharing(distinct: float, images: float) -> bool:
    """Whether to share modulation between images of a class, for these numbers of distinct classes and images."""
    return distinct <= _MOST_DISTINCT * images


def shared_classes(classes: Tensor, modulation: str) -> tuple[Tensor, Tensor | None]:
    """The distinct classes, int64 [U], of classes (int64 [B]) and the index of each image's class, int64 [B].

    modulation: per_class; auto does so where sharing modulation is less work (`worth_sharing`); per_sample and the other case
    of auto return the classes unchanged, and None.
    """
    if modulation == "per_sample":
        return classes, None
    distinct, class_index = classes.unique(return_inverse=True)
    if modulation == "auto" and not worth_sharing(len(distinct), len(classes)):
        return classes, None
    return distinct, class_index


class Objective:
    """Next-token prediction under noisy context plus codebook embedding regularization (reAR Eq. 7), and custom terms.

    plan: None = without `task`, for the loss of held-out tokens. codebook: float32 [K, D] of the shards, the target of the
    heads; it is not trained. All random numbers are functions of (run.seed, sample id, epoch). `names` are the names of the
    packed statistics that `loss` returns: the loss, the value of each term, and the additional metrics of terms. Raises
    InputError as `terms_of` does.
    """

    def __init__(self, cfg: ExperimentConfig, plan: Plan | None, codebook: Tensor, device: torch.device) -> None:
        self.cfg, self._plan = cfg, plan
        self.terms = terms_of(cfg)
        reports = (name for term in self.terms for name in term.reports)
        self.names = ("loss", *(f"loss_{term.name}" for term in self.terms), *reports)
        # Cosine distances depend on directions alone, so the codebook is normalized once and not in every step.
        self.directions = F.normalize(codebook.float(), dim=1).to(device)
        order = cfg.objective.permutation
        self.fixed_order = permutation.fixed_order(order.order, cfg.tokenizer, device)
        self.fixed_prefix = permutation.fixed_prefix(order.prefix, cfg.tokenizer)

    def micro_batch(self, tokens: Tensor, labels: Tensor, ids: Tensor, epochs: Tensor) -> MicroBatch:
        """The micro-batch of some samples, with labels (int64 [B]) dropped and distinct classes found.

        Runs on the CPU ahead of the step, because finding the distinct classes would synchronize with a GPU.
        """
        classes = self.classes(labels, ids, epochs)
        classes, class_index = shared_classes(classes, self.cfg.model.modulation)
        return MicroBatch(tokens, ids, epochs, classes, class_index)

    def classes(self, labels: Tensor, ids: Tensor, epochs: Tensor) -> Tensor:
        """The class ids, int64 [B], of labels (int64 [B]) after label dropout."""
        bits = rng.random_bits(self.cfg.run.seed, rng.Purpose.LABEL_DROP, ids, epochs, 1)[:, 0]
        dropped = rng.as_uniform(bits) < self.cfg.objective.class_dropout
        return labels.where(~dropped, torch.tensor(self.cfg.model.num_classes))

    @property
    def plan(self) -> Plan:
        """The length of the run and its marks, which schedules are made of."""
        assert self._plan is not None, "an objective for held-out tokens has no steps"
        return self._plan

    def noise_max(self, step: int) -> float:
        """The largest noise rate f(t) of Eq. 5 at a step (from 1)."""
        noise_cfg = self.cfg.objective.noise
        if noise_cfg.schedule == "constant":
            return noise_cfg.max
        return schedules.linear_decay(step, noise_cfg.max, self.plan.noise_start_step, self.plan.noise_end_step)

    def permutation_probability(self, step: int) -> float:
        """The permutation probability r of RAR Eq. 5 at a step (from 1)."""
        return schedules.linear_decay(step, 1.0, self.plan.permutation_start_step, self.plan.permutation_end_step)

    def task(self, batch: MicroBatch, step: int) -> Task:
        """The context and targets of a step. Noise is applied in stored order, then the tokens are permuted."""
        cfg = self.cfg.objective
        limit = self.noise_max(step)
        context, replaced = batch.tokens, None
        if limit > 0:
            context, replaced = noise.replace_tokens(
                batch.tokens,
                batch.ids,
                batch.epochs,
                self.cfg.run.seed,
                limit,
                self.cfg.tokenizer.codebook_size,
                cfg.noise,
            )
        order = permutation.training_orders(
            batch.ids,
            batch.epochs,
            self.cfg.run.seed,
            self.permutation_probability(step),
            self.fixed_order,
            self.cfg.tokenizer.num_tokens,
            self.fixed_prefix,
        )
        return Task(
            permutation.in_order(context, order),
            permutation.in_order(batch.tokens, order),
            order,
            None if replaced is None else permutation.in_order(replaced, order),
        )

    def loss(self, output: Mapping[str, Tensor], task: Task) -> tuple[Tensor, Tensor]:
        """The loss (scalar, float32) of a forward pass against the clean tokens, and its statistics (detached, float32), one
        for each of `names`.

        The statistics of a term whose features are not in the output are NaN.
        """
        total: Tensor | None = None
        values: list[Tensor] = []
        reports: list[Tensor] = []
        for term in self.terms:
            if any(name not in output for name in term.reads):
                assert total is not None, "the first term reads no features"
                value, *reported = (total.new_full((), torch.nan) for _ in ("value", *term.reports))
            else:
                result = term(output, task, self.directions)
                value, *reported = result if isinstance(result, tuple) else (result,)
                weighted = value if term.weight == 1 else term.weight * value
                total = weighted if total is None else total + weighted
            values.append(value)
            reports += reported
        assert total is not None, "next-token prediction is part of every loss"
        return total, torch.stack((total, *values, *reports)).detach()

    def statistic(self, statistics: Tensor, name: str) -> Tensor:
        """The value of one name in packed statistics."""
        return statistics[self.names.index(name)]

    def trained_terms(self) -> list[Term]:
        """The terms whose features the config's model has."""
        there = {feature.name for feature in features_of(self.cfg)}
        return [term for term in self.terms if there.issuperset(term.reads)]
