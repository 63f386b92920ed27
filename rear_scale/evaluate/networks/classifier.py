"""A small convolutional classifier of a data set's own classes. Where Inception says little (small grey digits, say), its
penultimate layer gives the features of the Fréchet distance and its output the class accuracy of samples."""

# B images, S side in pixels, F features, C classes

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rear_scale import rng
from rear_scale.config import ClassifierConfig, InputError
from rear_scale.files import file_sha256
from rear_scale.progress import progress
from rear_scale.shards.images import open_images
from rear_scale.tokenizer.compact_training import to_unit_range
from rear_scale.weight_file import fill, read_training, read_weights, write_weights

_KIND = "classifier"
NUM_FEATURES = 64
_SHIFT = 2  # pixels, in training


class Classifier(nn.Module):
    def __init__(self, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.image_size, self.num_classes = image_size, num_classes
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
            nn.Linear(9 * 64, NUM_FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.output = nn.Linear(NUM_FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """float [B, F] of images (float [B, 3, S, S] in [0, 1])."""
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        return self.output(self.features(images))

    def save(self, path: Path, training: dict[str, Any] | None = None) -> None:
        """training: what it was trained on and how, as `training_settings` gives it."""
        architecture = {"image_size": self.image_size, "num_classes": self.num_classes}
        write_weights(path, self, _KIND, architecture, training)

    @classmethod
    def from_file(cls, path: str) -> Self:
        field = "evaluate.classifier.weights"
        architecture, state = read_weights(path, _KIND, ("image_size", "num_classes"), field)
        with torch.device("meta"):
            classifier = cls(**architecture)
        return fill(classifier, state, path, field)


class ClassifierFeatures:
    """The feature extractor of an evaluation: uint8 images in, features and predicted classes out."""

    name = "classifier"

    def __init__(self, cfg: ClassifierConfig, device: torch.device) -> None:
        self.classifier = Classifier.from_file(cfg.weights).to(device).eval()
        self.device = device
        self.image_size = self.classifier.image_size
        self.weights_sha256 = file_sha256(cfg.weights)
        self.identity = f"classifier {self.weights_sha256}"

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """`features` float32 [n, F] and `classes` int64 [n] of images (uint8 [n, S, S, 3])."""
        features = self.classifier.features(to_unit_range(torch.from_numpy(images).to(self.device)))
        classes = self.classifier.output(features).argmax(1)
        return {"features": features.float().cpu().numpy(), "classes": classes.cpu().numpy()}


def training_settings(cfg: ClassifierConfig) -> dict[str, Any]:
    """What the weights depend on, by field. Raises InputError when the images are not there."""
    shards = open_images(cfg.images)
    identity = hashlib.sha256("".join(shard.sha256 for shard in shards.shards).encode()).hexdigest()
    prefix = "evaluate.classifier"
    return {
        f"{prefix}.images": identity[:16],
        **{f"{prefix}.{name}": getattr(cfg, name) for name in ("steps", "batch_size", "lr", "seed")},
        "class_names": shards.class_names,
    }


def check_same_training(cfg: ClassifierConfig) -> None:
    """Raises InputError when the weights, which are there, were trained on other images or with other settings.

    A file that does not say so, and images that are gone, are taken as they are.
    """
    before = read_training(cfg.weights)
    if not before or not (Path(cfg.images) / "index.json").is_file():
        return
    for field, value in training_settings(cfg).items():
        if before.get(field) != value:
            raise InputError(
                f"{field}={value}, but {cfg.weights} was trained with {before.get(field)}. Set it back, name another "
                "evaluate.classifier.weights, or remove the file to train anew"
            )


def train_classifier(cfg: ClassifierConfig, device: torch.device) -> None:
    """Trains on cfg.images and writes cfg.weights. One process; a second or so per hundred steps on small images."""
    shards = open_images(cfg.images)
    pixels, labels = (torch.from_numpy(part) for part in shards.load())
    torch.manual_seed(cfg.seed)
    classifier = Classifier(shards.image_size, len(shards.class_names)).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=cfg.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, total_steps=cfg.steps)
    with progress("train classifier", cfg.steps, "step") as bar:
        for step in range(cfg.steps):
            generator = torch.Generator().manual_seed(rng.fold(cfg.seed, rng.Purpose.CLASSIFIER_BATCH, step))
            chosen = torch.randint(len(pixels), (cfg.batch_size,), generator=generator)
            # Shifted, so that it judges shapes and not places.
            images = F.pad(to_unit_range(pixels[chosen].to(device)), [_SHIFT] * 4)
            top, left = torch.randint(2 * _SHIFT + 1, (2,), generator=generator).tolist()
            images = images[:, :, top : top + shards.image_size, left : left + shards.image_size]
            loss = F.cross_entropy(classifier(images), labels[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    path = Path(cfg.weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    classifier.save(path, training_settings(cfg))
