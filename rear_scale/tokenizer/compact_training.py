"""Training of the compact tokenizer on images in memory. A killed training continues with the same call."""

# B images, S side in pixels

from __future__ import annotations

import glob
import hashlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rear_scale import rng
from rear_scale.config import InputError, TokenizerConfig, TokenizerTrainingConfig, required_path
from rear_scale.config.values import leaves
from rear_scale.files import atomic_open, remove_leftovers
from rear_scale.progress import progress
from rear_scale.tokenizer.base import Tokenizer, to_unit_range
from rear_scale.tokenizer.compact import CodeTracker, CompactTokenizer, build
from rear_scale.weight_file import read_training

_SAVE_EVERY = 100  # steps


def train_compact(cfg: TokenizerConfig, images: np.ndarray, device: torch.device) -> CompactTokenizer:
    """The tokenizer trained on images (uint8 [n, S, S, 3]), which is also written to `cfg.weights`.

    Trains a continuous autoencoder first, then initializes the codes by k-means, then trains straight-through VQ with a
    commitment term. A progress file beside the weights is kept until they are complete. Raises InputError for images of
    another size, and FloatingPointError, with no weights written, when the training diverges.
    """
    assert cfg.training is not None
    assert cfg.weights is not None
    training, path = cfg.training, Path(cfg.weights)
    if images.shape[1:] != (cfg.image_size, cfg.image_size, 3):
        raise InputError(
            f"tokenizer.image_size={cfg.image_size}, but the images are {images.shape[2]}x{images.shape[1]}. Set it to their size"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = training_settings(cfg, images)
    run = _TrainingRun(cfg, training, device, settings)
    progress_file = _progress_file(path)
    run.resume(progress_file)
    pixels = torch.from_numpy(images)
    with progress("train tokenizer", training.steps, "step", done=run.step) as bar:
        while run.step < training.steps:
            loss = run.train_step(pixels)
            if not math.isfinite(loss):
                raise run.diverged(f"the mean squared error is {loss}")
            bar.set_postfix(mse=f"{loss:.5f}", refresh=False)
            bar.update()
            if run.step % _SAVE_EVERY == 0:
                run.save(progress_file)
    run.check_finite()
    tokenizer = run.tokenizer.eval()
    tokenizer.save(path, settings)
    remove_progress(path)
    return tokenizer


@torch.inference_mode()
def quality(tokenizer: Tokenizer, images: np.ndarray, most: int = 512) -> str:
    """A sentence with PSNR and codebook use on at most `most` of the images (uint8 [n, S, S, 3]), evenly spaced."""
    chosen = torch.from_numpy(images[np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).astype(int))])
    ratios: list[float] = []
    used: set[int] = set()
    for pixels in chosen.split(64):
        originals = to_unit_range(pixels.to(tokenizer.codebook.device))
        ids = tokenizer.encode(originals)
        errors = (tokenizer.decode(ids).float() - originals).square().flatten(1).mean(1)
        ratios += (-10 * errors.clamp(min=1e-10).log10()).tolist()
        used.update(ids.unique().tolist())
    return (
        f"PSNR {sum(ratios) / len(ratios):.2f} dB on {len(chosen)} training images, {len(used)} of {tokenizer.codebook_size} "
        "codes used"
    )


def remove_progress(path: Path) -> None:
    """Removes the progress file and temporary files of a tokenizer's weights. The caller must have locked the weights."""
    _progress_file(path).unlink(missing_ok=True)
    remove_leftovers(path.parent, *(glob.escape(file.name) for file in (path, _progress_file(path))))


def _progress_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.training")


def training_settings(cfg: TokenizerConfig, images: np.ndarray) -> dict[str, Any]:
    """All that the weights depend on, by config key: the settings, and a hash of the images (uint8 [n, S, S, 3])."""
    settings = {f"tokenizer.{name}": value for name, value in leaves(asdict(cfg)).items()}
    for name in ("weights", "grid", "prefix_tokens"):  # the grid follows from the others
        settings.pop(f"tokenizer.{name}")
    settings["tokenizer.training.images"] = hashlib.sha256(images.tobytes()).hexdigest()[:16]
    return settings


def check_same_training(cfg: TokenizerConfig, images: np.ndarray) -> None:
    """Raises InputError when the weight file of a config exists but was trained with other settings or images.

    A file without a record of its training is accepted.
    """
    before = read_training(required_path(cfg.weights, "tokenizer.weights"))
    for key, value in training_settings(cfg, images).items():
        if key in before and before[key] != value:
            prefix = "images of " if key.endswith(".images") else ""
            raise InputError(
                f"{key}={value}, but {cfg.weights} was trained with {prefix}{key}={before[key]}. "
                "Set it back, name another tokenizer.weights, or remove the file to train anew"
            )


class _TrainingRun:
    """The state of a training; everything else is a function of the settings and the step."""

    def __init__(
        self, cfg: TokenizerConfig, training: TokenizerTrainingConfig, device: torch.device, settings: dict[str, Any]
    ) -> None:
        torch.manual_seed(training.seed)
        self.training, self.device = training, device
        self.settings = settings
        self.tokenizer = build(cfg).to(device)
        self.tracker = CodeTracker(self.tokenizer, training.ema_decay, training.restart_below)
        self.optimizer = torch.optim.Adam(self.tokenizer.parameters(), lr=training.lr, betas=(0.9, 0.99))
        self.step = 0

    def train_step(self, pixels: Tensor) -> float:
        """One update on the step's own batch of pixels (uint8 [n, S, S, 3]). Returns the mean squared error."""
        training, tokenizer = self.training, self.tokenizer
        generator = torch.Generator().manual_seed(rng.fold(training.seed, rng.Purpose.TOKENIZER_BATCH, self.step))
        if self.step == training.continuous_steps:
            self._initialize_codes(pixels, generator)
        images = self._images(pixels, torch.randint(len(pixels), (training.batch_size,), generator=generator))
        latents = tokenizer.latents(images)
        commitment = torch.zeros((), device=self.device)
        quantized = latents
        if self.step >= training.continuous_steps:
            ids = tokenizer.nearest(latents.detach())
            codes = tokenizer.codes[ids]
            commitment = F.mse_loss(latents, codes)
            quantized = latents + (codes - latents).detach()
            self.tracker.update(latents.detach(), ids, generator)
        error = F.mse_loss(tokenizer.pixels(quantized, len(images)), images)
        for group in self.optimizer.param_groups:
            # The learning rate decays to a tenth over the run, so that the codes converge.
            group["lr"] = training.lr * (1 - 0.9 * self.step / training.steps)
        self.optimizer.zero_grad()
        (error + training.commitment * commitment).backward()
        self.optimizer.step()
        self.step += 1
        return error.item()

    @torch.no_grad()
    def _initialize_codes(self, pixels: Tensor, generator: torch.Generator) -> None:
        chosen = torch.randint(len(pixels), (min(len(pixels), 512),), generator=generator)
        self.tracker.initialize(self.tokenizer.latents(self._images(pixels, chosen)), generator)

    def _images(self, pixels: Tensor, chosen: Tensor) -> Tensor:
        return to_unit_range(pixels[chosen].to(self.device))

    def check_finite(self) -> None:
        """Raises FloatingPointError for a weight that is not finite, which the loss before the last update does not show."""
        if not all(value.isfinite().all() for value in self.tokenizer.state_dict().values()):
            raise self.diverged("a weight is not finite")

    def diverged(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"tokenizer training, step {self.step}: {what}. No weights were written. "
            f"Lower tokenizer.training.lr={self.training.lr}"
        )

    def save(self, path: Path) -> None:
        self.check_finite()
        state = {
            "settings": self.settings,
            "step": self.step,
            "tokenizer": self.tokenizer.state_dict(),
            "tracker": self.tracker.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_open(path) as file:
            torch.save(state, file)

    def resume(self, path: Path) -> None:
        """Loads the progress of an earlier call with the same settings, if there is any."""
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        if state.get("settings") != self.settings:
            return
        self.step = state["step"]
        self.tokenizer.load_state_dict(state["tokenizer"])
        self.tracker.load_state_dict(state["tracker"])
        self.optimizer.load_state_dict(state["optimizer"])
