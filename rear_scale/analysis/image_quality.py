"""Comparison of decoded images with the decoded ground truth and with original images: PSNR and LPIPS (reAR Eq. 10 to 12)."""

# B images of a batch, A arms (versions of each image), N tokens of an image, S side in pixels

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rear_scale.analysis.experiment import Arrays, Subject
from rear_scale.analysis.token_sets import TokenWork
from rear_scale.config import EvaluateConfig, InputError
from rear_scale.evaluate.images.image_set import ImageSet, open_image_set
from rear_scale.evaluate.metrics.distances import psnr
from rear_scale.evaluate.networks import NETWORKS
from rear_scale.evaluate.networks.base import PairDistance
from rear_scale.progress import say_once
from rear_scale.sample.job import check_tokenizer, decode_images
from rear_scale.tokenizer import decoder_identity, open_tokenizer
from rear_scale.tokenizer.base import Tokenizer, to_unit_range
from rear_scale.world import World

_CHECKED = 4  # images that are encoded to see whether the originals are those of the tokens
_FIELD = "analyze.originals"
_DEFAULT = "evaluate.reference.validation"
LPIPS = next(row for row in NETWORKS if row.name == "lpips")


def open_lpips(cfg: EvaluateConfig, world: World) -> PairDistance | None:
    """LPIPS; None where one of its weight files is missing, which is said. Raises InputError for a damaged file."""
    for (field, path), published in zip(LPIPS.paths(cfg).items(), LPIPS.weights.values(), strict=True):
        if path is None or not Path(path).is_file():
            found = f"{field} is not set" if path is None else f"not found: {field}={path}"
            if world.is_main:
                say_once(
                    f"no LPIPS: {found}. It is {published.name}, from {published.source}; the other measures are computed"
                )
            return None
    return LPIPS.open_distance(cfg, world.device)


class ImageWork(TokenWork):
    """The base of work that decodes versions of the images of data.val and compares them."""

    def __init__(self, subject: Subject, world: World) -> None:
        super().__init__(subject, world)
        check_tokenizer(self.cfg, subject.checkpoint)
        self.decoder = world.on_main(lambda: decoder_identity(self.cfg.tokenizer))
        self.lpips = open_lpips(self.cfg.evaluate, world)
        self.originals = self._open_originals()

    @property
    def identity(self) -> dict[str, Any]:
        return {
            **super().identity,
            "tokenizer": self.decoder,
            "rounding": self.cfg.sample.uint8_rounding,
            "lpips": None if self.lpips is None else self.lpips.identity,
            "originals": None if self.originals is None else self.originals.identity,
        }

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.cfg.tokenizer, self.world.device)

    def _open_originals(self) -> ImageSet | None:
        """The images of data.val, or None where they are not given. Raises InputError for other images in analyze.originals."""
        given, manifest = self.cfg.analyze.originals, self.val.manifest
        path, named = (
            (given, _FIELD) if given is not None else (self.cfg.evaluate.reference.get("validation"), _DEFAULT)
        )
        if path is None or (given is None and not Path(path).exists()):
            self._say(f"{_FIELD} is not set: images are compared with the decoded ground truth alone")
            return None
        images = open_image_set(Path(path), self.world, self.tokenizer.image_size, self.cfg.pretokenize.exif)
        problem = None
        if manifest.crops_per_image != 1:
            problem = f"data.val={self.cfg.data.val} has {manifest.crops_per_image} crops of each image"
        elif images.count != manifest.num_samples:
            problem = f"it holds {images.count:,} images, and data.val={self.cfg.data.val} {manifest.num_samples:,}"
        else:
            problem = self.world.on_main(lambda: self._differ(images))
        if problem is None:
            return images
        if given is not None:
            raise InputError(
                f"{_FIELD}={path} does not hold the images of data.val: {problem}. Name those, or set it to null"
            )
        self._say(f"{named}={path} does not hold the images of data.val ({problem}): no comparison with originals")
        return None

    def _say(self, line: str) -> None:
        if self.world.is_main:
            say_once(line)

    def _differ(self, images: ImageSet) -> str | None:
        """The reason why some images are not those of the tokens; None where they encode to them."""
        ids = self.ids[:_CHECKED]
        pixels = torch.from_numpy(self._read(images, ids)).to(self.world.device)
        with torch.inference_mode():
            tokens = self.tokenizer.encode(to_unit_range(pixels)).cpu()
        same = (tokens == self.val.rows(torch.from_numpy(ids))[0]).float().mean(1)
        # Not all: another device may round a latent between two codes to the other one.
        wrong = [int(number) for number, part in zip(ids, same, strict=True) if part < 0.9]
        return f"image {wrong[0]} encodes to other tokens" if wrong else None

    def _read(self, images: ImageSet, ids: np.ndarray) -> np.ndarray:
        # One by one: sources may read consecutive images alone.
        return np.concatenate([images.read(ids[at : at + 1])[0] for at in range(len(ids))])

    def decoded(self, tokens: Tensor) -> np.ndarray:
        """The images uint8 [B, S, S, 3] of tokens int64 [B, N] in stored order."""
        size = self.cfg.sample.batch_size
        return np.concatenate([decode_images(self.tokenizer, part, self.cfg) for part in tokens.split(size)])

    def compare(self, ids: np.ndarray, truth: Tensor, arms: Tensor) -> Arrays:
        """PSNR and LPIPS of each version of each image, float64 [B, A], by psnr_decoded, psnr_original and so on.

        ids: int64 [B]; truth: int64 [B, N]; arms: int64 [B, A, N]; all tokens in stored order.
        """
        images = self.decoded(arms.flatten(0, 1))
        targets = {"decoded": self.decoded(truth)}
        if self.originals is not None:
            targets["original"] = self._read(self.originals, ids)
        found: Arrays = {}
        for name, target in targets.items():
            repeated = target.repeat(arms.shape[1], axis=0)
            found[f"psnr_{name}"] = finite_psnr(repeated, images).reshape(arms.shape[:2])
            if self.lpips is not None:
                found[f"lpips_{name}"] = self._distances(repeated, images).reshape(arms.shape[:2])
        return found

    def _distances(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        assert self.lpips is not None
        size = self.cfg.evaluate.batch_size
        parts = [self.lpips(a[at : at + size], b[at : at + size]) for at in range(0, len(a), size)]
        return np.concatenate(parts).astype(np.float64)


def finite_psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """PSNR in dB of pairs of images (uint8 [n, S, S, 3] each), float64 [n]; for equal images that of images which differ by one
    level in one value, so that means over images are finite."""
    return np.minimum(psnr(a, b), 10 * np.log10(255**2 * a[0].size))


MEASURES = ("psnr_decoded", "psnr_original", "lpips_decoded", "lpips_original")


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of values float64 [n] of images and its standard error."""
    error = float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(values.mean()), error
