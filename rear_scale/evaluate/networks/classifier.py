"""A small convolutional classifier trained on a data set's own classes, for images on which Inception's features are not
meaningful (such as small grey digits). Its penultimate layer gives the features of the Fréchet distance, and its output the
class accuracy of samples."""

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
from rear_scale.evaluate.networks.base import for_inference
from rear_scale.files import file_sha256
from rear_scale.progress import progress, say
from rear_scale.shards.images import ImageShards, open_images, read_image_index
from rear_scale.shards.sources import load_labelled, open_source
from rear_scale.tokenizer.compact_training import to_unit_range
from rear_scale.weight_file import fill, read_training, read_weights, write_weights

_MODEL_TYPE = "classifier"
NUM_FEATURES = 64
_SHIFT = 2  # pixels; largest random shift in training


class Classifier(nn.Module):
    """Three convolutions and two linear layers."""

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
        """The features float [B, F] of images (float [B, 3, S, S] in [0, 1])."""
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        return self.output(self.features(images))

    def save(self, path: Path, training: dict[str, Any] | None = None) -> None:
        """Writes the weights. training: the settings of the training (`training_settings`)."""
        architecture = {"image_size": self.image_size, "num_classes": self.num_classes}
        write_weights(path, self, _MODEL_TYPE, architecture, training)

    @classmethod
    def from_file(cls, path: str) -> Self:
        field = "evaluate.classifier.weights"
        architecture, state = read_weights(path, _MODEL_TYPE, ("image_size", "num_classes"), field)
        with torch.device("meta"):
            classifier = cls(**architecture)
        return fill(classifier, state, path, field)


class ClassifierFeatures:
    """The extractor of the classifier's features and predicted classes."""

    name = "classifier"

    def __init__(self, cfg: ClassifierConfig, device: torch.device) -> None:
        self.classifier = for_inference(Classifier.from_file(cfg.weights), device)
        self.device = device
        self.image_size = self.classifier.image_size
        self.weights_sha256 = file_sha256(cfg.weights)
        self.identity = f"classifier {self.weights_sha256}"

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays `features` (float32 [n, F]) and `classes` (int64 [n]) of images (uint8 [n, S, S, 3])."""
        features = self.classifier.features(to_unit_range(torch.from_numpy(images).to(self.device)))
        classes = self.classifier.output(features).argmax(1)
        return {"features": features.float().cpu().numpy(), "classes": classes.cpu().numpy()}


def class_names(cfg: ClassifierConfig) -> list[str] | None:
    """The names of the classes by id; None where the images do not exist any more, or have no class names."""
    if not _is_there(cfg.images):
        return None
    shards = _shards_of_one_size(cfg.images)
    return shards.class_names if shards else open_source(cfg.images).class_names


def training_settings(cfg: ClassifierConfig, image_size: int) -> dict[str, Any]:
    """The settings and images that the weights depend on, by field. Raises InputError when the images do not exist.

    image_size: the size in pixels to which images are cropped, unless they are shards of images of one size.
    """
    shards = _shards_of_one_size(cfg.images)
    if shards is not None:
        identity = hashlib.sha256("".join(shard.sha256 for shard in shards.shards).encode()).hexdigest()
        names: list[str] | None = shards.class_names
    else:
        source = open_source(cfg.images)
        identity = hashlib.sha256(f"{source.fingerprint} {image_size}".encode()).hexdigest()
        names = source.class_names
    prefix = "evaluate.classifier"
    return {
        f"{prefix}.images": identity[:16],
        **{f"{prefix}.{name}": getattr(cfg, name) for name in ("steps", "batch_size", "lr", "seed")},
        "class_names": names,
    }


def check_same_training(cfg: ClassifierConfig, image_size: int) -> None:
    """Raises InputError when existing weights were trained on other images or with other settings.

    Not checked where the file does not record its training, or where the images no longer exist.
    """
    before = read_training(cfg.weights)
    if not before or not _is_there(cfg.images):
        return
    for field, value in training_settings(cfg, image_size).items():
        if before.get(field) != value:
            raise InputError(
                f"{field}={value}, but {cfg.weights} was trained with {before.get(field)}. Set it back, set another "
                "evaluate.classifier.weights, or remove the file to train it again"
            )


def train_classifier(cfg: ClassifierConfig, device: torch.device, image_size: int) -> None:
    """Trains a classifier on cfg.images and writes cfg.weights, in one process. About a second per hundred steps on small
    images.

    image_size: see `training_settings`. Raises InputError when the images do not exist or cannot be read.
    """
    settings = training_settings(cfg, image_size)
    images, classes, num_classes = _load(cfg.images, image_size)
    pixels, labels, size = torch.from_numpy(images), torch.from_numpy(classes), images.shape[1]
    torch.manual_seed(cfg.seed)
    classifier = Classifier(size, num_classes).to(device)
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this argument
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=cfg.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, total_steps=cfg.steps)
    with progress("train classifier", cfg.steps, "step") as bar:
        for step in range(cfg.steps):
            generator = torch.Generator().manual_seed(rng.fold(cfg.seed, rng.Purpose.CLASSIFIER_BATCH, step))
            chosen = torch.randint(len(pixels), (cfg.batch_size,), generator=generator)
            # Random shifts, so that predictions do not depend on the position of the object.
            batch = F.pad(to_unit_range(pixels[chosen].to(device)), [_SHIFT] * 4)
            top, left = torch.randint(2 * _SHIFT + 1, (2,), generator=generator).tolist()
            batch = batch[:, :, top : top + size, left : left + size]
            loss = F.cross_entropy(classifier(batch), labels[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    path = Path(cfg.weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    classifier.save(path, settings)


def _load(folder: str, image_size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Images uint8 [n, S, S, 3], their class ids int64 [n], and the number of classes."""
    if shards := _shards_of_one_size(folder):
        images, labels = shards.load()
        return images, labels, len(shards.class_names)
    source = open_source(folder)
    source.say_notes()
    images, labels, skipped = load_labelled(source, image_size)
    for name, reason in skipped:
        say(f"skipped {name}: {reason}")
    return images, labels, int(labels.max()) + 1 if source.class_names is None else len(source.class_names)


def _shards_of_one_size(folder: str) -> ImageShards | None:
    """The image shards in a folder; None where it has no manifest of such, or one of images of several sizes."""
    if not (Path(folder) / "index.json").is_file() or read_image_index(folder)["image_size"] is None:
        return None
    return open_images(folder)


def _is_there(folder: str) -> bool:
    return Path(folder).is_dir() and any(Path(folder).iterdir())
