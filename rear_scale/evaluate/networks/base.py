"""The interface of feature networks (uint8 images -> named features, deterministic), and the Inception network's."""

# n images, H and W their size in pixels

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rear_scale.config import InputError
from rear_scale.evaluate.networks.inception import INCEPTION, POOL_FEATURES, SPATIAL_FEATURES, Inception
from rear_scale.evaluate.networks.weights import fill, read_weight_file

_Network = TypeVar("_Network", bound=nn.Module)


class Extractor(Protocol):
    """Features of images: a network, or the pixels themselves."""

    name: str
    identity: str  # identifies the weights and the preprocessing of images

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Named arrays with one row per image. images: uint8 [n, H, W, 3]."""
        ...


class FeatureNetwork(Extractor, Protocol):
    """An extractor with published weights."""

    sizes: Mapping[str, int]  # the number of values of each feature, by name
    weights_sha256: str
    is_published: bool | None  # whether the weights are the published ones; None = no checksum is published


class PairDistance(Protocol):
    """A distance between an image and its reconstruction."""

    identity: str  # identifies the weights and the preprocessing of images

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Distances float [n] of pairs of images (uint8 [n, H, W, 3] each)."""
        ...


class InceptionFeatures:
    """The extractor of FID, sFID, the Inception Score, precision and recall.

    Raises InputError for a missing or damaged weight file, or one of another network.
    """

    name = "inception"
    sizes: ClassVar = {"pool": POOL_FEATURES, "spatial": SPATIAL_FEATURES}

    def __init__(self, path: str | None, device: torch.device) -> None:
        weights = read_weight_file(path, "evaluate.inception_weights", INCEPTION)
        network = Inception()
        fill(network, weights.state, f"evaluate.inception_weights={path}")
        self.network = for_inference(network, device)
        self.device = device
        self.weights_sha256, self.is_published = weights.sha256, weights.is_published
        self.preprocessing = "TensorFlow 1 bilinear to 299 pixels, (x - 128) / 128, float32"
        self.identity = f"inception-2015-12-05 {weights.sha256} {self.preprocessing}"

    @property
    def classifier(self) -> Tensor:
        """The weights of the output layer, float64 [1008, 2048]. The logits of the Inception Score are pool @ classifier.T,
        without a bias."""
        return self.network.fc.weight.double()

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The features `pool` (float32 [n, 2048]) and `spatial` (float32 [n, 2023]) of images (uint8 [n, H, W, 3])."""
        pixels = as_batch(images, self.device)
        with exact_arithmetic(), torch.inference_mode():
            pool, spatial = self.network(pixels)
        return {"pool": checked("pool", pool), "spatial": checked("spatial", spatial)}


def for_inference(network: _Network, device: torch.device) -> _Network:
    """The network on the device, without gradients. Convolutions have their channels last in memory: 1.4 to 1.5 times as fast on
    CPUs, and what tensor cores want."""
    network = network.to(device).eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this argument


def as_batch(images: np.ndarray, device: torch.device) -> Tensor:
    """A batch uint8 [n, 3, H, W] on the device, from images (uint8 [n, H, W, 3]). Raises InputError for other arrays."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(
            f"images are {images.dtype} {images.shape}, but uint8 [n, height, width, 3] is wanted. "
            "Convert them to 0..255, channels last"
        )
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)


def checked(name: str, features: Tensor) -> np.ndarray:
    """The features as an array. Raises InputError when one of them is not finite."""
    finite = features.isfinite().all(1)
    if not finite.all():
        raise InputError(
            f"the {name} features of {int((~finite).sum())} of {len(features)} images are not finite. "
            "Check the weight file; a faulty GPU can also cause this"
        )
    return features.cpu().numpy()


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """A context with full float32 products (no TF32) and deterministic kernels."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
