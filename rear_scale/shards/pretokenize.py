"""Making of token shards from images, split over ranks. Their bytes depend neither on the number of ranks nor on restarts."""

# B crops of an encode batch, S side in pixels, N tokens of an image

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rear_scale.config import ExperimentConfig, InputError, PretokenizeConfig, all_checks, required_path
from rear_scale.files import file_sha256, write_array_atomically
from rear_scale.progress import progress, say
from rear_scale.shards import writer
from rear_scale.shards.crops import CROPS, BadImage, cut
from rear_scale.shards.inputs import Inputs, check_same_inputs, fingerprint
from rear_scale.shards.record import Manifest, read_manifest, write_manifest
from rear_scale.shards.sources import ImageSource, SourceImage, check_size, open_source
from rear_scale.tokenizer import check_weights, open_tokenizer
from rear_scale.tokenizer.base import Tokenizer, to_unit_range
from rear_scale.weight_file import find_weights
from rear_scale.world import World, discover

# One image: its crops (uint8 [n, S, S, 3]), or the reason why it cannot be decoded.
Prepared = tuple[SourceImage, np.ndarray | str]


def check_pretokenize(cfg: ExperimentConfig) -> ImageSource:
    """The images of a job. Raises InputError without images or output folder, and for images of another size than the
    tokenizer's.
    """
    images = cfg.pretokenize.images
    all_checks(
        lambda: required_path(images, "pretokenize.images"),
        lambda: required_path(cfg.pretokenize.out, "pretokenize.out"),
        lambda: _check_images(images),
        lambda: check_weights(cfg.tokenizer),
    )
    source = open_source(required_path(images, "pretokenize.images"), cfg.pretokenize.class_map)
    if discover().rank == 0:
        source.say_notes()
    check_size(source, cfg.tokenizer.image_size)
    return source


def _check_images(folder: str | None) -> None:
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"not found: pretokenize.images={folder}. It is a folder of class folders, or of tar shards")


def pretokenize(cfg: ExperimentConfig, source: ImageSource, world: World) -> None:
    """Writes the token shards of a set of images. Keeps finished shards of an earlier, killed run.

    All ranks must call this. Rank r encodes shards r, r + W, ...; batches are fixed by sample index inside a shard.
    Images that cannot be decoded are skipped, counted and listed in skipped.txt. Raises InputError when they are more than
    pretokenize.max_bad_fraction, and when the folder holds tokens made from other inputs.
    """
    job, out = cfg.pretokenize, Path(required_path(cfg.pretokenize.out, "pretokenize.out"))
    tokenizer = open_tokenizer(cfg.tokenizer, world.device)
    weights_sha256 = file_sha256(find_weights(required_path(cfg.tokenizer.weights, "tokenizer.weights")))
    made_from = _made_from(cfg, source, weights_sha256)
    # The times of files may differ between copies on several nodes, so those that rank 0 sees are recorded.
    inputs: Inputs = world.from_main(_inputs(cfg, source, weights_sha256))
    if len(set(world.gather(made_from))) > 1:
        raise InputError(
            f"the ranks see different images in {source.folder}, weights or settings. Wait until all files are there, and give "
            "every node the same"
        )
    if _is_done(out, made_from, inputs):
        if world.is_main:
            writer.remove_records(out)  # left by a kill after the manifest was written
            say(f"{out} is complete")
        return
    out.mkdir(parents=True, exist_ok=True)
    encode = _encoder(tokenizer, job, world)
    ranges = list(writer.shard_ranges(len(source), job.samples_per_shard // CROPS[job.crops]))
    mine = ranges[world.rank :: world.size]
    finished = {}
    total = sum(end - start for _, start, end in mine)
    with progress(f"pretokenize {out}", total, "image", show=world.is_main) as bar:
        for index, start, end in mine:
            shard = writer.finished_shard(out, index, source=fingerprint(inputs))
            if shard is None:
                images = _prepared(source, start, end, cfg.tokenizer.image_size, job)
                made = fingerprint(inputs)
                shard = _make_shard(out, index, images, encode, tokenizer.num_tokens, job, made, bar.update)
            else:
                bar.total -= end - start  # so that the bar shows the rate of this run alone
            finished[index] = shard
    by_index = {index: shard for of_rank in world.gather(finished) for index, shard in of_rank.items()}
    shards = [by_index[index] for index, _, _ in ranges]
    skipped = [entry for shard in shards for entry in shard.skipped]
    if world.is_main:
        writer.write_skipped(out, skipped)
    writer.check_skipped(
        skipped, len(source), job.max_bad_fraction, source.folder, out / "skipped.txt", "pretokenize.max_bad_fraction"
    )
    if world.is_main:
        _finish(out, cfg, source, tokenizer, weights_sha256, made_from, inputs, shards)
    world.barrier()


def _make_shard(
    out: Path,
    index: int,
    images: Iterator[Prepared],
    encode: Callable[[np.ndarray], np.ndarray],
    num_tokens: int,
    job: PretokenizeConfig,
    made_from: str,
    advance: Callable[[int], object],
) -> writer.FinishedShard:
    tokens: list[np.ndarray] = [np.empty((0, num_tokens), np.int64)]
    labels: list[int] = []
    skipped: list[tuple[str, str]] = []
    waiting: list[np.ndarray] = []  # crops for the next batch

    def flush(least: int) -> None:
        while len(waiting) >= least and waiting:
            tokens.append(encode(np.stack(waiting[: job.batch_size])))
            del waiting[: job.batch_size]

    for image, crops in images:
        if isinstance(crops, str):
            skipped.append((image.name, crops))
        else:
            waiting += list(crops)
            labels += [image.label] * len(crops)
            flush(job.batch_size)
        advance(1)
    flush(1)
    shard = writer.write_shard(
        out,
        index,
        np.concatenate(tokens),
        np.array(labels, dtype=np.int64),
        source=made_from,
        samples_per_shard=job.samples_per_shard,
        skipped=skipped,
    )
    return writer.FinishedShard(shard, np.bincount(np.array(labels, dtype=np.int64)), skipped)


def _encoder(tokenizer: Tokenizer, job: PretokenizeConfig, world: World) -> Callable[[np.ndarray], np.ndarray]:
    """The function from at most B crops (uint8 [n, S, S, 3]) to their token ids, int64 [n, N]."""
    encode: Callable[[Tensor], Tensor] = torch.compile(tokenizer.encode) if job.compile else tokenizer.encode
    if job.precision == "fp32":
        # By default cuDNN computes convolutions in TensorFloat-32, whose error changes codes.
        torch.backends.cudnn.allow_tf32 = False
    in_bf16 = job.precision == "bf16"

    def run(crops: np.ndarray) -> np.ndarray:
        # Pad a short batch: another shape may select other kernels, which round differently.
        filled = np.concatenate([crops, np.zeros((job.batch_size - len(crops), *crops.shape[1:]), np.uint8)])
        images = to_unit_range(torch.from_numpy(filled).to(world.device)).contiguous()
        precision = torch.autocast(world.device.type, torch.bfloat16) if in_bf16 else nullcontext()
        with torch.inference_mode(), precision:
            return encode(images)[: len(crops)].cpu().numpy()

    return run


def _prepared(source: ImageSource, start: int, end: int, image_size: int, job: PretokenizeConfig) -> Iterator[Prepared]:
    """Yields images start .. end - 1 in order with their crops, decoded in threads ahead of the encoder."""

    def prepare(image: SourceImage) -> np.ndarray | str:
        try:
            return cut(image.decode(job.exif), image_size, job.crops)
        except BadImage as error:
            return str(error)

    threads = max(1, min(8, len(os.sched_getaffinity(0))))
    # Enough images in advance for the next batch, while the encoder works on this one.
    most = max(4 * threads, 2 * job.batch_size // CROPS[job.crops])
    ahead: deque[tuple[SourceImage, Future[np.ndarray | str]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for image in source.read(start, end):
            ahead.append((image, pool.submit(prepare, image)))
            if len(ahead) >= most:
                first, future = ahead.popleft()
                yield first, future.result()
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result()


def _made_from(cfg: ExperimentConfig, source: ImageSource, weights_sha256: str) -> str:
    """A hash of the images, weights and settings that the tokens depend on, whatever the folder of the images."""
    job = cfg.pretokenize
    settings = [job.crops, job.precision, job.compile, job.batch_size, job.samples_per_shard, cfg.tokenizer.image_size]
    exif = [] if job.exif == "ignore" else [job.exif]  # the default keeps the hash of versions without this setting
    text = json.dumps([source.fingerprint, weights_sha256, cfg.tokenizer.name, *settings, *exif])
    return hashlib.sha256(text.encode()).hexdigest()


def _inputs(cfg: ExperimentConfig, source: ImageSource, weights_sha256: str) -> Inputs:
    """The inputs of the job, for the comparison with those of a finished output."""
    names = ("crops", "precision", "compile", "batch_size", "samples_per_shard", "exif")
    return {
        **source.inputs,
        "tokenizer.name": cfg.tokenizer.name,
        "tokenizer.image_size": cfg.tokenizer.image_size,
        "tokenizer.weights": f"sha256 {weights_sha256[:16]}",
        **{f"pretokenize.{name}": getattr(cfg.pretokenize, name) for name in names},
    }


def _is_done(out: Path, made_from: str, inputs: Inputs) -> bool:
    if not (out / "index.json").exists():
        return False
    manifest = read_manifest(out)
    # Manifests of earlier versions have only a hash of names and sizes.
    if manifest.inputs is not None or manifest.made_from != made_from:
        check_same_inputs(manifest.inputs, inputs, out, "pretokenize.out")
    return True


def _finish(
    out: Path,
    cfg: ExperimentConfig,
    source: ImageSource,
    tokenizer: Tokenizer,
    weights_sha256: str,
    made_from: str,
    inputs: Inputs,
    shards: list[writer.FinishedShard],
) -> None:
    codebook = tokenizer.codebook.float().cpu().numpy()
    write_array_atomically(out / "codebook.npy", codebook)
    classes = len(source.class_names) if source.class_names else max(len(shard.label_counts) for shard in shards)
    label_counts = np.zeros(max(classes, *(len(shard.label_counts) for shard in shards)), dtype=np.int64)
    for shard in shards:
        label_counts[: len(shard.label_counts)] += shard.label_counts
    names = source.class_names or []
    manifest = Manifest(
        tokenizer=tokenizer.name,
        tokenizer_sha256=weights_sha256,
        codebook_size=codebook.shape[0],
        codebook_dim=codebook.shape[1],
        num_tokens=tokenizer.num_tokens,
        num_samples=int(label_counts.sum()),
        crops_per_image=CROPS[cfg.pretokenize.crops],
        label_counts=label_counts.tolist(),
        class_names=[*names, *(str(number) for number in range(len(names), len(label_counts)))],
        codebook_sha256=file_sha256(out / "codebook.npy"),
        shards=[shard.shard for shard in shards],
        crops=cfg.pretokenize.crops,
        samples_per_shard=cfg.pretokenize.samples_per_shard,
        num_skipped=sum(len(shard.skipped) for shard in shards),
        made_from=made_from,
        inputs=inputs,
    )
    write_manifest(out, manifest)
    writer.remove_records(out)
    left_out = f"; {manifest.num_skipped} images could not be read, see {out / 'skipped.txt'}" * (
        manifest.num_skipped > 0
    )
    say(
        f"{out}: {manifest.num_samples:,} sequences of {tokenizer.num_tokens} tokens from {manifest.num_images:,} images in "
        f"{len(shards)} shards{left_out}"
    )
