"""LPIPS, a perceptual distance of images on VGG16's features. Zhang et al. 2018, arXiv:1801.03924; weights of version 0.1."""

# B pairs of images, H and W their size in pixels

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rear_scale.evaluate.networks.base import as_batch, exact_arithmetic, for_inference
from rear_scale.evaluate.networks.weights import PublishedFile, fill, read_weight_file

VGG16 = PublishedFile("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
LPIPS_VGG = PublishedFile(
    "vgg.pth (LPIPS v0.1)",
    "https://github.com/richzhang/PerceptualSimilarity, lpips/weights/v0.1/vgg.pth",
    None,
)

_PACKAGE = "lpips"


def packaged_weights() -> Path | None:
    """The lin weights for VGG16 inside the installed package lpips, which is not imported; None without them."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    paths = [Path(folder) / "weights/v0.1/vgg.pth" for folder in folders]
    return next((path for path in paths if path.is_file()), None)


# Channels of the convolutions of each stage; a stage ends after a ReLU, and all but the last are followed by pooling.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# The colour normalisation of VGG16, for images in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """The LPIPS network, with the parameter names of the two published files: features.N.* of torchvision's VGG16, and
    linN.model.1.weight of LPIPS."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends: list[int] = []  # the number of layers up to the end of each stage
        inputs = 3
        for number, stage in enumerate(_STAGES):
            layers += [nn.MaxPool2d(2)] if number else []
            for outputs in stage:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
                inputs = outputs
            self.ends.append(len(layers))
            weight = nn.Sequential(nn.Identity(), nn.Conv2d(inputs, 1, 1, bias=False))
            self.add_module(f"lin{number}", nn.ModuleDict({"model": weight}))
        self.features = nn.Sequential(*layers)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances [B] of images a and b (float [B, 3, H, W] in [-1, 1])."""
        distance = torch.zeros(len(a), dtype=a.dtype, device=a.device)
        start = 0
        for number, end in enumerate(self.ends):
            if number == 0:
                shift, scale = (a.new_tensor(values)[:, None, None] for values in (_SHIFT, _SCALE))
                a, b = (a - shift) / scale, (b - shift) / scale
            a, b = self.features[start:end](a), self.features[start:end](b)
            difference = (_unit(a) - _unit(b)).square()
            weigh = self.get_submodule(f"lin{number}.model.1")  # a convolution of one pixel without bias
            distance = distance + weigh(difference).mean((1, 2, 3))
            start = end
        return distance


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


class LpipsDistance:
    """LPIPS of uint8 images. Raises InputError for a missing or damaged weight file, or one of another network."""

    def __init__(self, vgg_weights: str | None, lpips_weights: str | None, device: torch.device) -> None:
        vgg = read_weight_file(vgg_weights, "evaluate.vgg_weights", VGG16)
        linear = read_weight_file(lpips_weights, "evaluate.lpips_weights", LPIPS_VGG)
        network = Lpips()
        fill(network, {**vgg.state, **linear.state}, f"evaluate.vgg_weights={vgg_weights} with {lpips_weights}")
        self.network = for_inference(network, device)
        self.device = device
        self.identity = f"lpips-vgg-0.1 {vgg.sha256} {linear.sha256}"

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Distances float [n] of pairs of images (uint8 [n, H, W, 3] each)."""
        # The network expects images in [-1, 1]; with [0, 1] its distances are far too small.
        dtype = next(self.network.parameters()).dtype
        pair = [as_batch(images, self.device).to(dtype) / 127.5 - 1 for images in (a, b)]
        with exact_arithmetic(), torch.inference_mode():
            return self.network(*pair).cpu().numpy()
