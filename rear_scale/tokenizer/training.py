"""Trains the compact tokenizer on images in memory. Killed at any point, the same call continues."""

# B images, S side in pixels

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rear_scale import rng
from rear_scale.config import InputError, TokenizerConfig, TokenizerTrainingConfig
from rear_scale.progress import progress
from rear_scale.tokenizer.base import to_unit_range
from rear_scale.tokenizer.compact import CodeTracker, CompactTokenizer, build

_SAVE_EVERY = 100  # steps


def train_compact(cfg: TokenizerConfig, images: np.ndarray, device: torch.device) -> CompactTokenizer:
    """Trains on images (uint8 [n, S, S, 3]) and writes `cfg.weights`; progress lies beside it until it is complete.

    Continuous autoencoder first, then k-means places the codes, then straight-through VQ with a commitment term.
    Raises InputError for images of another size.
    """
    assert cfg.training is not None
    assert cfg.weights is not None
    training, path = cfg.training, Path(cfg.weights)
    if images.shape[1:] != (cfg.image_size, cfg.image_size, 3):
        raise InputError(
            f"tokenizer.image_size={cfg.image_size}, but the images are {images.shape[2]}x{images.shape[1]}. Set it to their size"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    run = _TrainingRun(cfg, training, device)
    progress_file = path.with_name(f"{path.name}.training")
    run.resume(progress_file)
    pixels = torch.from_numpy(images)
    with progress("train tokenizer", training.steps, "step", done=run.step) as bar:
        while run.step < training.steps:
            loss = run.train_step(pixels)
            bar.set_postfix(mse=f"{loss:.5f}", refresh=False)
            bar.update()
            if run.step % _SAVE_EVERY == 0:
                run.save(progress_file)
    tokenizer = run.tokenizer.eval()
    tokenizer.save(path)
    progress_file.unlink(missing_ok=True)
    return tokenizer


class _TrainingRun:
    """All state of the training: everything else is a function of the config and the step."""

    def __init__(self, cfg: TokenizerConfig, training: TokenizerTrainingConfig, device: torch.device) -> None:
        torch.manual_seed(training.seed)
        self.training, self.device = training, device
        self.identity = repr(asdict(cfg))
        self.tokenizer = build(cfg).to(device)
        self.tracker = CodeTracker(self.tokenizer, training.ema_decay, training.restart_below)
        self.optimizer = torch.optim.Adam(self.tokenizer.parameters(), lr=training.lr, betas=(0.9, 0.99))
        self.step = 0

    def train_step(self, pixels: Tensor) -> float:
        """One update on the step's own batch of pixels (uint8 [n, S, S, 3]). Returns the mean squared error."""
        training, tokenizer = self.training, self.tokenizer
        generator = torch.Generator().manual_seed(rng.fold(training.seed, rng.Purpose.TOKENIZER_BATCH, self.step))
        if self.step == training.continuous_steps:
            self._place_codes(pixels, generator)
        images = self._images(pixels, torch.randint(len(pixels), (training.batch_size,), generator=generator))
        latents = tokenizer.latents(images)
        commitment = torch.zeros((), device=self.device)
        quantised = latents
        if self.step >= training.continuous_steps:
            ids = tokenizer.nearest(latents.detach())
            codes = tokenizer.codes[ids]
            commitment = F.mse_loss(latents, codes)
            quantised = latents + (codes - latents).detach()
            self.tracker.update(latents.detach(), ids, generator)
        error = F.mse_loss(tokenizer.pixels(quantised, len(images)), images)
        for group in self.optimizer.param_groups:
            # Down to a tenth of the rate over the run, so that the codes settle.
            group["lr"] = training.lr * (1 - 0.9 * self.step / training.steps)
        self.optimizer.zero_grad()
        (error + training.commitment * commitment).backward()
        self.optimizer.step()
        self.step += 1
        return error.item()

    @torch.no_grad()
    def _place_codes(self, pixels: Tensor, generator: torch.Generator) -> None:
        chosen = torch.randint(len(pixels), (min(len(pixels), 512),), generator=generator)
        self.tracker.place(self.tokenizer.latents(self._images(pixels, chosen)), generator)

    def _images(self, pixels: Tensor, chosen: Tensor) -> Tensor:
        return to_unit_range(pixels[chosen].to(self.device))

    def save(self, path: Path) -> None:
        part = path.with_name(f"{path.name}.part")
        state = {
            "identity": self.identity,
            "step": self.step,
            "tokenizer": self.tokenizer.state_dict(),
            "tracker": self.tracker.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, part)
        part.replace(path)

    def resume(self, path: Path) -> None:
        """Takes up the progress of an earlier call with the same config, if there is any."""
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        if state["identity"] != self.identity:
            return
        self.step = state["step"]
        self.tokenizer.load_state_dict(state["tokenizer"])
        self.tracker.load_state_dict(state["tracker"])
        self.optimizer.load_state_dict(state["optimizer"])
