"""Places of wrong predictions in the image, and the effect of one wrong token of the context on later predictions.

Both under teacher forcing: everything else of the context is ground truth.
"""

# B images of a batch, W forced tokens of an image, N tokens of an image, K codes

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rear_scale import rng
from rear_scale.analysis.experiment import Analysed, Arrays, Experiment, Row
from rear_scale.analysis.plots import colour, finish, line, models_of, panels
from rear_scale.analysis.token_sets import TokenWork, evenly
from rear_scale.figures import png
from rear_scale.objective import permutation
from rear_scale.objective.prediction import perplexity_of
from rear_scale.objective.terms import Task

_SEED = 20_251_006  # of the wrong tokens


def wrong_tokens(truth: Tensor, bits: Tensor, codebook_size: int) -> Tensor:
    """Codes int64 [...], each uniform among the K - 1 codes that differ from the right one. bits: 32-bit random numbers [...]."""
    return (truth + 1 + rng.as_integers(bits, codebook_size - 1)) % codebook_size


class Errors(TokenWork):
    """Counts of correct predictions and sums of losses by place, and by distance from a wrong token."""

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "wrong_tokens": self.cfg.analyze.wrong_tokens, "seed": _SEED}

    @property
    def forced(self) -> int:
        return min(self.cfg.analyze.wrong_tokens, self.cfg.tokenizer.num_tokens - 1)

    def compute(self, number: int) -> Arrays:
        truth, labels, index = self.rows(self.val, self.blocks[number])
        task = self.task(truth, index)
        logits = self.predict(task, labels)["logits"].float()
        clean = logits.argmax(-1) == task.tokens
        losses = F.cross_entropy(logits.transpose(1, 2), task.tokens, reduction="none").double()
        return {
            "correct": permutation.in_place(clean.long(), task.order).sum(0).cpu().numpy(),
            "loss": _in_place(losses, task.order).sum(0).cpu().numpy(),
            "images": np.array(len(truth)),
            **self._after_wrong(task, labels, index, clean),
        }

    def _after_wrong(self, task: Task, labels: Tensor, index: Tensor, clean: Tensor) -> Arrays:
        """Correct predictions with one wrong token, and without it, by distance (index 0: of the next token)."""
        N, codes = task.tokens.shape[1], self.cfg.tokenizer.codebook_size
        bits = rng.random_bits(_SEED, rng.Purpose.ANALYSIS, index, 0, 2 * self.forced)
        # One place in each of W equal parts of the sequence, without the last token, which nothing is predicted from.
        starts = torch.from_numpy(evenly(N - 1, self.forced)).to(index.device)
        lengths = torch.cat((starts[1:], starts.new_tensor([N - 1]))) - starts
        places = starts + ((bits[:, : self.forced] * lengths) >> 32)
        counts = torch.zeros(3, N - 1, dtype=torch.int64, device=index.device)
        for column in range(self.forced):
            at = places[:, column, None]
            wrong = wrong_tokens(task.tokens.gather(1, at), bits[:, self.forced + column, None], codes)
            context = task.tokens.scatter(1, at, wrong)
            predicted = self.predict(Task(context, task.tokens, task.order, None), labels)["logits"].argmax(-1)
            distance = torch.arange(N, device=index.device) - at - 1
            later = distance >= 0
            for row, hits in enumerate((predicted == task.tokens, clean, torch.ones_like(clean))):
                counts[row].index_add_(0, distance[later], hits[later].long())
        names = ("after_wrong", "after_right", "predictions")
        return {name: values.cpu().numpy() for name, values in zip(names, counts, strict=True)}

    def reduce(self, blocks: Iterable[Arrays]) -> Arrays:
        """Sums over images: `correct` and `loss` [N] by place in stored order; `after_wrong`, `after_right` and `predictions`
        [N - 1] by distance - 1; `images`."""
        found: Arrays = {}
        for block in blocks:
            for name, value in block.items():
                found[name] = value if name not in found else found[name] + value
        return found


def _in_place(values: Tensor, order: Tensor | None) -> Tensor:
    """Values [B, N] of the steps of prediction, in stored order."""
    return values if order is None else torch.empty_like(values).scatter_(1, order.expand_as(values), values)


def tables(analysed: Analysed) -> dict[str, list[Row]]:
    """A row for each distance from a wrong token; and in `positions` one for each place in the image.

    ctr_after_wrong and ctr_after_right: of the token at that distance, with and without the wrong one; ctr_change: their
    difference.
    """
    arrays, subject = analysed.arrays, analysed.subject
    rows: list[Row] = []
    for distance, predictions in enumerate(arrays["predictions"].tolist(), 1):
        if predictions:
            wrong, right = (int(arrays[name][distance - 1]) for name in ("after_wrong", "after_right"))
            rows.append({**subject.about, "distance": distance, "ctr_after_wrong": wrong / predictions,
                         "ctr_after_right": right / predictions, "ctr_change": (wrong - right) / predictions,
                         "predictions": predictions})  # fmt: skip
    images = int(arrays["images"])
    positions = [
        {**subject.about, "position": at, "row": row, "column": column, "ctr": float(arrays["correct"][at]) / images,
         "perplexity": perplexity_of(float(arrays["loss"][at]) / images), "images": images}
        for at, (row, column) in enumerate(_places(analysed))
    ]  # fmt: skip
    return {"": rows, "positions": positions}


def _places(analysed: Analysed) -> list[tuple[int | None, int | None]]:
    """Row and column in the grid of each token in stored order; (None, None) for those before it or without a grid."""
    tokenizer = analysed.subject.cfg.tokenizer
    if tokenizer.grid is None:
        return [(None, None)] * tokenizer.num_tokens
    columns = tokenizer.grid[1]
    inside = range(tokenizer.num_tokens - tokenizer.prefix_tokens)
    return [(None, None)] * tokenizer.prefix_tokens + [(at // columns, at % columns) for at in inside]


def figures(analysed: Sequence[Analysed]) -> dict[str, bytes]:
    """Heat maps of ratio and perplexity by place, of the first seed of each model; and the ratio after a wrong token."""
    rows = [row for one in analysed for row in tables(one)[""]]
    models = models_of(rows)
    firsts = [next(one for one in analysed if one.subject.model == model) for model in models]
    figure, axes = panels(2 * len(firsts), columns=2, height=3.2)
    maps = {name: [_map(one, name) for one in firsts] for name in ("ctr", "perplexity")}
    for column, (name, title) in enumerate((("ctr", "correct token ratio"), ("perplexity", "perplexity"))):
        low, high = (edge([values.min() for values in maps[name]] if edge is min else [values.max() for values in maps[name]])
                     for edge in (min, max))  # fmt: skip
        for number, values in enumerate(maps[name]):
            panel = axes[2 * number + column]
            picture = panel.imshow(values, vmin=low, vmax=high, cmap="viridis")
            panel.set(title=f"{models[number]}: {title}", xlabel="column", ylabel="row")
            figure.colorbar(picture, ax=panel, shrink=0.85)
    spread, [left, right] = panels(2)
    for number, model in enumerate(models):
        own = [row for row in rows if row["model"] == model]
        line(left, own, "distance", "ctr_change", model, colour(number))
        line(right, own, "distance", "ctr_after_right", f"{model}, right context", colour(number))
        line(right, own, "distance", "ctr_after_wrong", f"{model}, one wrong token", colour(number), "--")
    finish(left, "distance from the wrong token (steps)", "change of the correct token ratio")
    finish(right, "distance from the wrong token (steps)", "correct token ratio")
    left.axhline(0, color="black", lw=0.6)
    return {"positions": png(figure), "spread": png(spread)}


def _map(analysed: Analysed, name: str) -> np.ndarray:
    """A measure by place: the grid without tokens before it, or one row for a sequence."""
    values = np.array([row[name] for row in tables(analysed)["positions"]])
    tokenizer = analysed.subject.cfg.tokenizer
    return values[None] if tokenizer.grid is None else values[tokenizer.prefix_tokens :].reshape(tokenizer.grid)


EXPERIMENT = Experiment(
    name="errors",
    source="beyond the papers: places and spread of errors",
    work=Errors,
    keys=("distance",),
    tables=tables,
    figures=figures,
    inputs=("data.val",),
)
