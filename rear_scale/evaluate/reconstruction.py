"""Reconstruction quality of a tokenizer: distances on the networks in use (rFID on Inception), PSNR, LPIPS, and the use of its
codebook."""

# n images, N tokens of an image

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.config.renamed import downgraded
from rear_scale.evaluate.images.image_set import ImageSet, open_image_set
from rear_scale.evaluate.job import open_networks
from rear_scale.evaluate.metrics import metrics_of
from rear_scale.evaluate.metrics.base import FeatureSet, Inputs
from rear_scale.evaluate.metrics.distances import psnr
from rear_scale.evaluate.networks import rows_in_use
from rear_scale.evaluate.networks.base import FeatureNetwork, PairDistance, as_batch, exact_arithmetic
from rear_scale.evaluate.networks.feature_cache import extract
from rear_scale.evaluate.reference import Reference, open_reference
from rear_scale.evaluate.result import ImageScores, NetworkScores, ReconstructionScores
from rear_scale.evaluate.scores import network_scores, run_metrics
from rear_scale.progress import say
from rear_scale.sample.uint8_rounding import to_uint8
from rear_scale.tokenizer import decoder_identity, open_tokenizer, weights_sha256
from rear_scale.tokenizer.base import Tokenizer
from rear_scale.world import World


class ReconstructionFeatures:
    """An extractor that encodes and decodes images: features of the reconstructions, and their differences to the originals."""

    name = "reconstruction"

    def __init__(
        self,
        tokenizer: Tokenizer,
        networks: Sequence[FeatureNetwork],
        distances: Mapping[str, PairDistance],
        uint8_rounding: str,
        sha256: str,
    ) -> None:
        """networks: for features of the reconstructions. distances: of an image and its reconstruction, by name."""
        self.tokenizer, self.networks = tokenizer, networks
        self.distances, self.uint8_rounding = distances, uint8_rounding
        pairs = [distance.identity for distance in distances.values()] or ["no lpips"]
        # The rule under its old name, so that features cached before it was renamed are found.
        rule = downgraded({"sample": {"uint8_rounding": uint8_rounding}})["sample"]["quantiser"]
        of_networks = [network.identity for network in networks] or ["no network"]
        self.identity = f"reconstruction {' '.join((sha256, rule, *of_networks, *pairs))}"

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The networks' features of the reconstructions, `psnr` [n], each distance [n] and `tokens` [n, N]."""
        with exact_arithmetic(), torch.inference_mode():
            tokens = self.tokenizer.encode(as_batch(images, self.tokenizer.codebook.device).float() / 255)
            decoded = to_uint8(self.tokenizer.decode(tokens).float(), self.uint8_rounding)
        features = {name: values for network in self.networks for name, values in network(decoded).items()}
        found = {**features, "psnr": psnr(images, decoded), "tokens": tokens.cpu().numpy()}
        return {**found, **{name: distance(images, decoded) for name, distance in self.distances.items()}}


def score_reconstruction(
    cfg: ExperimentConfig, images: str | Path, cache: Path, world: World
) -> tuple[ImageSet, ImageScores]:
    """The images, cropped to the tokenizer's size, and the scores of their reconstructions. All ranks must call this.

    The reconstructions are compared with `originals`, where the `fid` is the rFID, and with evaluate.reference, on every network
    whose weights are set. Without one there are no distances.
    LPIPS needs evaluate.vgg_weights and evaluate.lpips_weights, and is left out without them.
    """
    tokenizer = open_tokenizer(cfg.tokenizer, world.device)
    networks = open_networks(cfg, world)
    if not networks and world.is_main:
        say("no feature network is set: no distances of the reconstructions. evaluate.inception_weights gives rFID")
    pairs = rows_in_use(cfg.evaluate, of_pairs=True)
    distances = {row.name: row.open_distance(cfg.evaluate, world.device) for row in pairs}
    originals = open_image_set(images, world, tokenizer.image_size, cfg.evaluate.exif)
    if (originals.height, originals.width) != (tokenizer.image_size, tokenizer.image_size):
        raise InputError(
            f"{images} holds images of {originals.width}x{originals.height}, but {cfg.tokenizer.name} takes "
            f"{tokenizer.image_size}x{tokenizer.image_size}. Use a folder of image files, which are cropped, or another tokenizer"
        )
    sha256 = world.on_main(lambda: weights_sha256(cfg.tokenizer))
    decoder = world.on_main(lambda: decoder_identity(cfg.tokenizer))
    assert sha256 is not None, "a tokenizer that opens has weights"
    assert decoder is not None
    extractor = ReconstructionFeatures(tokenizer, networks, distances, cfg.sample.uint8_rounding, decoder)
    (blocks,) = extract(originals, [extractor], cache, cfg.evaluate.batch_size, world)
    references: list[Reference] = []
    scores_by_network: dict[str, NetworkScores] = {}
    if networks:
        sets = {"originals": str(images), **cfg.evaluate.reference}
        references = [
            open_reference(name, path, cfg.evaluate, networks, cache, tokenizer.image_size, world)
            for name, path in sets.items()
        ]
        scores_by_network = {
            network.name: network_scores(network, blocks, references, cfg.evaluate, world) for network in networks
        }
    inputs = Inputs(extractor, FeatureSet("reconstructions", blocks, world.device), [], cfg.evaluate, world)
    differences = run_metrics(metrics_of(extractor.name), inputs).of_samples
    scores = ImageScores(
        networks=scores_by_network,
        reference_sets={reference.name: reference.describe() for reference in references},
        reconstruction=ReconstructionScores(originals.count, differences, cfg.sample.uint8_rounding, sha256),
    )
    return originals, scores
