"""What one micro-batch is trained on and how it is scored: pure functions, and the object that joins them."""

# B images, U distinct classes of a micro-batch, N tokens of an image, K codes

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rear_scale import rng
from rear_scale.config import ExperimentConfig, Plan
from rear_scale.model.modulation import worth_sharing
from rear_scale.objective import losses, noise, permutation, schedules


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


@dataclass
class Task:
    """What the model is shown and asked, in the order of prediction."""

    context: Tensor  # int64 [B, N], noisy or not
    tokens: Tensor  # int64 [B, N], clean
    order: Tensor | None  # int64 [B or 1, N], the place of each token; None = as stored
    replaced: Tensor | None  # bool [B, N], which tokens of the context were drawn anew; None = none


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


# The order of the packed statistics that `Objective.loss` returns.
STATISTICS = ("loss", "loss_ar", "loss_encode", "loss_decode", "accuracy")


class Objective:
    """Next-token prediction under noisy context plus codebook embedding regularization (reAR Eq. 7).

    codebook: float32 [K, D] of the shards, the target of the heads; it is not trained. Every draw is a function of
    (run.seed, sample id, epoch).
    """

    def __init__(self, cfg: ExperimentConfig, plan: Plan, codebook: Tensor, device: torch.device) -> None:
        self.cfg, self.plan = cfg, plan
        # Cosine distances need directions only: normalised once, not in every step.
        self.directions = F.normalize(codebook.float(), dim=1).to(device)
        order, num_tokens = cfg.objective.permutation, cfg.tokenizer.num_tokens
        self.fixed_order = permutation.fixed_order(order.order, num_tokens, device)
        self.fixed_prefix = permutation.fixed_prefix(order.prefix, num_tokens)

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

    def loss(self, output: dict[str, Tensor], task: Task) -> tuple[Tensor, Tensor]:
        """The loss (scalar, float32) of a forward pass against the clean tokens, and STATISTICS (float32 [5], detached).

        Terms without a head are nan.
        """
        loss_ar, accuracy = losses.next_token(output["logits"], task.tokens)
        nan = torch.full_like(loss_ar, torch.nan)
        loss = loss_ar
        terms = {"encode": nan, "decode": nan}
        for name in terms:
            if name in output:
                terms[name] = self._head_term(name, output, task)
                loss = loss + self.cfg.objective.heads.weight * terms[name]
        return loss, torch.stack((loss, loss_ar, terms["encode"], terms["decode"], accuracy)).detach()

    def _head_term(self, name: str, output: dict[str, Tensor], task: Task) -> Tensor:
        """One term of Eq. 6, or what the released code makes of it where the other is missing."""
        heads = self.cfg.objective.heads
        # Clean targets under noisy context: "the embedding of the ground truth token as well" (section 3.2).
        targets, replaced = task.tokens, task.replaced
        if heads.positions == "eq6":
            part = slice(0, -1) if name == "encode" else slice(1, None)
            targets, replaced = targets[:, part], None if replaced is None else replaced[:, part]
        unperturbed = ~replaced if heads.encode_counts == "unperturbed" and replaced is not None else None
        counted = [unperturbed if name == "encode" else None]
        if heads.lone_term == "twice" and len(output) == 2:
            counted = [unperturbed, None]
        directions = self.directions[targets]
        offset = 1.0 if heads.distance == "one_minus_cosine" else 0.0
        return sum(
            losses.embedding_distance(output[name], directions, task.tokens.numel(), counted=mask, offset=offset)
            for mask in counted
        )
