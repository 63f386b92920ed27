"""Correct token ratio and perplexity on trained and unseen data, clean and with tokens replaced (reAR, Figure 8a)."""

# n images, N tokens of an image

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from rear_scale.analysis.experiment import Analysed, Arrays, Experiment, Row, Subject
from rear_scale.analysis.plots import colour, finish, models_of, panels
from rear_scale.analysis.token_prediction import DRAW_SEED
from rear_scale.analysis.token_sets import TokenWork, labels_of_set, of_each_class
from rear_scale.figures import png
from rear_scale.intervals import mean_interval
from rear_scale.objective.prediction import Replacement, perplexity_of, ratio_and_loss, sequence_scores
from rear_scale.shards.reader import TokenSet
from rear_scale.world import World

SETS = {"train": "trained", "val": "unseen"}
CONTEXTS = ("clean", "noisy")


class Generalization(TokenWork):
    """Scores of each image of both sets: negative log-likelihood and number of correct predictions."""

    with_train = True

    def __init__(self, subject: Subject, world: World) -> None:
        super().__init__(subject, world)
        count = self.cfg.analyze.images_per_class
        chosen = {name: _of_each_class(self.sets[name], count) for name in SETS}
        self.chosen = {name: ids for name, (ids, _) in chosen.items()}
        self.short = {name: short for name, (_, short) in chosen.items()}

    @property
    def identity(self) -> dict[str, Any]:
        evaluate = self.cfg.evaluate
        sizes = {name: len(ids) for name, ids in self.chosen.items()}
        noise = [evaluate.replace_rate, evaluate.replace_draws, DRAW_SEED]
        return {**super().identity, "images": sizes, "per_class": self.cfg.analyze.images_per_class, "noise": noise}

    @cached_property
    def parts(self) -> list[tuple[str, np.ndarray]]:
        """The set and the ids of each block."""
        size = self.cfg.evaluate.batch_size
        return [(name, ids[at : at + size]) for name, ids in self.chosen.items() for at in range(0, len(ids), size)]

    @property
    def block_sizes(self) -> list[int]:
        return [len(ids) for _, ids in self.parts]

    def compute(self, number: int) -> Arrays:
        name, ids = self.parts[number]
        clean = self._scores(self.sets[name], ids, None)
        rate, draws = self.cfg.evaluate.replace_rate, self.cfg.evaluate.replace_draws
        codes = self.cfg.tokenizer.codebook_size
        noisy = [self._scores(self.sets[name], ids, Replacement(rate, DRAW_SEED, draw, codes)) for draw in range(draws)]
        return {"clean": clean, "noisy": np.mean(noisy, axis=0)}

    def _scores(self, tokens: TokenSet, ids: np.ndarray, replacement: Replacement | None) -> np.ndarray:
        truth, labels, index = self.rows(tokens, ids)
        task = self.task(truth, index, replacement)
        return sequence_scores(self.predict(task, labels)["logits"], task.tokens).cpu().numpy()

    def reduce(self, blocks: Iterable[Arrays]) -> Arrays:
        """`SET_CONTEXT` float64 [n, 2]: negative log-likelihood and correct predictions of each image; `short_SET`."""
        found: dict[str, list[np.ndarray]] = {}
        for (name, _), block in zip(self.parts, blocks, strict=True):
            for context in CONTEXTS:
                found.setdefault(f"{name}_{context}", []).append(block[context])
        short = {f"short_{name}": np.array(count) for name, count in self.short.items()}
        return {**{name: np.concatenate(parts) for name, parts in found.items()}, **short}


def _of_each_class(tokens: TokenSet, count: int) -> tuple[np.ndarray, int]:
    return of_each_class(labels_of_set(tokens), count, len(tokens.manifest.label_counts))


def tables(analysed: Analysed) -> dict[str, list[Row]]:
    """A row for each set and context. ctr_error: the standard error of the ratio over images."""
    rows = []
    cfg, arrays = analysed.subject.cfg, analysed.arrays
    tokens = cfg.tokenizer.num_tokens
    for name, title in SETS.items():
        for context in CONTEXTS:
            scores = arrays[f"{name}_{context}"]
            ctr, loss = ratio_and_loss(math.fsum(scores[:, 0]), math.fsum(scores[:, 1]), len(scores) * tokens)
            spread = float(scores[:, 1].std(ddof=1)) if len(scores) > 1 else 0.0
            rows.append(
                {
                    **analysed.subject.about,
                    "data": title,
                    "context": context,
                    "replaced": cfg.evaluate.replace_rate if context == "noisy" else 0.0,
                    "ctr": ctr,
                    "ctr_error": spread / tokens / math.sqrt(len(scores)),
                    "perplexity": perplexity_of(loss),
                    "images": len(scores),
                    "short_classes": int(arrays[f"short_{name}"]),
                }
            )
    return {"": rows}


def figures(analysed: Sequence[Analysed]) -> dict[str, bytes]:
    """Figure 8a: bars of the ratio, and of perplexity, for each set and context."""
    rows = [row for one in analysed for row in tables(one)[""]]
    models = models_of(rows)
    places = [(data, context) for context in CONTEXTS for data in SETS.values()]
    figure, (ratios, perplexities) = panels(2, width=5)
    for axes, measure, factor in ((ratios, "ctr", 100), (perplexities, "perplexity", 1)):
        for number, model in enumerate(models):
            for at, (data, context) in enumerate(places):
                values = [
                    factor * row[measure]
                    for row in rows
                    if (row["model"], row["data"], row["context"]) == (model, data, context)
                ]
                interval = mean_interval(values)
                error = None if interval.high is None else interval.high - interval.mean
                x = at + (number - (len(models) - 1) / 2) * 0.8 / len(models)
                axes.bar(x, interval.mean, 0.8 / len(models), yerr=error, capsize=3, color=colour(number),
                         label=model if at == 0 else None)  # fmt: skip
                axes.annotate(f"{interval.mean:.3g}", (x, interval.mean + (error or 0)), (0, 3), textcoords="offset points",
                              ha="center", va="bottom", fontsize=7)  # fmt: skip
        axes.set_xticks(range(len(places)), [f"{data},\n{context}" for data, context in places])
        axes.margins(y=0.12)
    finish(ratios, "", "correct token ratio (%)")
    finish(perplexities, "", "perplexity")
    return {"": png(figure)}


EXPERIMENT = Experiment(
    name="generalization",
    source="reAR, Figure 8a and appendix C.1",
    work=Generalization,
    keys=("data", "context", "replaced"),
    tables=tables,
    figures=figures,
)
