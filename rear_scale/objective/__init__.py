"""What one micro-batch is trained on and how it is scored: pure functions, and the object that joins them."""

# B images, U distinct classes of a micro-batch, N tokens of an image, K codes

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rear_scale import rng
from rear_scale.config import ExperimentConfig, Plan
from rear_scale.objective import noise, permutation, schedules
from rear_scale.objective.terms import Task, Term, features_of, terms_of

__all__ = ["MicroBatch", "Objective", "Task", "shared_classes", "worth_sharing"]

# A file of this folder may register a term: all of them are imported.
for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

# Of the work of AdaLN for an image, the gather of its rows and the sum of their gradients cost about an eighth: both read and
# write what the product has written. Above this share of distinct classes, one row per image is faster.
_LARGEST_SHARE = 7 / 8


@dataclass
class MicroBatch:
    """One rank's images of one micro-step."""

    tokens: Tensor  # int64 [B, N], clean
    ids: Tensor  # int64 [B], sample ids: what randomness belongs to
    epochs: Tensor  # int64 [B]
    classes: Tensor  # int64 [U], after label dropout
    rows: Tensor | None  # int64 [B], which of the classes belongs to each image; None = one per image, in order

    def to(self, device: torch.device) -> MicroBatch:
        moved = {
            name: None if value is None else value.to(device, non_blocking=True) for name, value in vars(self).items()
        }
        return MicroBatch(**moved)

    def pinned(self) -> MicroBatch:
        """In page-locked memory, from where copies to a GPU do not wait."""
        return MicroBatch(**{name: None if value is None else value.pin_memory() for name, value in vars(self).items()})


def worth_sharing(distinct: float, images: float) -> bool:
    """Whether images share the modulation of their class, by distinct classes and images of a micro-batch."""
    return distinct <= _LARGEST_SHARE * images


def shared_classes(classes: Tensor, modulation: str) -> tuple[Tensor, Tensor | None]:
    """Distinct classes int64 [U] and the row of each image int64 [B], of classes int64 [B]; or these as they are, and None.

    modulation: auto shares a class's modulation where that is less work (`worth_sharing`), per_class always, per_sample never.
    """
    if modulation == "per_sample":
        return classes, None
    distinct, rows = classes.unique(return_inverse=True)
    if modulation == "auto" and not worth_sharing(len(distinct), len(classes)):
        return classes, None
    return distinct, rows


class Objective:
    """Next-token prediction under noisy context plus codebook embedding regularization (reAR Eq. 7), and own terms.

    codebook: float32 [K, D] of the shards, the target of the heads; it is not trained. Every draw is a function of
    (run.seed, sample id, epoch). `names` are those of the packed statistics that `loss` returns: the loss, the value of
    each term, and what terms report beside it. Raises InputError as `terms_of` does.
    """

    def __init__(self, cfg: ExperimentConfig, plan: Plan, codebook: Tensor, device: torch.device) -> None:
        self.cfg, self.plan = cfg, plan
        self.terms = terms_of(cfg)
        reports = (name for term in self.terms for name in term.reports)
        self.names = ("loss", *(f"loss_{term.name}" for term in self.terms), *reports)
        # Cosine distances need directions only: normalised once, not in every step.
        self.directions = F.normalize(codebook.float(), dim=1).to(device)
        order = cfg.objective.permutation
        self.fixed_order = permutation.fixed_order(order.order, cfg.tokenizer, device)
        self.fixed_prefix = permutation.fixed_prefix(order.prefix, cfg.tokenizer)

    def micro_batch(self, tokens: Tensor, labels: Tensor, ids: Tensor, epochs: Tensor) -> MicroBatch:
        """Drops labels (int64 [B]) and finds the distinct classes. On the CPU, ahead of the step: no device waits for it."""
        classes = self.classes(labels, ids, epochs)
        classes, rows = shared_classes(classes, self.cfg.model.modulation)
        return MicroBatch(tokens, ids, epochs, classes, rows)

    def classes(self, labels: Tensor, ids: Tensor, epochs: Tensor) -> Tensor:
        """int64 [B]: what labels (int64 [B]) are after label dropout."""
        bits = rng.random_bits(self.cfg.run.seed, rng.Purpose.LABEL_DROP, ids, epochs, 1)[:, 0]
        dropped = rng.as_uniform(bits) < self.cfg.objective.class_dropout
        return labels.where(~dropped, torch.tensor(self.cfg.model.num_classes))

    def noise_max(self, step: int) -> float:
        """f(t) of Eq. 5 at a step (from 1)."""
        noise_cfg = self.cfg.objective.noise
        if noise_cfg.schedule == "constant":
            return noise_cfg.max
        return schedules.falling(step, noise_cfg.max, self.plan.noise_start_step, self.plan.noise_end_step)

    def permutation_probability(self, step: int) -> float:
        """r of RAR Eq. 5 at a step (from 1)."""
        return schedules.falling(step, 1.0, self.plan.permutation_start_step, self.plan.permutation_end_step)

    def task(self, batch: MicroBatch, step: int) -> Task:
        """What the model is shown and asked at a step: noise belongs to a token's place, then the order is taken."""
        cfg = self.cfg.objective
        limit = self.noise_max(step)
        context, replaced = batch.tokens, None
        if limit > 0:
            context, replaced = noise.perturbed(
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

        Those of a term whose features are not in the output are nan.
        """
        total, values, reports = None, [], []
        for term in self.terms:
            if any(name not in output for name in term.reads):
                value, *reported = (total.new_full((), torch.nan) for _ in ("value", *term.reports))
            else:
                found = term(output, task, self.directions)
                value, *reported = found if isinstance(found, tuple) else (found,)
                weighted = value if term.weight == 1 else term.weight * value
                total = weighted if total is None else total + weighted
            values.append(value)
            reports += reported
        return total, torch.stack((total, *values, *reports)).detach()

    def statistic(self, statistics: Tensor, name: str) -> Tensor:
        """The scalar of a name in packed statistics."""
        return statistics[self.names.index(name)]

    def trained_terms(self) -> list[Term]:
        """The terms that the config's model has the features for."""
        there = {feature.name for feature in features_of(self.cfg)}
        return [term for term in self.terms if there.issuperset(term.reads)]
