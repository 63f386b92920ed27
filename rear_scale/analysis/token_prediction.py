"""Next-token prediction under teacher forcing: correct token ratio and perplexity, clean and under noise (reAR, appendix
B.1 and C.1, Figure 8a)."""

# B sequences of a batch, N tokens of an image

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rear_scale.analysis.token_sets import open_sets
from rear_scale.config import ExperimentConfig
from rear_scale.objective import permutation
from rear_scale.objective.prediction import (
    Replacement,
    batches_of_rank,
    exact_sums,
    held_out_task,
    perplexity_of,
    ratio_and_loss,
    sequence_scores,
)
from rear_scale.progress import progress
from rear_scale.shards.reader import TokenSet
from rear_scale.world import World

# A function of sample ids (int64 [B]) to the order of prediction of their tokens (int64 [B or 1, N]; None = as stored).
Orders = Callable[[Tensor], Tensor | None]

# Seed of the replacements, which depend on it, the sample and the number of the draw, and so are the same for all models.
DRAW_SEED = 20_250_710


@dataclass(frozen=True)
class TokenPrediction:
    """Scores of next-token prediction on a set (reAR Eq. 8 and 9)."""

    ctr: float  # correct token ratio (Eq. 8): fraction of argmax predictions that are correct
    perplexity: float  # exp of the mean negative log-likelihood of a token (Eq. 9), over the whole set
    sequences: int
    draws: int  # replacement draws averaged over; 0 = clean context


@torch.inference_mode()
def predict_tokens(
    model: nn.Module,
    tokens: TokenSet,
    world: World,
    *,
    replace_rate: float = 0.0,
    draws: int = 0,
    batch_size: int,
    orders: Orders | None = None,
) -> TokenPrediction:
    """The scores of a model on a set, with known classes. All ranks must call this; each computes a part of the sequences, and
    all return the result.

    With draws > 0, each context token is replaced with probability `replace_rate` by one drawn from the whole codebook
    (Eq. 4), and results are averaged over that many draws; the tokens to predict are not replaced. orders: the order of
    prediction of each sample; None = as tokens are stored.
    """
    rows = [torch.zeros(0, 2, dtype=torch.float64)]
    noisy = [Replacement(replace_rate, DRAW_SEED, draw, tokens.manifest.codebook_size) for draw in range(draws)]
    replacements: Sequence[Replacement | None] = noisy or [None]
    batches = batches_of_rank(len(tokens), batch_size, world.rank, world.size)
    mine = [ids for ids, counted in batches if counted]
    training = model.training
    model.eval()
    description = f"predict {draws} x {len(tokens)} noisy" if draws else f"predict {len(tokens)} clean"
    with progress(description, len(replacements) * sum(map(len, mine)), "sequence", show=world.is_main) as bar:
        for replacement in replacements:
            for ids in mine:
                truth, labels = (part.to(world.device) for part in tokens.rows(ids))
                ids = ids.to(world.device)
                task = held_out_task(truth, ids, orders(ids) if orders else None, replacement)
                logits = model(task.context, labels, None, task.order)["logits"]
                rows.append(sequence_scores(logits, task.tokens).cpu())
                bar.update(len(ids))
    model.train(training)
    loss_sum, correct = exact_sums(world.gather(torch.cat(rows)))
    ctr, loss = ratio_and_loss(loss_sum, correct, len(replacements) * len(tokens) * tokens.manifest.num_tokens)
    return TokenPrediction(ctr, perplexity_of(loss), len(tokens), draws)


def score_tokens(cfg: ExperimentConfig, model: nn.Module, world: World) -> dict[str, dict[str, float]]:
    """Scores of token prediction by set and context: on data.val, clean and with a fraction evaluate.replace_rate of the context
    replaced, and on data.train, clean.

    All ranks must call this. Raises InputError for a set that does not fit the model or the other set.
    """
    evaluate = cfg.evaluate
    opened = open_sets(cfg, world)
    orders = partial(permutation.orders_of_model, cfg.objective.permutation, cfg.tokenizer)
    predict = partial(predict_tokens, model, world=world, batch_size=evaluate.batch_size, orders=orders)
    scores = {f"{name}_clean": predict(tokens) for name, tokens in opened.items()}
    if "val" in opened:
        scores["val_noisy"] = predict(opened["val"], replace_rate=evaluate.replace_rate, draws=evaluate.replace_draws)
    return {name: asdict(score) for name, score in scores.items()}
