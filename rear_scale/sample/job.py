"""Sampling jobs: the distribution of images over ranks. Image i has label i mod C and its own random numbers, for any number
of ranks.

The job is divided into batches in class-major order, so that a batch has few classes. Each rank takes the next batch when it is
free, so that at the end the others wait for a slow rank for at most one batch. Each finished batch is a file. If a rank dies,
the launcher stops the job. Rerunning the same command generates only the missing batches. The sample file is in image order.
"""

# B images of a batch, S side in pixels, N tokens of an image, C classes

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rear_scale.checkpoint.average import KEY as AVERAGE
from rear_scale.checkpoint.folder import Checkpoint, step_name
from rear_scale.checkpoint.restore import load_generator_weights
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.config.renamed import downgraded
from rear_scale.files import write_text_atomically
from rear_scale.model import Generator, empty_model, meta_model
from rear_scale.progress import progress, say, say_once
from rear_scale.run.folder import provenance
from rear_scale.sample.compiled import compiles_steps
from rear_scale.sample.decode import NEAR_TIE, Decoder
from rear_scale.sample.decode_worker import DecodeWorker
from rear_scale.sample.files import (
    BatchFiles,
    assemble,
    check_space,
    remove_copies,
    remove_unfinished,
    write_copies,
    written_over,
)
from rear_scale.sample.uint8_rounding import to_uint8
from rear_scale.shards.codebook import class_note, codebook_of, is_packed, read_checked
from rear_scale.shards.record import Manifest
from rear_scale.tokenizer import TOKENS_ONLY, decoder_identity, open_tokenizer, weights_sha256
from rear_scale.tokenizer.base import Tokenizer
from rear_scale.untrusted import read_json
from rear_scale.world import World

_ALGORITHM = 1  # to be increased whenever equal weights and settings begin to give other images
# Settings of sampling that no image depends on. Compiled steps round differently, as another kind of GPU does, on which the
# identity does not depend either; but one job is made in one form.
_NOT_THE_IMAGES = ("also_write", "grid_every_images", "cuda_graphs", "compile")
_AS_TOKENS = " as token ids alone: the images of tokenizer.name={} are not decoded here"


def load_generator(
    cfg: ExperimentConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    with_heads: bool = False,
    codebook: Tensor | None = None,
) -> Generator:
    """The model of a checkpoint, in eval mode, in its training precision.

    with_heads: with the heads of the loss, which the checkpoint must have then; sampling needs none. codebook: float32 [K, Z]
    of a model that is tied to it; None = the one beside the training tokens.
    """
    # Allocated on the device directly: copies on the CPU, one per rank of a node, could exceed the host's memory.
    model = empty_model(cfg, device, _precision(cfg), with_heads=with_heads)
    load_generator_weights(checkpoint, model)
    codebook = _tied_codebook(cfg) if codebook is None else codebook
    if codebook is not None:
        model.set_codebook(codebook)
    return model.eval().requires_grad_(False)


def tied_identity(cfg: ExperimentConfig) -> dict[str, str]:
    """The hash of the codebook that a model's embeddings are tied to, under "codebook"; empty for other models."""
    codebook = _tied_codebook(cfg)
    return {} if codebook is None else {"codebook": hashlib.sha256(codebook.numpy().tobytes()).hexdigest()}


def _tied_codebook(cfg: ExperimentConfig) -> Tensor | None:
    """The codebook float32 [K, Z] of a model whose embeddings are tied to it; None for other models."""
    if cfg.model.tie_codebook is None:
        return None
    if cfg.data.train is None:
        raise InputError(
            f"data.train is not set, but model.tie_codebook={cfg.model.tie_codebook} needs the codebook beside the training "
            "tokens: a command or a URL in the config of downloaded weights is not used, for safety. Set data.train=FOLDER on "
            "the command line, or the same pipe: or URL"
        )
    return codebook_of(cfg, read_checked(cfg, cfg.data.train))


def default_output(cfg: ExperimentConfig, checkpoint: Checkpoint) -> Path:
    """The default path for samples of a checkpoint; other settings give another path."""
    identity = job_identity(cfg, checkpoint)
    return checkpoint.run / "samples" / f"{step_name(checkpoint.step)}_n{cfg.sample.num_images}_{identity[:8]}.npz"


def job_identity(cfg: ExperimentConfig, checkpoint: Checkpoint) -> str:
    """A hash of everything that the images depend on: weights, codebook, tokenizer, order and sampling settings."""
    permuted = cfg.objective.permutation
    sample = {name: value for name, value in asdict(cfg.sample).items() if name not in _NOT_THE_IMAGES}
    parts = {
        "algorithm": _ALGORITHM,
        "weights": [item["sha256"] for item in checkpoint.meta["files"]],
        "codebook": tied_identity(cfg).get("codebook"),
        "order": [cfg.sample.order or permuted.order, permuted.prefix],
        "tokenizer": decoder_identity(cfg.tokenizer),
        # Under the old names of fields, so that renaming one does not change the identity of samples made before.
        "sample": downgraded({"sample": sample})["sample"],
        "precision": cfg.train.precision,
    }
    if AVERAGE in checkpoint.meta:
        parts["average"] = checkpoint.meta[AVERAGE]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_output(output: Path) -> None:
    """Raises InputError when samples cannot be written to this path, or would replace files that no sampling job has written."""
    if output.suffix != ".npz" or output.is_dir():
        raise InputError(
            f"--out {output} {'is a folder' if output.is_dir() else 'does not end in .npz'}, but samples are written to one .npz "
            f"file and others beside it. Use --out {output / 'samples.npz' if output.is_dir() else output.with_suffix('.npz')}"
        )
    others = written_over(output)
    # Files of a sampling job are recognized by its intermediate files while it is unfinished, and by its settings after that.
    if others and "identity" not in _settings_of(output) and not output.with_suffix(".parts").is_dir():
        raise InputError(
            f"--out {output} would overwrite {others[0]}, which no sampling job has written. Choose another --out, or move that "
            "file"
        )


def say_untrained(cfg: ExperimentConfig, world: World) -> None:
    """Tells the user of classes that will be sampled although data.train, where it is here, has no images of them."""
    if not world.is_main or cfg.sample.labels is not None or not is_packed(cfg.data.train):
        return
    with suppress(InputError):  # sampling needs no shards
        if note := class_note(cfg, read_checked(cfg, cfg.data.train)):
            say_once(note)


def check_trained_on(cfg: ExperimentConfig, manifest: Manifest) -> None:
    """Raises InputError as `check_tokenizer` does, by the manifest of the training tokens, before a checkpoint exists."""
    check_tokenizer(cfg, Checkpoint(Path(cfg.run.dir), {"tokenizer_sha256": manifest.tokenizer_sha256}))


def check_tokenizer(cfg: ExperimentConfig, checkpoint: Checkpoint) -> None:
    """Raises InputError when tokenizer.weights is another file than the one whose tokens the checkpoint was trained on."""
    made, given = checkpoint.meta.get("tokenizer_sha256") or "", weights_sha256(cfg.tokenizer)
    # Shards made by an unknown tokenizer have an empty or zero hash.
    if made.strip("0") and given is not None and given != made:
        raise InputError(
            f"tokenizer.weights={cfg.tokenizer.weights} has sha256 {given[:12]}, but {checkpoint.path} was trained on tokens of "
            f"a file with sha256 {made[:12]}, and would decode to other images. Set tokenizer.weights to that file"
        )


@dataclass(frozen=True)
class _Job:
    """A sampling job, which writes one file of samples."""

    cfg: ExperimentConfig
    checkpoint: Checkpoint
    world: World
    output: Path
    tokenizer: Tokenizer | None  # None = its images are not decoded here
    identity: str
    compiled: bool = False  # whether decoding steps are compiled

    @property
    def result(self) -> Path:
        return self.output if self.tokenizer else self.output.with_suffix(".tokens.npy")

    @property
    def labels(self) -> np.ndarray:
        """The class ids of all images, int64 [n]."""
        return labels_of(self.cfg, np.arange(self.cfg.sample.num_images))

    @cached_property
    def batch_files(self) -> BatchFiles:
        # Compiled steps round differently, so a job that continues in the other form makes all batches again.
        name = self.identity[:16] + ("_compiled" if self.compiled else "")
        return BatchFiles(self.output.with_suffix(".parts") / name, with_images=self.tokenizer is not None)


def sample_images(cfg: ExperimentConfig, checkpoint: Checkpoint, world: World, output: Path) -> None:
    """Writes `output` (ADM .npz), its token ids (.tokens.npy), settings (.json) and a grid (.png).

    With sample.also_write, PNGs too. Only token ids and settings for a tokenizer whose images are not decoded here. All ranks
    must call this. Finished batches of an earlier call with the same settings are kept. Raises InputError when another process
    writes there, when there is too little disk space, when the tokenizer is not the one whose tokens the model was trained
    on, and when the ranks do not have the same checkpoint and settings.
    """
    check_output(output)
    check_tokenizer(cfg, checkpoint)
    say_untrained(cfg, world)
    identity = job_identity(cfg, checkpoint)
    _check_same_job(checkpoint, identity, world)
    tokenizer = None if cfg.tokenizer.name in TOKENS_ONLY else open_tokenizer(cfg.tokenizer, world.device)
    refusal = f"{output} is being written by another process. Wait for it, or write elsewhere with --out"
    with world.alone(output.with_name(f".{output.name}.lock"), refusal):
        _sample(_Job(cfg, checkpoint, world, output, tokenizer, identity))


def _check_same_job(checkpoint: Checkpoint, identity: str, world: World) -> None:
    """Raises InputError when ranks have different checkpoints or settings. Each rank finds the newest checkpoint by itself, and
    a training run may write one in between."""
    jobs = world.gather((identity, str(checkpoint.path)))
    other = next((rank for rank, (own, _) in enumerate(jobs) if own != jobs[0][0]), None)
    if other is not None:
        raise InputError(
            f"rank 0 would sample from {jobs[0][1]} and rank {other} from {jobs[other][1]}, or their settings differ: a "
            "training run may have written a checkpoint meanwhile. Choose one: --checkpoint RUN/checkpoints/step_XXXXXXXX"
        )


def _sample(job: _Job) -> None:
    cfg, world = job.cfg, job.world
    world.on_main(lambda: remove_unfinished(job.output))
    if is_done(job.output, job.identity, job.result):
        if world.is_main:
            for compiled in (False, True):  # left behind if the job was killed before it removed them
                replace(job, compiled=compiled).batch_files.remove()
            say(f"{job.result} is complete")
    else:
        _make(job)
        if world.is_main:
            as_tokens = "" if job.tokenizer else _AS_TOKENS.format(cfg.tokenizer.name)
            say(f"{job.result}: {cfg.sample.num_images:,} images{as_tokens}")
    world.barrier()
    if cfg.sample.also_write is not None and job.tokenizer is not None:
        write_copies(job.output, cfg.sample.also_write, job.labels, world)
        world.barrier()


def _make(job: _Job) -> None:
    cfg, world, planned = job.cfg, job.world, batches_of(job.cfg)
    job = replace(job, compiled=same_compile(cfg, world))
    missing = [number for number in range(len(planned)) if not job.batch_files.finished(number)]
    to_make = sum(len(planned[number]) for number in missing)
    if world.is_main and len(planned) < world.size:
        say(
            f"note: sample.batch_size={cfg.sample.batch_size} makes {len(planned)} batches for {world.size} ranks, so some ranks "
            f"are idle. With sample.batch_size={max(1, cfg.sample.num_images // world.size)} all ranks have work"
        )
    world.on_main(lambda: check_space(job.output, job.batch_files, to_make, cfg.sample.num_images, cfg.tokenizer))
    model = load_generator(cfg, job.checkpoint, world.device)
    decoder = Decoder(model, cfg.sample, cfg.objective.permutation, compiled=job.compiled)
    # All ranks use rank 0's list and take batches from it by a shared counter. Its random name is not used by any other job.
    missing, name = world.from_main((missing, secrets.token_hex(8)))
    with (
        progress("sample", to_make, "image", show=world.is_main) as bar,
        DecodeWorker(world.device) as worker,
    ):
        while (turn := world.add(f"{name}/turn") - 1) < len(missing):
            finish = partial(worker.run, partial(_finish_batch, job))
            _sample_batch(decoder, planned[missing[turn]], cfg, world, finish, missing[turn])
            done = world.add(f"{name}/images", len(planned[missing[turn]]))
            bar.update(done - bar.n)
    world.barrier()
    if world.is_main:
        # Delete the settings file and copies of any earlier job first, so that a crash here cannot leave one job's settings
        # beside another job's images.
        job.output.with_suffix(".json").unlink(missing_ok=True)
        remove_copies(job.output)
        assemble(job.output, job.batch_files, planned, job.labels, cfg.tokenizer.image_size)
        _write_settings(job, job.batch_files.near_ties(planned))
        job.batch_files.remove()


def same_compile(cfg: ExperimentConfig, world: World) -> bool:
    """Whether decoding steps are compiled: on all ranks, or on none if one of them cannot. All ranks must call this."""
    kind = type(meta_model(cfg, with_heads=False))
    return all(world.gather(compiles_steps(cfg.sample.compile, kind, world.device, _precision(cfg))))


def _precision(cfg: ExperimentConfig) -> torch.dtype:
    return torch.bfloat16 if cfg.train.precision == "bf16" else torch.float32


def labels_of(cfg: ExperimentConfig, ids: np.ndarray) -> np.ndarray:
    """Class ids (int64 [n]) of image ids (int64 [n]): i mod C, or the entries of sample.labels in turn."""
    given = cfg.sample.labels
    return ids % cfg.model.num_classes if given is None else np.array(given)[ids % len(given)]


def batches_of(cfg: ExperimentConfig) -> list[np.ndarray]:
    """The image ids of each batch (int64 [at most sample.batch_size]), sorted by class."""
    ids = np.arange(cfg.sample.num_images)
    ids = ids[np.argsort(labels_of(cfg, ids), kind="stable")]
    return [ids[start : start + cfg.sample.batch_size] for start in range(0, len(ids), cfg.sample.batch_size)]


def make_tokens(decoder: Decoder, ids: np.ndarray, cfg: ExperimentConfig, device: torch.device) -> Tensor:
    """Token ids int64 [sample.batch_size, N]; the first rows are those of the given image ids.

    A short batch is padded with copies of its last image, because another batch size may round differently.
    """
    full = np.concatenate([ids, np.full(cfg.sample.batch_size - len(ids), ids[-1])])
    labels = torch.from_numpy(labels_of(cfg, full)).to(device)
    return decoder.generate(labels, torch.from_numpy(full).to(device))


def make_images(
    decoder: Decoder, tokenizer: Tokenizer, ids: np.ndarray, cfg: ExperimentConfig, device: torch.device
) -> np.ndarray:
    """Images (uint8 [B, S, S, 3]) of the image ids of a batch."""
    return decode_images(tokenizer, make_tokens(decoder, ids, cfg, device), cfg)[: len(ids)]


def decode_images(tokenizer: Tokenizer, tokens: Tensor, cfg: ExperimentConfig) -> np.ndarray:
    """Images (uint8 [B, S, S, 3]) of token ids (int64 [B, N])."""
    with torch.inference_mode():
        return to_uint8(tokenizer.decode(tokens), cfg.sample.uint8_rounding)


def _sample_batch(
    decoder: Decoder,
    ids: np.ndarray,
    cfg: ExperimentConfig,
    world: World,
    finish: Callable[[int, Tensor, Tensor], None],
    number: int,
) -> None:
    tokens = make_tokens(decoder, ids, cfg, world.device)
    assert decoder.near_ties is not None
    assert decoder.within_rounding is not None
    finish(number, tokens, torch.stack((decoder.near_ties, decoder.within_rounding), 1)[: len(ids)])


def _finish_batch(job: _Job, number: int, tokens: Tensor, near_ties: Tensor) -> None:
    count = len(near_ties)
    # Decode the padded batch: another batch size may round differently.
    images = None if job.tokenizer is None else decode_images(job.tokenizer, tokens, job.cfg)[:count]
    job.batch_files.save(number, near_ties.cpu().numpy(), tokens[:count].cpu().numpy(), images)


def _write_settings(job: _Job, near_ties: np.ndarray) -> None:
    cfg = job.cfg
    settings: dict[str, Any] = {
        "identity": job.identity,
        "checkpoint": str(job.checkpoint.path),
        "step": job.checkpoint.step,
        **({AVERAGE: job.checkpoint.meta[AVERAGE]} if AVERAGE in job.checkpoint.meta else {}),
        "sample": asdict(cfg.sample),
        "uint8_rounding": cfg.sample.uint8_rounding,
        "compiled_steps": job.compiled,
        "labels": "image id mod number of classes" if cfg.sample.labels is None else "sample.labels in turn",
        # The number of tokens whose two best logits differ by less than this, or by less than the rounding error in this
        # precision. From such a token on, another batch size, device or precision may give other tokens.
        "near_ties": {"below": NEAR_TIE, **_counted(near_ties[:, 0])},
        "within_rounding": {"precision": cfg.train.precision, **_counted(near_ties[:, 1])},
        **provenance(job.world),
    }
    write_text_atomically(job.output.with_suffix(".json"), json.dumps(settings, indent=1) + "\n")


def _counted(tokens: np.ndarray) -> dict[str, int]:
    return {"tokens": int(tokens.sum()), "images": int((tokens > 0).sum())}


def is_done(output: Path, identity: str, result: Path | None = None) -> bool:
    """Whether a job of that identity has written `result` (by default `output`) and its settings file."""
    return (result or output).exists() and _settings_of(output).get("identity") == identity


def _settings_of(output: Path) -> dict[str, Any]:
    """The settings file beside `output`; empty when there is none, or a file that no sampling job has written."""
    try:
        settings = read_json(output.with_suffix(".json"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
