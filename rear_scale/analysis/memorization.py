"""The nearest training image of samples, in tokens and in pixels, beside that of held-out images of data.val.

A model that copies has samples closer to its training images than held-out images are. Images are decoded from tokens, those
of the training set and of data.val too, so that all have the tokenizer's look. Distance in tokens: the fraction of positions
that differ. Distance in pixels: the root mean square difference in grey levels (0 to 255), of images averaged to at most 64
pixels a side.
"""

# q queries (samples, then held-out images), m training images of a block, N tokens of an image, S side in pixels

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rear_scale.analysis.experiment import Analysed, Arrays, Experiment, Row, Subject
from rear_scale.analysis.plots import colour, finish, models_of, panels
from rear_scale.analysis.token_sets import TokenWork, labels_of_set, spread_over_classes
from rear_scale.evaluate.images.npz import read_samples
from rear_scale.figures import png
from rear_scale.sample.grid import contact_sheet
from rear_scale.sample.job import check_tokenizer, decode_images, job_identity, sample_images
from rear_scale.tokenizer import open_tokenizer
from rear_scale.tokenizer.base import Tokenizer
from rear_scale.world import World

KINDS = ("samples", "held-out images")
SPACES = ("tokens", "pixels")
_MOST_SIDE = 64  # pixels, in which distances are computed
_BLOCK = 512  # training images
_QUERIES = 128  # compared at once
_PAIRS = 8  # closest pairs in the picture


def token_distances(queries: Tensor, references: Tensor) -> Tensor:
    """The fraction of positions that differ, float64 [q, m]. queries: int64 [q, N]; references: int64 [m, N]."""
    parts = [(part[:, None] != references[None]).sum(-1) for part in queries.split(_QUERIES)]
    return torch.cat(parts).double() / queries.shape[1]


def pixel_distances(queries: Tensor, references: Tensor) -> Tensor:
    """The root mean square difference, float64 [q, m], of rows [q, F] and [m, F]."""
    references = references.double()
    parts = [torch.cdist(part.double(), references) for part in queries.split(_QUERIES)]
    return torch.cat(parts) / queries.shape[1] ** 0.5


def small_pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """Images (uint8 [n, S, S, 3]) as float32 rows [n, F], averaged by a whole factor to at most 64 pixels a side."""
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float()
    factor = -(-images.shape[1] // _MOST_SIDE)
    return F.avg_pool2d(pixels, factor, ceil_mode=True, count_include_pad=False).flatten(1)


class Memorization(TokenWork):
    """The nearest training image of each query, block by block of the training set."""

    with_train = True

    def __init__(self, subject: Subject, world: World) -> None:
        super().__init__(subject, world)
        check_tokenizer(self.cfg, subject.checkpoint)
        self.sampling = replace(
            self.cfg, sample=replace(self.cfg.sample, num_images=len(self.ids), also_write=None, grid_every_images=None)
        )
        self.train_ids = spread_over_classes(labels_of_set(self.sets["train"]), self.cfg.analyze.train_images)

    @property
    def identity(self) -> dict[str, Any]:
        samples = self.world.on_main(lambda: job_identity(self.sampling, self.subject.checkpoint))
        return {**super().identity, "samples": samples, "train_images": len(self.train_ids), "block": _BLOCK}

    @cached_property
    def blocks(self) -> list[np.ndarray]:
        return np.split(self.train_ids, range(_BLOCK, len(self.train_ids), _BLOCK))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.cfg.tokenizer, self.world.device)

    def prepare(self, folder: Path) -> None:
        self.samples = folder / "samples.npz"
        sample_images(self.sampling, self.subject.checkpoint, self.world, self.samples)

    def _decoded(self, tokens: Tensor) -> np.ndarray:
        parts = tokens.split(self.cfg.sample.batch_size)
        return np.concatenate([decode_images(self.tokenizer, part, self.cfg) for part in parts])

    @cached_property
    def queries(self) -> tuple[Tensor, np.ndarray]:
        """Tokens int64 [q, N] and images uint8 [q, S, S, 3] of the samples, then of the held-out images."""
        tokens = torch.from_numpy(np.load(self.samples.with_suffix(".tokens.npy")).astype(np.int64)).to(
            self.world.device
        )
        held_out = self.rows(self.val, self.ids)[0]
        images = read_samples(self.samples)[0][:]
        return torch.cat((tokens, held_out)), np.concatenate((images, self._decoded(held_out)))

    @cached_property
    def small_queries(self) -> Tensor:
        return small_pixels(self.queries[1], self.world.device)

    def compute(self, number: int) -> Arrays:
        ids = self.blocks[number]
        tokens = self.rows(self.sets["train"], ids)[0]
        distances = {
            "tokens": token_distances(self.queries[0], tokens),
            "pixels": pixel_distances(self.small_queries, small_pixels(self._decoded(tokens), self.world.device)),
        }
        found: Arrays = {}
        for space, values in distances.items():
            nearest = values.argmin(1)
            found[space] = values.gather(1, nearest[:, None])[:, 0].cpu().numpy()
            found[f"{space}_id"] = ids[nearest.cpu().numpy()]
        return found

    def reduce(self, blocks: Iterable[Arrays]) -> Arrays:
        """By space the smallest distance float64 [q] and the training image int64 [q] of each query; `pairs_SPACE` uint8
        [2, pairs, 2, S, S, 3]: samples and held-out images with the smallest distances, each with its training image."""
        found: Arrays = {}
        for block in blocks:
            for space in SPACES:
                if space not in found:
                    found[space], found[f"{space}_id"] = block[space], block[f"{space}_id"]
                    continue
                closer = block[space] < found[space]
                found[space] = np.where(closer, block[space], found[space])
                found[f"{space}_id"] = np.where(closer, block[f"{space}_id"], found[f"{space}_id"])
        count = len(self.ids)
        for space in SPACES:
            parts = (slice(0, count), slice(count, 2 * count))
            closest = [part.start + np.argsort(found[space][part], kind="stable")[:_PAIRS] for part in parts]
            found[f"pairs_{space}"] = np.stack([self._pairs(queries, found[f"{space}_id"]) for queries in closest])
        return {**found, "ids": self.ids}

    def _pairs(self, queries: np.ndarray, nearest: np.ndarray) -> np.ndarray:
        tokens = self.sets["train"].rows(torch.from_numpy(nearest[queries]))[0].to(self.world.device)
        return np.stack((self.queries[1][queries], self._decoded(tokens)), 1)


def tables(analysed: Analysed) -> dict[str, list[Row]]:
    """A row for samples and one for held-out images; and in `nearest` one for each of them.

    tokens and pixels: means of the distance to the nearest training image, with minimum, 1% and 5% quantile and median.
    copies: fraction whose tokens are those of a training image.
    """
    arrays, about = analysed.arrays, analysed.subject.about
    rows, nearest = [], []
    count = len(arrays["ids"])
    for number, kind in enumerate(KINDS):
        part = slice(number * count, (number + 1) * count)
        row: Row = {**about, "images_of": kind}
        for space in SPACES:
            values = arrays[space][part]
            low, fifth, median = np.quantile(values, (0.01, 0.05, 0.5)).tolist()
            row |= {space: float(values.mean()), f"{space}_min": float(values.min()), f"{space}_p01": low,
                    f"{space}_p05": fifth, f"{space}_median": median}  # fmt: skip
        rows.append({**row, "copies": float((arrays["tokens"][part] == 0).mean()), "images": count})
        for at in range(count):
            one: Row = {**about, "images_of": kind, "image": at if number == 0 else int(arrays["ids"][at])}
            for space in SPACES:
                one |= {
                    space: float(arrays[space][part][at]),
                    f"{space}_train_image": int(arrays[f"{space}_id"][part][at]),
                }
            nearest.append(one)
    return {"": rows, "nearest": nearest}


def figures(analysed: Sequence[Analysed]) -> dict[str, bytes]:
    """The distributions of distances; and the closest pairs of the first checkpoint of each model."""
    models = models_of([one.subject.about for one in analysed])
    figure, axes = panels(2 * len(models), columns=2)
    for at, model in enumerate(models):
        own = [one for one in analysed if one.subject.model == model]
        for column, space in enumerate(SPACES):
            panel = axes[2 * at + column]
            halves = [np.split(one.arrays[space], 2) for one in own]
            most = max(half.max() for pair in halves for half in pair)
            edges = np.linspace(0, most * 1.02, 41)
            tokens = own[0].subject.cfg.tokenizer.num_tokens
            if space == "tokens" and tokens <= 64:  # one bar for each number of tokens
                edges = (np.arange(round(most * tokens) + 2) - 0.5) / tokens
            for kind, shade, values in zip(KINDS, (colour(at), "#7f7f7f"), zip(*halves, strict=True), strict=True):
                panel.hist(
                    np.concatenate(values),
                    edges.tolist(),
                    density=True,
                    histtype="stepfilled",
                    alpha=0.45,
                    color=shade,
                    label=kind,
                )
            title = (
                "fraction of tokens that differ" if space == "tokens" else "root mean square difference (grey levels)"
            )
            finish(panel, title, "density", f"{model}: distance to the nearest training image")
            panel.title.set_fontsize(9)
    found = {"": png(figure)}
    firsts = [next(one for one in analysed if one.subject.model == model) for model in models]
    for space in SPACES:
        picture, sheets = panels(2 * len(firsts), columns=2, width=4.2, height=1.35)
        for at, one in enumerate(firsts):
            for column, kind in enumerate(KINDS):
                pairs = one.arrays[f"pairs_{space}"][column]
                panel = sheets[2 * at + column]
                # Queries in the first line, the training image of each below it.
                panel.imshow(contact_sheet(pairs.swapaxes(0, 1).reshape(-1, *pairs.shape[2:]), len(pairs)))
                panel.set_axis_off()
                panel.set_title(
                    f"{one.subject.model}: {kind} (above) closest in {space} to training images", fontsize=7
                )
        found[f"pairs_{space}"] = png(picture)
    return found


EXPERIMENT = Experiment(
    name="memorization",
    source="beyond the papers: the nearest training images of samples",
    work=Memorization,
    keys=("images_of",),
    tables=tables,
    figures=figures,
    inputs=("data.train", "data.val", "tokenizer.weights"),
)
