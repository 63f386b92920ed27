"""Validation during training: the training loss and the correct token ratio on held-out shards."""

# B sequences of a forward pass

from __future__ import annotations

import torch
from torch import Tensor, nn

from rear_scale.config import ExperimentConfig
from rear_scale.objective import Objective, permutation
from rear_scale.objective.prediction import (
    Replacement,
    batches_of_rank,
    exact_sums,
    held_out_task,
    ratio_and_loss,
    sequence_scores,
)
from rear_scale.parallel.strategy import Strategy
from rear_scale.shards.reader import TokenSet
from rear_scale.world import World

# Seed of the replacements in the noisy context: the same at every step, and different from those of training.
_DRAW_SEED = 20_251_121
# The columns of `sequence_scores`, and the statistics that are computed from them and from the terms.
_SCORES = ("negative log-likelihood", "correct")
_DERIVED = ("loss", "loss_ar", "accuracy")


class Validation:
    """A hook of the loop that computes validation metrics. Each sequence counts once for any number of ranks, with its class and
    without dropout.

    With a clean context: `val_loss`, the value and the reports of each term, and `val_ctr`, the fraction of correct argmax
    predictions (reAR Eq. 8). With a fraction evaluate.replace_rate of the context replaced (Eq. 4): `val_ctr_noisy`.
    """

    def __init__(self, cfg: ExperimentConfig, tokens: TokenSet, codebook: Tensor, world: World) -> None:
        self.cfg, self.tokens, self.world = cfg, tokens, world
        self.objective = Objective(cfg, None, codebook, world.device)
        self.terms = self.objective.trained_terms()
        names = [name for term in self.terms for name in (f"loss_{term.name}", *term.reports)]
        self.names = [name for name in names if name not in _DERIVED]
        rate, codes = cfg.evaluate.replace_rate, tokens.manifest.codebook_size
        self.contexts: dict[str, Replacement | None] = {"clean": None, "noisy": Replacement(rate, _DRAW_SEED, 0, codes)}

    def __call__(self, step: int, strategy: Strategy) -> dict[str, float]:
        """The metrics of the current model. All ranks must call this."""
        return self.metrics(self.world.gather(self.rows(strategy)))

    def rows(self, strategy: Strategy) -> dict[str, Tensor]:
        """The scores of this rank's sequences by context ("clean", "noisy"): float64 [M, n] on the CPU. The columns are _SCORES
        and, for the clean context, `names`."""
        size, world = self.cfg.train.micro_batch_size, self.world
        rows_by_context: dict[str, list[Tensor]] = {"clean": [], "noisy": []}
        for ids, counted in batches_of_rank(len(self.tokens), size, world.rank, world.size):
            for context, parts in rows_by_context.items():
                rows = strategy.evaluate(_Scores(self, ids, context))
                parts.append(rows if counted else rows[:0])
        return {context: torch.cat(parts).cpu() for context, parts in rows_by_context.items()}

    def metrics(self, ranks: list[dict[str, Tensor]]) -> dict[str, float]:
        """The metrics from the rows of all ranks."""
        sequences = len(self.tokens)
        clean, noisy = (exact_sums([rows[context] for rows in ranks]) for context in ("clean", "noisy"))
        tokens = sequences * self.cfg.tokenizer.num_tokens
        sums = dict(zip((*_SCORES, *self.names), clean, strict=True))
        loss_sum, correct = (sums.pop(name) for name in _SCORES)
        ctr, loss_ar = ratio_and_loss(loss_sum, correct, tokens)
        means = {"loss_ar": loss_ar, **{name: total / sequences for name, total in sums.items()}}
        loss = sum(term.weight * means[f"loss_{term.name}"] for term in self.terms)
        named = {f"val_{name}": value for name, value in {"loss": loss, **means}.items()}
        noisy_loss, noisy_correct = noisy
        return {**named, "val_ctr": ctr, "val_ctr_noisy": ratio_and_loss(noisy_loss, noisy_correct, tokens)[0]}


class _Scores:
    """A forward pass that returns rows (see `Validation.rows`). A mean over the batch is repeated in the row of each sequence."""

    def __init__(self, validation: Validation, ids: Tensor, context: str) -> None:
        self.validation, self.ids, self.context = validation, ids, context

    def __call__(self, forward: nn.Module) -> tuple[Tensor, Tensor]:
        v, device = self.validation, self.validation.world.device
        truth, labels = (part.to(device) for part in v.tokens.rows(self.ids))
        ids = self.ids.to(device)
        order = permutation.orders_of_model(v.cfg.objective.permutation, v.cfg.tokenizer, ids)
        task = held_out_task(truth, ids, order, v.contexts[self.context])
        output = forward(task.context, labels, None, order)
        loss, rows = torch.zeros((), device=device), sequence_scores(output["logits"], task.tokens)
        if self.context == "clean":
            loss, statistics = v.objective.loss(output, task)
            means = [v.objective.statistic(statistics, name).double().expand(len(rows)) for name in v.names]
            rows = torch.column_stack((rows, *means))
        return loss, rows
