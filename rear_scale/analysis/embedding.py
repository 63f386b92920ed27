"""Embedding unawareness: wrong predictions replaced by wrong tokens whose embedding is closer (reAR, Section 3.1, appendix B,
Figures 3b, 6 and 7e to 7g)."""

# B images of a batch, A ratios, N tokens of an image, K codes, Z width of a code

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rear_scale import rng
from rear_scale.analysis.experiment import Analysed, Arrays, Experiment, Row
from rear_scale.analysis.exposure import axis_title
from rear_scale.analysis.image_quality import MEASURES, ImageWork, mean_and_error
from rear_scale.analysis.plots import colour, finish, line, models_of, panels
from rear_scale.figures import png
from rear_scale.objective import permutation
from rear_scale.objective.prediction import perplexity_of
from rear_scale.sample.grid import contact_sheet

_SEED = 20_251_005  # of the choice of predictions to replace
_ROWS = 4096  # codes whose similarities are in memory at one time
_SHOWN = 6  # images in the picture


def nearest_other_code(codebook: Tensor) -> Tensor:
    """The code, int64 [K], whose embedding has the largest cosine similarity to that of each code, without the code itself.

    codebook: float [K, Z]. Among equal similarities the lowest code.
    """
    unit = F.normalize(codebook.double(), dim=1)
    found = []
    for start in range(0, len(unit), _ROWS):
        part = unit[start : start + _ROWS]
        similarity = part @ unit.T
        own = torch.arange(start, start + len(part), device=unit.device)
        similarity.scatter_(1, own[:, None], -torch.inf)
        found.append(similarity.argmax(1))
    return torch.cat(found)


def replace_wrong(predicted: Tensor, truth: Tensor, nearest: Tensor, uniform: Tensor, ratio: float) -> Tensor:
    """The predictions, int64 [B, N], each wrong one replaced with probability `ratio` by the code nearest to the right one.

    nearest: int64 [K], of `nearest_other_code`; uniform: float [B, N] in [0, 1). Right predictions stay, and no wrong one
    becomes right.
    """
    chosen = (predicted != truth) & (uniform < ratio)
    return torch.where(chosen, nearest[truth], predicted)


class Embedding(ImageWork):
    """Predictions under teacher forcing with a ratio of the wrong ones replaced, and their images."""

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "ratios": self.cfg.analyze.replacement_ratios, "seed": _SEED}

    @property
    def block_images(self) -> int:
        return max(1, self.cfg.sample.batch_size // len(self.cfg.analyze.replacement_ratios))

    @cached_property
    def nearest(self) -> Tensor:
        return nearest_other_code(self.codebook)

    @cached_property
    def unit_codes(self) -> Tensor:
        return F.normalize(self.codebook.double(), dim=1)

    def compute(self, number: int) -> Arrays:
        ids = self.blocks[number]
        truth, labels, index = self.rows(self.val, ids)
        task = self.task(truth, index)
        logits = self.predict(task, labels)["logits"].float()
        log_p = F.log_softmax(logits, -1)
        predicted = logits.argmax(-1)
        N = truth.shape[1]
        uniform = rng.as_uniform(rng.random_bits(_SEED, rng.Purpose.ANALYSIS, index, 0, N))
        found: dict[str, list[Tensor]] = {
            "correct": [],
            "wrong": [],
            "loss": [],
            "similarity": [],
            "wrong_similarity": [],
        }
        arms = []
        for ratio in self.cfg.analyze.replacement_ratios:
            tokens = replace_wrong(predicted, task.tokens, self.nearest, uniform, ratio)
            wrong = tokens != task.tokens
            assert torch.equal(wrong, predicted != task.tokens), "a replacement changed the correct token ratio"
            similarity = (self.unit_codes[tokens] * self.unit_codes[task.tokens]).sum(-1)
            found["correct"].append((~wrong).sum(1))
            found["wrong"].append(wrong.sum(1))
            found["loss"].append(-log_p.gather(-1, tokens[..., None])[..., 0].double().sum(1))
            found["similarity"].append(similarity.sum(1))
            found["wrong_similarity"].append((similarity * wrong).sum(1))
            arms.append(permutation.in_place(tokens, task.order))
        numbers = {name: torch.stack(columns, 1).cpu().numpy() for name, columns in found.items()}
        pictures: Arrays = {}
        if number == 0:
            shown = torch.stack(arms, 1)[:_SHOWN]
            pictures["pictures"] = self.decoded(torch.cat((truth[: len(shown), None], shown), 1).flatten(0, 1))
        return {**numbers, **pictures, **self.compare(ids, truth, torch.stack(arms, 1))}

    def reduce(self, blocks: Iterable[Arrays]) -> Arrays:
        """Each array with a row for each image and a column for each ratio; `pictures` uint8 of the first images: the decoded
        ground truth and each ratio."""
        parts = list(blocks)
        return {name: np.concatenate([part[name] for part in parts if name in part]) for name in parts[0]}


def tables(analysed: Analysed) -> dict[str, list[Row]]:
    """A row for each ratio.

    similarity: mean cosine similarity to the right embeddings, over all tokens; wrong_similarity: over wrong ones. perplexity:
    of the sequence under teacher forcing; perplexity_change: against the first ratio.
    """
    arrays, cfg = analysed.arrays, analysed.subject.cfg
    rows: list[Row] = []
    for at, ratio in enumerate(cfg.analyze.replacement_ratios):
        images = len(arrays["correct"])
        total = images * cfg.tokenizer.num_tokens
        wrong = int(arrays["wrong"][:, at].sum())
        perplexity = perplexity_of(math.fsum(arrays["loss"][:, at]) / total)
        row: Row = {
            **analysed.subject.about,
            "ratio": ratio,
            "ctr": math.fsum(arrays["correct"][:, at]) / total,
            "similarity": math.fsum(arrays["similarity"][:, at]) / total,
            "wrong_similarity": math.fsum(arrays["wrong_similarity"][:, at]) / wrong if wrong else None,
            "perplexity": perplexity,
            "perplexity_change": perplexity - (rows[0]["perplexity"] if rows else perplexity),
        }
        for name in MEASURES:
            if name in arrays:
                row[name], row[f"{name}_error"] = mean_and_error(arrays[name][:, at])
        rows.append({**row, "images": images})
    return {"": rows}


def figures(analysed: Sequence[Analysed]) -> dict[str, bytes]:
    """Image quality against the ratio, the similarity and the change of perplexity (Figures 3b, 7e to 7g), and images of
    increasing ratio (Figure 6)."""
    rows = [row for one in analysed for row in tables(one)[""]]
    measures = [name for name in MEASURES if name in rows[0]]
    places = {
        "ratio": "ratio of replaced wrong predictions r'",
        "similarity": "mean cosine similarity of embeddings",
        "perplexity_change": "increase of perplexity",
    }
    figure, axes = panels(len(places) * len(measures), columns=len(places))
    for row_number, measure in enumerate(measures):
        for column, (x, title) in enumerate(places.items()):
            panel = axes[row_number * len(places) + column]
            for number, model in enumerate(models_of(rows)):
                own = [row for row in rows if row["model"] == model]
                if x == "ratio":
                    line(panel, own, x, measure, model, colour(number))
                else:
                    panel.plot(
                        [row[x] for row in own],
                        [row[measure] for row in own],
                        "o",
                        color=colour(number),
                        ms=4,
                        label=model,
                    )
            finish(panel, title, axis_title(measure), legend=column == 0)
    found = {"": png(figure)}
    first = analysed[0]
    ratios = first.subject.cfg.analyze.replacement_ratios
    sheet = contact_sheet(first.arrays["pictures"], 1 + len(ratios))
    picture, [panel] = panels(1, width=1.1 * (1 + len(ratios)), height=1.2 * _SHOWN)
    panel.imshow(sheet)
    step = sheet.shape[1] / (1 + len(ratios))
    names = ["ground truth", *(f"r' = {ratio:g}" for ratio in ratios)]
    panel.set_xticks([step * (at + 0.5) for at in range(len(names))], names, fontsize=7)
    panel.set_yticks([])
    panel.xaxis.tick_top()
    panel.set_title(f"{first.subject.model}: wrong predictions replaced by the nearest other code", fontsize=8)
    found["images"] = png(picture)
    return found


EXPERIMENT = Experiment(
    name="embedding",
    source="reAR, Figures 3b, 6 and 7e-g, section 3.1 and appendix B",
    work=Embedding,
    keys=("ratio",),
    tables=tables,
    figures=figures,
    inputs=("data.val", "tokenizer.weights", "analyze.originals"),
)
