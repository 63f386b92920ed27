"""Images per second of sampling, beside the plain samplers of tests/reference, interleaved in one process.

python launchers/bench.py sample --config bench_cpu.yaml
python launchers/bench.py sample --config rear_l.yaml tokenizer.weights=FILE      # decoding included
python launchers/bench.py sample --config rar_b.yaml --protocol rar_table5
"""

# B images of a batch, N tokens of an image

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rear_scale import config
from rear_scale.bench import reference
from rear_scale.bench.ceilings import product_flops_per_s, read_bytes_per_s
from rear_scale.bench.model import drawn_model, synchronize, use_device
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.model.flops import decode_step_cost
from rear_scale.progress import progress
from rear_scale.sample.decode import Decoder
from rear_scale.tokenizer import open_tokenizer

# How the papers measured: images of a batch, precision, images decoded or not.
_PROTOCOLS = {"rar_table5": (128, "fp32", True), "rear_fig5": (128, "bf16", True)}
_UNCACHED_BATCH = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="bench_cpu.yaml", metavar="NAME.yaml", help="default: bench_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant; medians count (default: 5)")
    parser.add_argument("--classes", type=int, help="distinct classes of a batch (default: as many as images)")
    parser.add_argument(
        "--protocol",
        choices=_PROTOCOLS,
        help="batch and precision of RAR's Table 5 or reAR's Figure 5, decoding included",
    )
    parser.add_argument("--uncached", action="store_true", help="time the sampler without a cache too, on 4 images")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates of our sampler with distinct classes and with one class, and of the plain cached one."""
    cfg = config.load(arguments.config, arguments.overrides)
    if arguments.rounds < 1:
        raise InputError(f"--rounds {arguments.rounds} measures nothing. Use 1 at least")
    if arguments.classes is not None and not 1 <= arguments.classes <= cfg.model.num_classes:
        raise InputError(
            f"--classes {arguments.classes} must lie in 1 .. {cfg.model.num_classes}, the config's model.num_classes. "
            "Leave it out for as many as images"
        )
    if arguments.protocol:
        cfg.sample.batch_size, cfg.train.precision, decodes = _PROTOCOLS[arguments.protocol]
        if decodes and cfg.tokenizer.weights is None:
            raise InputError(
                f"--protocol {arguments.protocol} includes decoding, but tokenizer.weights is not set. Set it to the file's path"
            )
    compared = cfg.model.architecture == "rar" and cfg.model.conditioning == "adaln" and cfg.model.tie_codebook is None
    if arguments.uncached and not compared:
        raise InputError(
            f"--config {arguments.config} with --uncached: the plain sampler is written for RAR's transformer with AdaLN. "
            "Leave --uncached out, or use such a config"
        )
    device = use_device()
    model = drawn_model(cfg, device, with_heads=False).eval()
    B, N = cfg.sample.batch_size, cfg.tokenizer.num_tokens
    decoder = Decoder(model, cfg.sample, cfg.objective.permutation)
    ids = torch.arange(B, device=device)
    distinct = ids % (arguments.classes or min(B, cfg.model.num_classes))
    weights = dict(model.named_parameters())
    plain = partial(_plain, cfg, decoder, weights)
    decode = _image_decoder(cfg, device)
    variants: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "distinct_classes": (B, lambda: decode(decoder.generate(distinct, ids))),
        "one_class": (B, lambda: decode(decoder.generate(torch.zeros_like(ids), ids))),
    }
    if compared:
        variants["reference_cached"] = (B, lambda: decode(plain(distinct, ids, cached=True)))
    few = ids[:_UNCACHED_BATCH]
    if arguments.uncached:
        variants["few_images"] = (len(few), lambda: decode(decoder.generate(distinct[: len(few)], few)))
        variants["reference_uncached"] = (len(few), lambda: decode(plain(distinct[: len(few)], few, cached=False)))
    rates: dict[str, list[float]] = {name: [] for name in variants}
    same = _same_tokens(decoder, plain if compared else None, distinct, ids)
    with progress("bench sample", arguments.rounds * len(variants), "turn") as bar:
        for _ in range(arguments.rounds):
            for name, (images, call) in variants.items():
                synchronize(device)
                started = time.perf_counter()
                call()
                synchronize(device)
                rates[name].append(images / (time.perf_counter() - started))
                bar.update()
    medians = {name: statistics.median(found) for name, found in rates.items()}
    cost = decode_step_cost(cfg, guided=decoder.guided)
    ceilings = product_flops_per_s(device, next(model.parameters()).dtype), read_bytes_per_s(device)
    limit_s = max(cost.flops / ceilings[0], cost.bytes / ceilings[1])  # of a step whose reads and products overlap
    step_s = B / medians["distinct_classes"] / N
    result = {
        "images_per_s": medians["distinct_classes"],
        # None for a config that the plain sampler is not written for.
        "reference_images_per_s": medians.get("reference_cached"),
        "ratio": medians["distinct_classes"] / medians["reference_cached"] if compared else None,
        "variants": {name: {"images_per_s": medians[name], "rounds": found} for name, found in rates.items()},
        "same_token_share": same,
        "latency_per_step_ms": 1e3 * step_s,
        "limit_per_step_ms": 1e3 * limit_s,
        "share_of_limit": limit_s / step_s,
        "flops_per_step": cost.flops,
        "bytes_per_step": cost.bytes,
        "flops_per_s": cost.flops / step_s,
        "bytes_per_s": cost.bytes / step_s,
        "ceiling_flops_per_s": ceilings[0],
        "ceiling_bytes_per_s": ceilings[1],
        "decoding_included": cfg.tokenizer.weights is not None,
        "batch_size": B,
        "precision": cfg.train.precision,
        "config": arguments.config,
        "overrides": arguments.overrides,
    }
    if arguments.uncached:
        result["ratio_to_uncached"] = medians["few_images"] / medians["reference_uncached"]
    return result


def _plain(
    cfg: ExperimentConfig, decoder: Decoder, weights: dict[str, Tensor], labels: Tensor, ids: Tensor, *, cached: bool
) -> Tensor:
    generators, sampling = reference.load("generators"), reference.load("sampling")

    def forward(w: dict[str, Tensor], tokens: Tensor, condition: Tensor, cache: list | None) -> Tensor:
        return generators.rar_forward(w, tokens, condition, cfg.model.num_heads, cache=cache)[0]

    def draw(logits: Tensor, step: int) -> Tensor:
        return decoder.draw(logits.float() / cfg.sample.temperature, ids, step)

    first = cfg.tokenizer.codebook_size + 1
    scales = decoder.scales
    return sampling.sample(forward, weights, labels + first, cfg.model.num_classes + first, scales, draw, cached=cached)


def _same_tokens(decoder: Decoder, plain: Callable[..., Tensor] | None, labels: Tensor, ids: Tensor) -> float | None:
    """The share of images whose tokens are those of the plain sampler, None without one; this is the warm-up too."""
    ours = decoder.generate(labels, ids)
    if plain is None:
        return None
    theirs = plain(labels, ids, cached=True)
    return (ours == theirs).all(1).float().mean().item()


def _image_decoder(cfg: ExperimentConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    if cfg.tokenizer.weights is None:
        return lambda tokens: tokens
    tokenizer = open_tokenizer(cfg.tokenizer, device)

    @torch.inference_mode()
    def decode(tokens: Tensor) -> Tensor:
        return tokenizer.decode(tokens)

    return decode
