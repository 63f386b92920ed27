"""Image shards -> token shards, split over ranks. The bytes do not depend on the number of ranks or on interruptions."""

# B images, S side in pixels, N tokens of an image

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.progress import progress, say
from rear_scale.shards import writer
from rear_scale.shards.images import ImageShards, open_images
from rear_scale.shards.record import Manifest, file_sha256, read_manifest, write_manifest
from rear_scale.tokenizer import open_tokenizer
from rear_scale.tokenizer.base import Tokenizer, to_unit_range
from rear_scale.world import World


def check_pretokenize(cfg: ExperimentConfig) -> ImageShards:
    """Raises InputError when the job has no images, no output folder, or images of another size than the tokenizer's."""
    for name in ("images", "out"):
        if getattr(cfg.pretokenize, name) is None:
            raise InputError(f"pretokenize.{name} is not set. Set it to a folder: pretokenize.{name}=PATH")
    images = open_images(cfg.pretokenize.images)
    if images.image_size != cfg.tokenizer.image_size:
        raise InputError(
            f"tokenizer.image_size={cfg.tokenizer.image_size}, but the images in {images.folder} have {images.image_size} "
            "pixels. Prepare them at the tokenizer's size"
        )
    return images


def pretokenize(cfg: ExperimentConfig, images: ImageShards, world: World) -> None:
    """Writes the token shards of a set of images; finished shards of an earlier, killed run are kept.

    All ranks must call this. Rank r encodes shards r, r + W, ...; batches are fixed by sample index inside a shard.
    """
    out = Path(cfg.pretokenize.out)
    tokenizer = open_tokenizer(cfg.tokenizer, world.device)
    tokenizer_sha256 = file_sha256(cfg.tokenizer.weights)
    if _is_done(out, images, tokenizer_sha256):
        if world.is_main:
            say(f"{out} is complete")
        return
    out.mkdir(parents=True, exist_ok=True)
    finished = {}
    ranges = list(writer.shard_ranges(len(images)))
    mine = ranges[world.rank :: world.size]
    total = sum(end - start for _, start, end in mine)
    with progress(f"pretokenize {out}", total, "image", show=world.is_main) as bar:
        for index, start, end in mine:
            found = writer.finished_shard(out, index, source=tokenizer_sha256)
            if found is None:
                tokens, labels = _encode(tokenizer, images, start, end, cfg.pretokenize.batch_size, world, bar.update)
                found = writer.write_shard(out, index, tokens, labels, source=tokenizer_sha256), np.bincount(labels)
            finished[index] = found
    everything = {index: item for part in world.gather(finished) for index, item in part.items()}
    if world.is_main:
        _finish(out, cfg, images, tokenizer, tokenizer_sha256, [everything[index] for index, _, _ in ranges])
    world.barrier()


def _encode(
    tokenizer: Tokenizer, images: ImageShards, start: int, end: int, batch_size: int, world: World, advance
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int64 [end - start, N] and labels int64 [end - start]."""
    tokens, labels = [], []
    for pixels, classes in images.batches(batch_size, start, end):
        # A short batch is filled up: other shapes may take other kernels and round differently.
        filled = np.concatenate([pixels, np.zeros((batch_size - len(pixels), *pixels.shape[1:]), np.uint8)])
        with torch.inference_mode():
            ids = tokenizer.encode(to_unit_range(torch.from_numpy(filled).to(world.device)))
        tokens.append(ids[: len(pixels)].cpu().numpy())
        labels.append(classes)
        advance(len(pixels))
    return np.concatenate(tokens), np.concatenate(labels)


def _is_done(out: Path, images: ImageShards, tokenizer_sha256: str) -> bool:
    if not (out / "index.json").exists():
        return False
    manifest = read_manifest(out)
    if manifest.tokenizer_sha256 != tokenizer_sha256 or manifest.num_samples != len(images):
        raise InputError(
            f"pretokenize.out={out} already holds {manifest.num_samples} samples made by tokenizer weights "
            f"{manifest.tokenizer_sha256[:12]}, not {len(images)} by {tokenizer_sha256[:12]}. Remove it or set another folder"
        )
    return True


def _finish(
    out: Path, cfg: ExperimentConfig, images: ImageShards, tokenizer: Tokenizer, tokenizer_sha256: str, shards: list
) -> None:
    codebook = tokenizer.codebook.float().cpu().numpy()
    np.save(out / "codebook.npy", codebook)
    label_counts = np.zeros(len(images.class_names), dtype=np.int64)
    for _, counts in shards:
        label_counts[: len(counts)] += counts
    write_manifest(
        out,
        Manifest(
            tokenizer=tokenizer.name,
            tokenizer_sha256=tokenizer_sha256,
            codebook_size=codebook.shape[0],
            codebook_dim=codebook.shape[1],
            num_tokens=tokenizer.num_tokens,
            num_samples=len(images),
            crops_per_image=1,
            label_counts=label_counts.tolist(),
            class_names=images.class_names,
            codebook_sha256=file_sha256(out / "codebook.npy"),
            shards=[shard for shard, _ in shards],
        ),
    )
    writer.remove_records(out)
    say(f"{out}: {len(images):,} sequences of {tokenizer.num_tokens} tokens in {len(shards)} shards")
