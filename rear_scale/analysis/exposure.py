"""Exposure bias: images decoded from perfect and from imperfect context with equally many ground-truth tokens (reAR, Section 3.1,
appendix B, Figures 3a and 7a to 7d).

Perfect context: the first floor(r N) tokens are ground truth, and the model samples the others. Imperfect context: floor(r N)
tokens at random places are ground truth, and the model samples each of the others where it stands. Temperature 1, no guidance.
"""

# B images of a batch, A arms (protocol and ratio), N tokens of an image, K codes

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rear_scale import rng
from rear_scale.analysis.experiment import Analysed, Arrays, Experiment, Row
from rear_scale.analysis.image_quality import MEASURES, ImageWork, mean_and_error
from rear_scale.analysis.plots import colour, finish, line, models_of, panels
from rear_scale.config import GuidanceConfig
from rear_scale.figures import png
from rear_scale.objective import permutation
from rear_scale.objective.permutation import random_orders
from rear_scale.objective.prediction import perplexity_of
from rear_scale.sample.batch import Batch
from rear_scale.sample.decode import CachedDecoding, Decoder

PROTOCOLS = ("perfect", "imperfect")
_SEED = 20_251_004  # of the places of ground-truth tokens, which are the same for all models


def ground_truth_tokens(ratio: float, num_tokens: int) -> int:
    """floor(r N), with ratios such as 0.7 that are no binary fractions taken as they are written."""
    return math.floor(ratio * num_tokens + 1e-9)


def context_masks(ids: Tensor, ratio: float, num_tokens: int) -> dict[str, Tensor]:
    """The steps at which the token is ground truth, bool [B, N], by protocol. ids: int64 [B].

    The random places of an image depend on its id alone, and those of a smaller ratio are among those of a larger one.
    """
    count = ground_truth_tokens(ratio, num_tokens)
    front = (torch.arange(num_tokens, device=ids.device) < count).expand(len(ids), -1)
    shuffled = random_orders(rng.random_bits(_SEED, rng.Purpose.ANALYSIS, ids, 0, num_tokens), 0)
    mixed = torch.zeros_like(front, dtype=torch.bool).scatter(1, shuffled[:, :count], True)
    return dict(zip(PROTOCOLS, (front, mixed), strict=True))


@torch.inference_mode()
def decode_with_truth(
    decoder: Decoder, labels: Tensor, ids: Tensor, truth: Tensor, forced: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B, N], as the tokenizer stores them, and the log-probabilities float32 [B, N, 2] that the model gave in each
    step to the token that was taken and to the ground truth, after the tokens before it.

    labels, ids: int64 [B]. truth: int64 [B, N], in stored order. forced: bool [B, N], the steps that take the ground truth.
    Image ids select the random numbers of the others, as in Decoder.generate.
    """
    order = decoder.orders(ids)
    batch = Batch(decoder.model, labels, ids, order, decoder.guided)
    state = CachedDecoding(decoder.model, batch)
    targets = permutation.in_order(truth, order)
    scores = torch.empty(*truth.shape, 2, device=truth.device)
    for step, noise in decoder.with_noise(ids, range(batch.num_tokens)):
        logits = decoder.guide(state.next_logits(batch.tokens[:, :step]), step)
        sampled = (logits - noise).argmax(1)
        batch.tokens[:, step] = torch.where(forced[:, step], targets[:, step], sampled)
        both = torch.stack((batch.tokens[:, step], targets[:, step]), 1)
        scores[:, step] = F.log_softmax(logits, 1).gather(1, both)
    return permutation.in_place(batch.tokens, order), scores


class Exposure(ImageWork):
    """Tokens, probabilities and images of each protocol and ratio for each image."""

    @cached_property
    def arms(self) -> list[tuple[str, float]]:
        """Protocol and ratio of each version. At ratio 0 the protocols are one."""
        return [(protocol, ratio) for ratio in self.cfg.analyze.ratios for protocol in PROTOCOLS]

    @property
    def identity(self) -> dict[str, Any]:
        return {
            **super().identity,
            "ratios": self.cfg.analyze.ratios,
            "seed": [self.cfg.sample.seed, _SEED],
            **({} if self.order is None else {"sample_order": self.order}),
        }

    @property
    def order(self) -> str | None:
        """sample.order; where that is not set, random orders for a model that was trained with them to the end."""
        never_settles = self.cfg.objective.permutation.never_settles
        return self.cfg.sample.order or ("random" if never_settles else None)

    @property
    def block_images(self) -> int:
        # All versions of an image are decoded in one batch.
        return max(1, self.cfg.sample.batch_size // len(self.arms))

    @cached_property
    def decoding(self) -> Decoder:
        plain = replace(
            self.cfg.sample, temperature=1.0, top_k=None, top_p=None, guidance=GuidanceConfig(), cuda_graphs=False,
            order=self.order,
        )  # fmt: skip
        return Decoder(self.model, plain, self.cfg.objective.permutation, compiled=False)

    def compute(self, number: int) -> Arrays:
        ids = self.blocks[number]
        truth, labels, index = self.rows(self.val, ids)
        N, A = truth.shape[1], len(self.arms)
        masks = [context_masks(index, ratio, N)[protocol] for protocol, ratio in self.arms]
        forced = torch.stack(masks, 1).flatten(0, 1)
        of_arms = labels.repeat_interleave(A), index.repeat_interleave(A), truth.repeat_interleave(A, 0)
        tokens, scores = decode_with_truth(self.decoding, *of_arms, forced)
        correct = (tokens == of_arms[2]).sum(1).view(-1, A)
        losses = -scores.double().sum(1).view(-1, A, 2)
        return {
            "correct": correct.cpu().numpy(),
            "loss": losses[..., 0].cpu().numpy(),
            "loss_truth": losses[..., 1].cpu().numpy(),
            **self.compare(ids, truth, tokens.view(-1, A, N)),
        }

    def reduce(self, blocks: Iterable[Arrays]) -> Arrays:
        """Each array with a row for each image and a column for each arm."""
        parts = list(blocks)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def tables(analysed: Analysed) -> dict[str, list[Row]]:
    """A row for each protocol and ratio.

    ctr: fraction of tokens equal to the ground truth. perplexity: of the sequence under the model; perplexity_truth: of the
    ground truth after the same context. *_error: standard errors over images.
    """
    arrays, cfg = analysed.arrays, analysed.subject.cfg
    tokens = cfg.tokenizer.num_tokens
    rows = []
    arms = [(protocol, ratio) for ratio in cfg.analyze.ratios for protocol in PROTOCOLS]
    for at, (protocol, ratio) in enumerate(arms):
        images = len(arrays["correct"])
        row: Row = {
            **analysed.subject.about,
            "protocol": protocol,
            "ratio": ratio,
            "ctr": math.fsum(arrays["correct"][:, at]) / images / tokens,
            "perplexity": perplexity_of(math.fsum(arrays["loss"][:, at]) / images / tokens),
            "perplexity_truth": perplexity_of(math.fsum(arrays["loss_truth"][:, at]) / images / tokens),
        }
        for name in MEASURES:
            if name in arrays:
                row[name], row[f"{name}_error"] = mean_and_error(arrays[name][:, at])
        rows.append({**row, "images": images})
    return {"": rows}


_TITLES = {"psnr": "PSNR (dB)", "lpips": "LPIPS"}
STYLES = {"perfect": "-", "imperfect": "--"}


def axis_title(measure: str) -> str:
    """A measure of image quality in words."""
    name, _, target = measure.partition("_")
    return f"{_TITLES[name]} to the {'original' if target == 'original' else 'decoded ground truth'}"


def figures(analysed: Sequence[Analysed]) -> dict[str, bytes]:
    """Image quality against the correct token ratio (Figures 3a, 7a, 7b) and against perplexity (Figures 7c, 7d)."""
    rows = [row for one in analysed for row in tables(one)[""]]
    measures = [name for name in MEASURES if name in rows[0]]
    figure, axes = panels(2 * len(measures), columns=len(measures))
    for column, measure in enumerate(measures):
        above, below = axes[column], axes[len(measures) + column]
        for number, model in enumerate(models_of(rows)):
            for protocol, style in STYLES.items():
                own = [row for row in rows if (row["model"], row["protocol"]) == (model, protocol)]
                label = f"{model}, {protocol} context"
                line(above, own, "ctr", measure, label, colour(number), style, by="ratio")
                below.scatter(
                    [row["perplexity"] for row in own], [row[measure] for row in own], s=18, color=colour(number),
                    marker="o" if protocol == "perfect" else "x", label=label,
                )  # fmt: skip
        finish(above, "correct token ratio", axis_title(measure), legend=column == 0)
        finish(below, "perplexity of the sequence", axis_title(measure), "o perfect, x imperfect context", legend=False)
    return {"": png(figure)}


EXPERIMENT = Experiment(
    name="exposure",
    source="reAR, Figures 3a and 7a-d, section 3.1 and appendix B",
    work=Exposure,
    keys=("protocol", "ratio"),
    tables=tables,
    figures=figures,
    inputs=("data.val", "tokenizer.weights", "analyze.originals"),
)
