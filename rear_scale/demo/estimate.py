"""Estimates of the seconds that the stages of a demo take, from single steps of their work that are timed on this machine."""

# B images of a step

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from rear_scale.bench.model import best_s, random_model
from rear_scale.config import ExperimentConfig, Plan, derive
from rear_scale.evaluate.networks.base import for_inference
from rear_scale.evaluate.networks.classifier import Classifier
from rear_scale.evaluate.networks.efficientnet import INPUT_SIZE, EfficientNetLite0
from rear_scale.objective import Objective
from rear_scale.tokenizer.compact import CompactTokenizer

# Seconds of imports on two idle cores: of one process, of two that torchrun starts, and of two that deepspeed starts.
_START_OF_ONE, _START, _START_OF_TRAINING = 3.0, 6.0, 12.0
# Images of a timed step. With much fewer than in the work itself, the threads of a busy machine mostly wait for each other.
_TRAINED, _LOOKED_AT, _FEWEST = 64, 16, 8
_TOKENS = 2048  # of a timed step of the generator, as far as they make at least _FEWEST images
_TURNS = 2
_COMPUTED = 0.2  # seconds of computing in which the load is measured
# From the records of demos, as fractions of the time that a process takes to train reAR on an image:
_STEP = 1.15  # with the optimizer, and the sum of gradients where two processes train together
_PLAIN = 0.9  # the same of vanilla AR
_SAMPLED = 1.15  # an image that is sampled with guidance, token by token
_SCORED = 0.35  # a sequence whose tokens are predicted
_ENCODED = 0.15  # an image that is tokenized, as a fraction of an image of the tokenizer's training


@dataclass(frozen=True)
class Counts:
    """Images of a demo."""

    train: int
    val: int
    passes: int = 1  # over the image files, to prepare them


@dataclass(frozen=True)
class Rates:
    """Seconds of one process for an image, where as many processes as the demo starts share the machine."""

    read: float  # reading an image file and cropping it
    tokenizer: float  # training of the tokenizer, in one process that has the machine to itself
    generator: float  # training of reAR, forward and backward
    classifier: float  # training of the classifier
    features: float  # EfficientNet-Lite0
    load: float = 1.0  # seconds that pass in one second of computing: 1 on an idle machine


def measure(cfg: ExperimentConfig, processes: int, device: torch.device, read: float) -> Rates:
    """The rates on this machine with its present load, measured in a few seconds.

    cfg: of reAR. processes: those at a time, of one model or of several.
    """
    plan = derive(cfg, 1, None)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        with _threads(1):
            tokenizer = _tokenizer_s(cfg, device)
        with _threads(processes):
            generator = _generator_s(cfg, plan, device)
            rates = Rates(read, tokenizer, generator, _classifier_s(cfg, device), _features_s(device), _load())
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the processes of the stages
    return rates


def seconds(
    cfg: ExperimentConfig, processes: int, rates: Rates, counts: Counts, seeds: int, jobs: int
) -> dict[str, float]:
    """The estimates, by what the user reads. cfg: of reAR. processes: those at a time. jobs: models at a time."""
    evaluate, training = cfg.evaluate, cfg.tokenizer.training
    last_step = derive(cfg, processes // jobs, None).last_step
    assert training is not None
    assert evaluate.classifier is not None
    images = counts.train + counts.val
    cores = len(os.sched_getaffinity(0))
    one, two, trained = (rates.load * start for start in (_START_OF_ONE, _START, _START_OF_TRAINING))
    seen = seeds * last_step * cfg.train.global_batch_size * rates.generator * _STEP / processes
    sampled = cfg.sample.num_images
    classified = evaluate.classifier.steps * evaluate.classifier.batch_size * rates.classifier
    predicted = counts.val * (1 + evaluate.replace_draws) + counts.train
    encoded = images * rates.tokenizer * _ENCODED
    scored = predicted * rates.generator * _SCORED + sampled * rates.features
    return {
        "images as shards": counts.passes * one + (images + min(counts.val, counts.train)) * rates.read / cores,
        "tokenizer": one + training.steps * training.batch_size * rates.tokenizer,
        "token shards": 2 * two + encoded,
        "scores of the tokenizer and of real images": 2 * two + classified + 3 * counts.val * rates.features / processes,
        "training of vanilla AR and reAR": 2 * seeds * trained / jobs + (1 + _PLAIN) * seen,
        "samples of both": 2 * seeds * (two / jobs + sampled * rates.generator * _SAMPLED / processes),
        "scores of both": 2 * seeds * (two / jobs + scored / processes),
    }  # fmt: skip


def duration(seconds: float) -> str:
    """The text of a duration, such as "40 s" or "12 min"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def lines(seconds: dict[str, float]) -> list[str]:
    """The lines of the estimates for the user, with their sum."""
    total = sum(seconds.values())
    return [
        *(f"    {duration(part):>8}  {what}" for what, part in seconds.items()),
        f"    {duration(total):>8}  in all, as estimated from the speed of this machine now",
    ]


@contextmanager
def _threads(processes: int) -> Iterator[None]:
    """A context in which torch computes with the threads of one of several processes that share the cores."""
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load() -> float:
    """Seconds that pass in one second of computing. Other processes on the same cores make it more than 1."""
    started, computed = time.perf_counter(), time.process_time()
    while time.process_time() - computed < _COMPUTED:
        sum(range(1000))
    return max(1.0, (time.perf_counter() - started) / (time.process_time() - computed))


def _tokenizer_s(cfg: ExperimentConfig, device: torch.device) -> float:
    tokenizer = CompactTokenizer.untrained(cfg.tokenizer).to(device)
    pixels = torch.rand(_TRAINED, 3, *[cfg.tokenizer.image_size] * 2, device=device)

    def step() -> None:
        latents = tokenizer.latents(pixels)
        tokenizer.nearest(latents.detach())
        F.mse_loss(tokenizer.pixels(latents, len(pixels)), pixels).backward()

    return best_s(device, step, _TURNS) / len(pixels)


def _generator_s(cfg: ExperimentConfig, plan: Plan, device: torch.device) -> float:
    tokens = cfg.tokenizer
    count = max(_FEWEST, _TOKENS // tokens.num_tokens)
    codebook = torch.randn(tokens.codebook_size, tokens.codebook_dim)
    objective = Objective(cfg, plan, codebook.to(device), device)
    ids = torch.arange(count)
    batch = objective.micro_batch(
        torch.randint(tokens.codebook_size, (count, tokens.num_tokens)),
        ids % cfg.model.num_classes,
        ids,
        torch.zeros_like(ids),
    ).to(device)
    model = random_model(cfg, device, with_heads=True)
    task = objective.task(batch, 1)

    def step() -> None:
        total, _ = objective.loss(model(task.context, batch.classes, batch.class_index, task.order), task)
        total.backward()

    return best_s(device, step, _TURNS) / count


def _classifier_s(cfg: ExperimentConfig, device: torch.device) -> float:
    pixels = torch.rand(_TRAINED, 3, *[cfg.tokenizer.image_size] * 2, device=device)
    classifier = Classifier(cfg.tokenizer.image_size, cfg.model.num_classes).to(device)
    labels = torch.zeros(len(pixels), dtype=torch.long, device=device)

    def step() -> None:
        F.cross_entropy(classifier(pixels), labels).backward()

    return best_s(device, step, _TURNS) / len(pixels)


@torch.inference_mode()
def _features_s(device: torch.device) -> float:
    network = EfficientNetLite0()
    network.fold_norms()
    network = for_inference(network, device)
    pixels = torch.zeros(_LOOKED_AT, 3, INPUT_SIZE, INPUT_SIZE, dtype=torch.uint8, device=device)
    return best_s(device, lambda: network(pixels), _TURNS) / len(pixels)
