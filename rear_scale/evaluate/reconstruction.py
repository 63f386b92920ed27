"""How well a tokenizer gives images back: rFID, PSNR, LPIPS, and the use of its codebook."""

# n images, S side in pixels, N tokens of an image, K codes

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.evaluate.images.image_set import ImageSet, open_image_set
from rear_scale.evaluate.job import open_networks
from rear_scale.evaluate.metrics.distances import codebook_use, psnr
from rear_scale.evaluate.networks.base import FeatureNetwork, as_batch, exact_arithmetic
from rear_scale.evaluate.networks.feature_cache import FeatureBlocks, extract
from rear_scale.evaluate.networks.lpips import LpipsDistance
from rear_scale.evaluate.reference import open_reference
from rear_scale.evaluate.scores import network_scores
from rear_scale.sample.quantise import to_uint8
from rear_scale.tokenizer import decoder_identity, open_tokenizer, weights_sha256
from rear_scale.tokenizer.base import Tokenizer
from rear_scale.world import World


class ReconstructionFeatures:
    """An extractor that puts images through a tokenizer: features of what comes back, and how it differs from them."""

    def __init__(
        self, tokenizer: Tokenizer, network: FeatureNetwork, lpips: LpipsDistance | None, quantiser: str, sha256: str
    ) -> None:
        self.tokenizer, self.network, self.lpips, self.quantiser = tokenizer, network, lpips, quantiser
        parts = (sha256, quantiser, network.identity, lpips.identity if lpips else "no lpips")
        self.identity = f"reconstruction {' '.join(parts)}"

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The network's features of the reconstructions, `psnr` [n], `lpips` [n] and `tokens` [n, N]."""
        with exact_arithmetic(), torch.inference_mode():
            tokens = self.tokenizer.encode(as_batch(images, self.tokenizer.codebook.device).float() / 255)
            decoded = to_uint8(self.tokenizer.decode(tokens).float(), self.quantiser)
        found = {**self.network(decoded), "psnr": psnr(images, decoded), "tokens": tokens.cpu().numpy()}
        return found if self.lpips is None else {**found, "lpips": self.lpips(images, decoded)}


def score_reconstruction(
    cfg: ExperimentConfig, images: str | Path, cache: Path, world: World
) -> tuple[ImageSet, dict[str, Any]]:
    """The images, cropped to the tokenizer's size, and the scores of their reconstructions. All ranks must call this.

    rFID is the `fid` against `originals`; evaluate.reference adds others. LPIPS needs evaluate.vgg_weights and
    evaluate.lpips_weights, and is left out without them.
    """
    if cfg.evaluate.inception_weights is None:
        raise InputError("evaluate.inception_weights is not set, but rFID needs them. Set it to the file's path")
    tokenizer = open_tokenizer(cfg.tokenizer, world.device)
    network = open_networks(cfg, world)[0]
    lpips = None
    if cfg.evaluate.vgg_weights is not None or cfg.evaluate.lpips_weights is not None:
        lpips = LpipsDistance(cfg.evaluate.vgg_weights, cfg.evaluate.lpips_weights, world.device)
    originals = open_image_set(images, world, tokenizer.image_size, cfg.evaluate.exif)
    if (originals.height, originals.width) != (tokenizer.image_size, tokenizer.image_size):
        raise InputError(
            f"{images} holds images of {originals.width}x{originals.height}, but {cfg.tokenizer.name} takes "
            f"{tokenizer.image_size} squared. Name a folder of image files, which are cropped, or another tokenizer"
        )
    sha256 = world.on_main(lambda: weights_sha256(cfg.tokenizer))
    decoder = world.on_main(lambda: decoder_identity(cfg.tokenizer))
    extractor = ReconstructionFeatures(tokenizer, network, lpips, cfg.sample.quantiser, decoder)
    (blocks,) = extract(originals, [extractor], cache, cfg.evaluate.batch_size, world)
    sets = {"originals": str(images), **cfg.evaluate.reference}
    references = [
        open_reference(name, path, cfg.evaluate, [network], cache, tokenizer.image_size, world)
        for name, path in sets.items()
    ]
    scores: dict[str, Any] = {
        network.name: network_scores(network, blocks, references, cfg.evaluate, world),
        "reference_sets": {reference.name: reference.describe() for reference in references},
        "reconstruction": _pair_scores(blocks, tokenizer.codebook_size),
        "quantiser": cfg.sample.quantiser,
        "tokenizer_sha256": sha256,
    }
    return originals, scores


def _pair_scores(blocks: FeatureBlocks, codebook_size: int) -> dict[str, Any]:
    counts = np.zeros(codebook_size, np.int64)
    for number in range(len(blocks.ids)):
        counts += np.bincount(blocks.array(number, "tokens").ravel(), minlength=codebook_size)
    use, ratios, distances = codebook_use(counts), blocks.column("psnr"), blocks.column("lpips")
    assert ratios is not None
    finite = ratios[np.isfinite(ratios)]
    return {
        "images": blocks.count,
        # The mean over images of each image's value, peak 255; images that came back unchanged have none.
        "psnr": float(finite.mean()) if len(finite) else None,
        "psnr_unchanged_images": int(len(ratios) - len(finite)),
        "lpips": None if distances is None else float(distances.mean()),
        "codebook_used": use.used,
        "codebook_entropy_bits": use.entropy,
    }
