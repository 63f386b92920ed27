"""Metrics of a tokenizer's reconstructions: their difference to the originals, and the use of the codebook."""

# n images, N tokens of an image, K codes

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import numpy as np

from rear_scale.evaluate.metrics.base import Column, Inputs, Metric, Output, SampleMetric
from rear_scale.evaluate.metrics.distances import codebook_use
from rear_scale.tokenizer.base import Tokenizer


class Psnr(Metric):
    """The mean PSNR over images, peak 255, without unchanged images, whose PSNR is infinite; these are counted."""

    name = "psnr"
    network = "reconstruction"
    against_references = False
    columns = (Column("PSNR", 2, lambda values: values.get("psnr")),)

    def tasks(self, inputs: Inputs) -> list[Callable[[], list[Output]]]:
        return [partial(self._parts, inputs)]

    def _parts(self, inputs: Inputs) -> list[Output]:
        ratios = inputs.samples.column("psnr")
        assert ratios is not None
        finite = ratios[np.isfinite(ratios)]
        mean = float(finite.mean()) if len(finite) else None
        return [Output({self.name: mean, "psnr_unchanged_images": int(len(ratios) - len(finite))})]


class Lpips(SampleMetric):
    """The mean LPIPS distance over images; None where the weights of LPIPS are not set."""

    name = "lpips"
    network = "reconstruction"
    columns = (Column("LPIPS", 3, lambda values: values.get("lpips")),)

    def score(self, inputs: Inputs) -> float | None:
        distances = inputs.samples.column("lpips")
        return None if distances is None else float(distances.mean())


class _Reconstructs(Protocol):
    tokenizer: Tokenizer


class TokenUse(Metric):
    """The fraction of the codes that occur, and the entropy of their distribution in bits."""

    name = "codebook_used"
    network = "reconstruction"
    against_references = False
    columns = (Column("codes used", 3, lambda values: values.get("codebook_used")),)

    def tasks(self, inputs: Inputs) -> list[Callable[[], list[Output]]]:
        return [partial(self._parts, inputs)]

    def _parts(self, inputs: Inputs) -> list[Output]:
        counts = np.zeros(cast("_Reconstructs", inputs.network).tokenizer.codebook_size, np.int64)
        for _, tokens in inputs.samples.parts("tokens"):
            counts += np.bincount(tokens.ravel(), minlength=len(counts))
        use = codebook_use(counts)
        return [Output({self.name: use.used, "codebook_entropy_bits": use.entropy})]
