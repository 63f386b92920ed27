"""Who makes which image. Image i has label i mod C and its own random numbers, whatever the number of ranks.

Work is handed out in units of one batch, in class-major order, so that a batch has few classes. A finished unit is a
file; a killed job continues with the missing ones. The sample file is in image order.
"""

# B images of a unit, S side in pixels, N tokens of an image, C classes

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.interop.npz import write_samples
from rear_scale.model import Generator, build_model
from rear_scale.parallel.checkpoint import Checkpoint
from rear_scale.parallel.sources import load_generator_weights
from rear_scale.progress import progress, say
from rear_scale.sample.decode import Decoder
from rear_scale.sample.grid import contact_sheet
from rear_scale.sample.quantise import to_uint8
from rear_scale.shards.record import write_text_atomically
from rear_scale.tokenizer import TOKENS_ONLY, open_tokenizer, weights_sha256
from rear_scale.tokenizer.base import Tokenizer
from rear_scale.train.run_folder import provenance
from rear_scale.train.setup import codebook_of, read_checked
from rear_scale.world import World

_GRID_COLUMNS = 10
_GRID_ROWS = 10
_WRITE_BLOCK = 500  # images
_AS_TOKENS = " as token ids alone: the images of tokenizer.name={} are not decoded here"


def load_generator(cfg: ExperimentConfig, checkpoint: Checkpoint, device: torch.device) -> Generator:
    """The model of a checkpoint without heads, in eval mode, in the precision that it was trained in."""
    model = build_model(cfg, with_heads=False)
    load_generator_weights(checkpoint, model)
    if cfg.model.tie_codebook is not None:
        model.set_codebook(codebook_of(cfg, read_checked(cfg, cfg.data.train)))
    dtype = torch.bfloat16 if cfg.train.precision == "bf16" else torch.float32
    return model.to(device, dtype).eval().requires_grad_(False)


def default_output(cfg: ExperimentConfig, checkpoint: Checkpoint) -> Path:
    """Where the samples of a checkpoint go: one name for one set of settings."""
    identity = job_identity(cfg, checkpoint)
    return checkpoint.run / "samples" / f"step_{checkpoint.step:08d}_n{cfg.sample.num_images}_{identity[:8]}.npz"


def job_identity(cfg: ExperimentConfig, checkpoint: Checkpoint) -> str:
    """A hash of all that the images depend on: weights, tokenizer and sampling settings."""
    parts = {
        "weights": [item["sha256"] for item in checkpoint.meta["files"]],
        "tokenizer": weights_sha256(cfg.tokenizer),
        "sample": asdict(cfg.sample),
        "precision": cfg.train.precision,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_output(output: Path) -> None:
    """Raises InputError when samples cannot be written there."""
    if output.suffix != ".npz" or output.is_dir():
        raise InputError(
            f"--out {output} {'is a folder' if output.is_dir() else 'does not end in .npz'}, but the samples are one .npz with "
            f"other files beside it. Use --out {output / 'samples.npz' if output.is_dir() else output.with_suffix('.npz')}"
        )


def _check_tokenizer(cfg: ExperimentConfig, checkpoint: Checkpoint) -> None:
    made, given = checkpoint.meta.get("tokenizer_sha256") or "", weights_sha256(cfg.tokenizer)
    # Shards whose maker is not known have an empty or zero hash.
    if made.strip("0") and given is not None and given != made:
        raise InputError(
            f"tokenizer.weights={cfg.tokenizer.weights} has sha256 {given[:12]}, but {checkpoint.path} was trained on tokens of "
            f"a file with {made[:12]}: they stand for other images. Set tokenizer.weights to that file"
        )


def sample_images(cfg: ExperimentConfig, checkpoint: Checkpoint, world: World, output: Path) -> None:
    """Writes `output` (ADM .npz), its token ids (.tokens.npy), settings (.json) and a grid (.png).

    Only token ids and settings for a tokenizer whose images are not decoded here. All ranks must call this. Finished work
    of an earlier call with the same settings is kept. Raises InputError when another process writes there, and when the
    tokenizer is not the one whose tokens the model was trained on.
    """
    check_output(output)
    _check_tokenizer(cfg, checkpoint)
    tokenizer = None if cfg.tokenizer.name in TOKENS_ONLY else open_tokenizer(cfg.tokenizer, world.device)
    refusal = f"{output} is being written by another process. Wait for it, or write elsewhere with --out"
    with world.alone(output.with_name(f".{output.name}.lock"), refusal):
        _sample(cfg, checkpoint, world, output, tokenizer)


def _sample(
    cfg: ExperimentConfig, checkpoint: Checkpoint, world: World, output: Path, tokenizer: Tokenizer | None
) -> None:
    identity = job_identity(cfg, checkpoint)
    result = output if tokenizer else output.with_suffix(".tokens.npy")
    if is_done(output, identity, result):
        if world.is_main:
            say(f"{result} is complete")
        return
    finished = _images_file if tokenizer else _tokens_file
    parts = output.with_suffix(".parts") / identity[:16]
    parts.mkdir(parents=True, exist_ok=True)
    decoder = Decoder(load_generator(cfg, checkpoint, world.device), cfg.sample, cfg.objective.permutation)
    planned = units(cfg.sample.num_images, cfg.model.num_classes, cfg.sample.batch_size)
    missing = [number for number in range(len(planned)) if not finished(parts, number).exists()]
    # Before anyone adds files: all ranks must share out the same list.
    world.barrier()
    mine = missing[world.rank :: world.size]
    with progress("sample", len(missing) * cfg.sample.batch_size, "image", show=world.is_main) as bar:
        for number in mine:
            _make_unit(decoder, tokenizer, planned[number], cfg, world, parts, number)
            bar.update(min(world.size, len(missing)) * cfg.sample.batch_size)
    world.barrier()
    if world.is_main:
        _assemble(output, parts, planned, cfg, with_images=tokenizer is not None)
        _write_settings(output.with_suffix(".json"), cfg, checkpoint, identity, world)
        shutil.rmtree(output.with_suffix(".parts"))
        say(f"{result}: {cfg.sample.num_images:,} images{'' if tokenizer else _AS_TOKENS.format(cfg.tokenizer.name)}")
    world.barrier()


def units(num_images: int, num_classes: int, batch_size: int) -> list[np.ndarray]:
    """Image ids (int64 [at most batch_size]) of each unit, class by class."""
    ids = np.arange(num_images)
    ids = ids[np.argsort(ids % num_classes, kind="stable")]
    return [ids[start : start + batch_size] for start in range(0, num_images, batch_size)]


def make_tokens(decoder: Decoder, ids: np.ndarray, cfg: ExperimentConfig, device: torch.device) -> Tensor:
    """Token ids int64 [sample.batch_size, N] of the image ids of a unit, which come first.

    A short unit is filled up with copies of its last image: the arithmetic is that of a full batch.
    """
    full = np.concatenate([ids, np.full(cfg.sample.batch_size - len(ids), ids[-1])])
    on_device = torch.from_numpy(full).to(device)
    return decoder.generate(on_device % cfg.model.num_classes, on_device)


def make_images(
    decoder: Decoder, tokenizer: Tokenizer, ids: np.ndarray, cfg: ExperimentConfig, device: torch.device
) -> np.ndarray:
    """Images (uint8 [B, S, S, 3]) of the image ids of a unit."""
    return _decoded(tokenizer, make_tokens(decoder, ids, cfg, device), cfg)[: len(ids)]


def _decoded(tokenizer: Tokenizer, tokens: Tensor, cfg: ExperimentConfig) -> np.ndarray:
    with torch.inference_mode():
        return to_uint8(tokenizer.decode(tokens), cfg.sample.quantiser)


def _make_unit(
    decoder: Decoder,
    tokenizer: Tokenizer | None,
    ids: np.ndarray,
    cfg: ExperimentConfig,
    world: World,
    parts: Path,
    number: int,
) -> None:
    tokens = make_tokens(decoder, ids, cfg, world.device)
    _save(_tokens_file(parts, number), tokens[: len(ids)].cpu().numpy().astype(np.uint16))
    if tokenizer is None:
        return
    pixels = _decoded(tokenizer, tokens, cfg)[: len(ids)]
    _save(_images_file(parts, number), pixels)  # last: the unit is finished when it is there


def _assemble(output: Path, parts: Path, units: list[np.ndarray], cfg: ExperimentConfig, *, with_images: bool) -> None:
    count, size = cfg.sample.num_images, cfg.tokenizer.image_size
    tokens = np.empty((count, cfg.tokenizer.num_tokens), dtype=np.uint16)
    for number, ids in enumerate(units):
        tokens[ids] = np.load(_tokens_file(parts, number))
    _save(output.with_suffix(".tokens.npy"), tokens)
    if not with_images:
        return
    place = np.empty((count, 2), dtype=np.int64)  # image id -> unit, row
    for number, ids in enumerate(units):
        place[ids] = np.stack([np.full(len(ids), number), np.arange(len(ids))], axis=1)
    images = [np.load(_images_file(parts, number), mmap_mode="r") for number in range(len(units))]

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, count, _WRITE_BLOCK):
            yield np.stack([images[number][row] for number, row in place[start : start + _WRITE_BLOCK]])

    labels = np.arange(count) % cfg.model.num_classes
    columns = min(cfg.model.num_classes, _GRID_COLUMNS)
    first = np.stack([images[number][row] for number, row in place[: columns * _GRID_ROWS]])
    Image.fromarray(contact_sheet(first, columns)).save(output.with_suffix(".png"))
    write_samples(output, blocks(), count, size, labels)


def _write_settings(path: Path, cfg: ExperimentConfig, checkpoint: Checkpoint, identity: str, world: World) -> None:
    settings: dict[str, Any] = {
        "identity": identity,
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "sample": asdict(cfg.sample),
        "quantiser": cfg.sample.quantiser,
        "labels": "image id mod number of classes",
        **provenance(world),
    }
    write_text_atomically(path, json.dumps(settings, indent=1) + "\n")


def is_done(output: Path, identity: str, result: Path | None = None) -> bool:
    """Whether a job of that identity has written `result` (by default, output itself) and its settings."""
    result = result or output
    try:
        return result.exists() and json.loads(output.with_suffix(".json").read_text())["identity"] == identity
    except (OSError, json.JSONDecodeError, KeyError):
        return False


def _images_file(parts: Path, number: int) -> Path:
    return parts / f"unit_{number:06d}.images.npy"


def _tokens_file(parts: Path, number: int) -> Path:
    return parts / f"unit_{number:06d}.tokens.npy"


def _save(path: Path, values: np.ndarray) -> None:
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        np.save(file, values)
    part.replace(path)
