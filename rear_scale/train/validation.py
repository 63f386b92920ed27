"""The loss of training and the correct token ratio on held-out shards, while a run goes on."""

# B sequences of a forward pass, N tokens of an image

from __future__ import annotations

import torch
from torch import Tensor, nn

from rear_scale.config import ExperimentConfig
from rear_scale.objective import Objective, Task, noise, permutation
from rear_scale.parallel.strategy import Strategy
from rear_scale.shards.reader import TokenSet
from rear_scale.world import World

# The replacement draws of the noisy context: the same at every step, and not those of training.
_DRAW_SEED = 20_251_121
# Of the global sums: the statistics of the objective, and correct tokens under clean and noisy context.
_SUMS = ("val_loss", "val_loss_ar", "val_loss_encode", "val_loss_decode", "val_ctr", "val_ctr_noisy")


class Validation:
    """A hook of the loop. Each sequence counts once, whatever the ranks, with its class known and no dropout.

    Under clean context: `val_loss` and its parts, and `val_ctr`, the share of correct argmax predictions (reAR Eq. 8). With
    evaluate.replace_rate of the context replaced (Eq. 4): `val_ctr_noisy`.
    """

    def __init__(self, cfg: ExperimentConfig, tokens: TokenSet, codebook: Tensor, world: World) -> None:
        self.cfg, self.tokens, self.world = cfg, tokens, world
        self.objective = Objective(cfg, None, codebook, world.device)
        self.codebook_size = tokens.manifest.codebook_size

    def __call__(self, step: int, strategy: Strategy) -> dict[str, float]:
        """The metrics of the model as it is. All ranks must call this."""
        totals = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.world.device)
        size = self.cfg.train.micro_batch_size
        mine = torch.arange(len(self.tokens))[self.world.rank :: self.world.size]
        longest = -(-len(self.tokens) // self.world.size)
        # Engines that gather weights need as many passes on every rank: those that have no more sequences repeat one.
        for first in range(0, longest, size):
            ids = mine[first : first + size]
            counted = len(ids)
            ids = ids if counted else mine[:1] if len(mine) else torch.zeros(1, dtype=torch.long)
            totals += strategy.evaluate(_Scores(self, ids, noisy=False)) * (counted > 0)
            totals += strategy.evaluate(_Scores(self, ids, noisy=True)) * (counted > 0)
        means = (self.world.sum(totals) / len(self.tokens)).tolist()
        heads = {"val_loss_encode": "encode_tap", "val_loss_decode": "decode_tap"}
        return {
            name: value
            for name, value in zip(_SUMS, means, strict=True)
            if name not in heads or getattr(self.cfg.objective.heads, heads[name]) is not None
        }


class _Scores:
    """Sums over sequences (float64, in the order of _SUMS) of one forward pass."""

    def __init__(self, validation: Validation, ids: Tensor, noisy: bool) -> None:
        self.validation, self.ids, self.noisy = validation, ids, noisy

    def __call__(self, forward: nn.Module) -> tuple[Tensor, Tensor]:
        v, cfg, device = self.validation, self.validation.cfg, self.validation.world.device
        truth, labels = (part.to(device) for part in v.tokens.rows(self.ids))
        ids = self.ids.to(device)
        context = truth
        if self.noisy:
            context = noise.replaced(truth, cfg.evaluate.replace_rate, ids, 0, _DRAW_SEED, v.codebook_size)
        order = permutation.orders_of_model(cfg.objective.permutation, cfg.tokenizer.num_tokens, ids)
        task = Task(permutation.in_order(context, order), permutation.in_order(truth, order), order, None)
        loss, statistics = v.objective.loss(forward(task.context, labels, None, order), task)
        sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        if self.noisy:
            sums[5] = statistics[4]
        else:
            sums[:5] = statistics.nan_to_num()  # a term without a head is left out of the metrics
        return loss, sums * len(truth)
