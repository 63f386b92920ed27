"""Images per second of sampling, decoding and feature extraction, each alone and overlapped as in launchers/evaluate.py.

python -m rear_scale.bench.gpu_evaluation --out FILE.json [--small]

Generator, tokenizer and Inception are initialized at random, so no weight files are needed; scores would be meaningless.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rear_scale import cli, config
from rear_scale.bench.gpu_runs import TINY
from rear_scale.bench.model import random_model, synchronize
from rear_scale.config import ExperimentConfig
from rear_scale.evaluate.images.image_set import Generation, ImageSet
from rear_scale.evaluate.networks.base import InceptionFeatures
from rear_scale.evaluate.networks.feature_cache import extract
from rear_scale.evaluate.networks.inception import Inception
from rear_scale.files import write_text_atomically
from rear_scale.sample.decode import Decoder
from rear_scale.sample.job import batches_of, decode_images, labels_of, make_tokens
from rear_scale.tokenizer import find_tokenizer, open_tokenizer
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.world import World, discover, joined

_SMALL = ("bench_cpu.yaml", *TINY, "sample.batch_size=1", "sample.num_images=2")
_LARGE = ("rear_s.yaml", "sample.batch_size=256", "sample.num_images=2048")


def measure(small: bool, folder: Path) -> dict[str, Any]:
    """The rates. Weights and features are written to `folder`."""
    name, *overrides = _SMALL if small else _LARGE
    cfg = config.load(name, overrides)
    cfg.tokenizer.weights = str(_write_tokenizer(cfg, folder))
    with joined(discover(), same_for_any_world=True) as world:
        return {**_rates(cfg, world, folder), "config": name, "overrides": overrides}


def _rates(cfg: ExperimentConfig, world: World, folder: Path) -> dict[str, Any]:
    device, batches = world.device, batches_of(cfg)
    decoder = Decoder(random_model(cfg, device, with_heads=False).eval(), cfg.sample, cfg.objective.permutation)
    tokenizer = open_tokenizer(cfg.tokenizer, device)
    inception = InceptionFeatures(str(_write_inception(folder)), device)
    batch = cfg.evaluate.batch_size

    def draw(numbers: np.ndarray) -> Tensor:
        return make_tokens(decoder, numbers, cfg, device)

    def decode(tokens: Tensor, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return decode_images(tokenizer, tokens, cfg)[: len(numbers)], labels_of(cfg, numbers)

    def read(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return decode(draw(numbers), numbers)

    tokens, first = draw(batches[0]), batches[0]
    draw(first)  # the second batch of a shape records CUDA graphs
    images, _ = decode(tokens, first)
    rates = {
        "generating": _rate(device, len(first), lambda: draw(first)),
        "decoding": _rate(device, len(first), lambda: decode(tokens, first)),
        "features": _rate(
            device, len(first), lambda: [inception(images[at : at + batch]) for at in range(0, len(images), batch)]
        ),
    }
    size = cfg.tokenizer.image_size
    samples = ImageSet("drawn", "drawn", size, size, batches, read, generation=Generation(draw, decode))
    together = _rate(device, cfg.sample.num_images, lambda: extract(samples, [inception], folder, batch, world), warm=0)
    return {"images_per_s": together, "alone": rates}


def _rate(device: torch.device, images: int, call: Callable[[], object], warm: int = 1) -> float:
    """Images per second of the call, after `warm` untimed calls."""
    for _ in range(warm):
        call()
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return images / (time.perf_counter() - started)


def _write_tokenizer(cfg: ExperimentConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer, path = find_tokenizer(cfg.tokenizer.name).untrained(cfg.tokenizer), folder / "tokenizer.safetensors"
    if isinstance(tokenizer, CompactTokenizer):
        tokenizer.save(path)
        return path
    torch.save(tokenizer.state_dict(), path.with_suffix(".bin"))
    return path.with_suffix(".bin")


def _write_inception(folder: Path) -> Path:
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # so that activations stay finite in all layers
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for any device")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(arguments.small, Path(folder))
    write_text_atomically(arguments.out, json.dumps(rates, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
