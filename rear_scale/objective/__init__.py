"""What one micro-batch is trained on and how it is scored: pure functions, and the object that joins them."""

# B images, U distinct classes of a micro-batch, N tokens of an image, K codes

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rear_scale import rng
from rear_scale.config import ExperimentConfig, Plan
from rear_scale.objective import losses, noise, schedules


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

    def micro_batch(self, tokens: Tensor, labels: Tensor, ids: Tensor, epochs: Tensor) -> MicroBatch:
        """Drops labels (int64 [B]) and finds the distinct classes. On the CPU, ahead of the step: no device waits for it."""
        bits = rng.random_bits(self.cfg.run.seed, rng.Purpose.LABEL_DROP, ids, epochs, 1)[:, 0]
        dropped = rng.as_uniform(bits) < self.cfg.objective.class_dropout
        classes, rows = labels.where(~dropped, torch.tensor(self.cfg.model.num_classes)), None
        if self.cfg.model.modulation == "per_class":
            classes, rows = classes.unique(return_inverse=True)
        return MicroBatch(tokens, ids, epochs, classes, rows)

    def noise_max(self, step: int) -> float:
        """f(t) of Eq. 5 at a step (from 1)."""
        return schedules.linear_noise(
            step, self.cfg.objective.noise.max, self.plan.noise_start_step, self.plan.noise_end_step
        )

    def context(self, batch: MicroBatch, step: int) -> Tensor:
        """The tokens that the model sees, int64 [B, N]: each sequence noisy at its own rate."""
        limit = self.noise_max(step)
        if limit == 0:
            return batch.tokens
        return noise.perturbed(
            batch.tokens, batch.ids, batch.epochs, self.cfg.run.seed, limit, self.cfg.tokenizer.codebook_size
        )

    def loss(self, output: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (scalar, float32) of a forward pass against the clean tokens, and STATISTICS (float32 [5], detached).

        Terms without a head are nan.
        """
        loss_ar, accuracy = losses.next_token(output["logits"], tokens)
        nan = torch.full_like(loss_ar, torch.nan)
        loss = loss_ar
        terms = {"encode": nan, "decode": nan}
        # Clean targets under noisy context: "the embedding of the ground truth token as well" (section 3.2).
        targets = {"encode": tokens[:, :-1], "decode": tokens[:, 1:]}
        for name in terms:
            if name in output:
                terms[name] = losses.embedding_distance(output[name], self.directions[targets[name]], tokens.numel())
                loss = loss + self.cfg.objective.heads.weight * terms[name]
        return loss, torch.stack((loss, loss_ar, terms["encode"], terms["decode"], accuracy)).detach()
