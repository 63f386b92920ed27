"""Images per second of sampling, compared with the plain samplers of tests/reference, interleaved in one process.

With tokenizer.weights, decoding of images is included: for our sampler overlapped with the sampling of the next batch, as in
launchers/sample.py, for the plain sampler after each batch. The figures per step never include decoding of images.

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
from rear_scale.bench.model import random_model, synchronize, use_device
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.model.flops import decode_step_cost
from rear_scale.progress import progress
from rear_scale.sample.decode import Decoder
from rear_scale.sample.decode_worker import DecodeWorker
from rear_scale.tokenizer import open_tokenizer

# Batch size and precision, with decoding included. RAR's Table 5 states all three. For Figure 5, reAR's paper states only the
# batch size; the precision is that of its training, and decoding is assumed to be included as in Table 5.
_PROTOCOLS = {"rar_table5": (128, "fp32"), "rear_fig5": (128, "bf16")}
_UNCACHED_BATCH = 4
_PIPELINED = 4  # batches per turn, when decoding of images is overlapped with the sampling of the next batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="bench_cpu.yaml", metavar="NAME.yaml", help="default: bench_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each variant; medians are reported (default: 5)"
    )
    parser.add_argument("--classes", type=int, help="distinct classes of a batch (default: as many as images)")
    parser.add_argument(
        "--protocol",
        choices=_PROTOCOLS,
        help="batch size and precision of RAR's Table 5 (fp32) or reAR's Figure 5 (bf16, assumed), decoding included",
    )
    parser.add_argument("--alone", action="store_true", help="time only our sampler, without the plain one")
    parser.add_argument("--uncached", action="store_true", help="time the sampler without a cache too, on 4 images")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates of our sampler with distinct classes and with one class, and of the plain cached one."""
    cfg = config.load(arguments.config, arguments.overrides)
    _check(arguments, cfg)
    if arguments.protocol:
        cfg.sample.batch_size, cfg.train.precision = _PROTOCOLS[arguments.protocol]
    device = use_device()
    model = random_model(cfg, device, with_heads=False).eval()
    B, N = cfg.sample.batch_size, cfg.tokenizer.num_tokens
    started = time.perf_counter()
    decoder = Decoder(model, cfg.sample, cfg.objective.permutation)
    reason = "--alone was given" if arguments.alone else _incomparable(cfg, decoder)
    if arguments.uncached and reason:
        raise InputError(
            f"--uncached with --config {arguments.config}: {reason}. Leave --uncached out, or change the config"
        )
    ids = torch.arange(B, device=device)
    classes = arguments.classes or min(B, cfg.model.num_classes)
    distinct, one, few = ids % classes, torch.zeros_like(ids), ids[:_UNCACHED_BATCH]
    decoder.generate(distinct, ids)
    synchronize(device)
    first_batch_s = time.perf_counter() - started  # with the time of torch.compile, where steps are compiled
    plain = partial(_plain, cfg, decoder, dict(model.named_parameters()))
    decode = _image_decoder(cfg, device)
    worker = DecodeWorker(device)
    ours = partial(_ours, decoder, decode, worker)
    variants: dict[str, tuple[int, Callable[[], object]]] = {
        "distinct_classes": (_images(B, decode), lambda: ours(distinct, ids)),
        "one_class": (_images(B, decode), lambda: ours(one, ids)),
    }
    if decode is not None:
        variants["tokens_alone"] = (B, lambda: decoder.generate(distinct, ids))
    if not reason:
        variants["reference_cached"] = (B, lambda: (decode or _as_it_is)(plain(distinct, ids, cached=True)))
    if arguments.uncached:
        variants["few_images"] = (_images(len(few), decode), lambda: ours(distinct[: len(few)], few))
        variants["reference_uncached"] = (
            len(few),
            lambda: (decode or _as_it_is)(plain(distinct[: len(few)], few, cached=False)),
        )
    same = None
    if not reason:
        same = (decoder.generate(distinct, ids) == plain(distinct, ids, cached=True)).all(1).float().mean().item()
    with worker:
        rates = _interleaved(variants, arguments.rounds, device)
    medians = {name: statistics.median(rounds) for name, rounds in rates.items()}
    step_s = B / medians.get("tokens_alone", medians["distinct_classes"]) / N
    result = {
        "images_per_s": medians["distinct_classes"],
        # None, with a reason, for a config that the plain sampler does not support.
        "reference_images_per_s": medians.get("reference_cached"),
        "ratio": None if reason else medians["distinct_classes"] / medians["reference_cached"],
        "no_reference_because": reason,
        "variants": {name: {"images_per_s": medians[name], "rounds": rounds} for name, rounds in rates.items()},
        "same_token_share": same,
        "first_batch_s": first_batch_s,
        "compiled_steps": decoder.compiled is not None,
        **_step_figures(cfg, decoder, device, step_s),
        "decoding_included": decode is not None,
        "batch_size": B,
        "classes": classes,
        "precision": cfg.train.precision,
        "protocol": arguments.protocol,
        "config": arguments.config,
        "overrides": arguments.overrides,
    }
    if arguments.uncached:
        result["ratio_to_uncached"] = medians["few_images"] / medians["reference_uncached"]
    return result


def _check(arguments: argparse.Namespace, cfg: ExperimentConfig) -> None:
    if arguments.rounds < 1:
        raise InputError(f"--rounds {arguments.rounds} measures nothing. Use at least 1")
    if arguments.classes is not None and not 1 <= arguments.classes <= cfg.model.num_classes:
        raise InputError(
            f"--classes {arguments.classes} must lie in 1 .. {cfg.model.num_classes}, the config's model.num_classes. "
            "Leave it out for as many as images"
        )
    if arguments.protocol and cfg.tokenizer.weights is None:
        raise InputError(
            f"--protocol {arguments.protocol} includes decoding, but tokenizer.weights is not set. Set it to the file's path"
        )


def _incomparable(cfg: ExperimentConfig, decoder: Decoder) -> str | None:
    """The reason why the plain sampler cannot sample the same tokens; None where it can."""
    if cfg.model.architecture != "rar" or cfg.model.conditioning != "adaln" or cfg.model.tie_codebook is not None:
        return "the plain sampler is written for RAR's transformer with AdaLN"
    if not decoder.guided:
        return "the plain sampler always runs both branches of guidance"
    if cfg.sample.top_k is not None or cfg.sample.top_p is not None:
        return "the plain sampler draws from all codes, without sample.top_k and sample.top_p"
    if decoder.orders(torch.arange(1)) is not None:
        return "the plain sampler draws in raster order"
    return None


def _interleaved(
    variants: dict[str, tuple[int, Callable[[], object]]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Images per second of each variant in each round."""
    warm_up = 2 if device.type == "cuda" else 1  # the second batch of a shape records CUDA graphs
    rates: dict[str, list[float]] = {name: [] for name in variants}
    turns = rounds * len(variants) + warm_up * len(variants.keys() - {"reference_uncached"})
    with progress("bench sample", turns, "turn") as bar:
        for turn in range(-warm_up, rounds):
            for name, (images, call) in variants.items():
                if turn < 0 and name == "reference_uncached":
                    continue  # not warmed up: it takes minutes, and uses the kernels of the cached sampler
                synchronize(device)
                started = time.perf_counter()
                call()
                synchronize(device)
                if turn >= 0:
                    rates[name].append(images / (time.perf_counter() - started))
                bar.update()
    return rates


def _step_figures(cfg: ExperimentConfig, decoder: Decoder, device: torch.device, step_s: float) -> dict[str, float]:
    """The cost of a step, compared with the measured peak rates of the device."""
    cost = decode_step_cost(cfg, guided=decoder.guided)
    dtype = next(decoder.model.parameters()).dtype
    flops_per_s, bytes_per_s = product_flops_per_s(device, dtype), read_bytes_per_s(device)
    limit_s = max(cost.flops / flops_per_s, cost.bytes / bytes_per_s)  # reads and products overlap
    return {
        "latency_per_step_ms": 1e3 * step_s,
        "limit_per_step_ms": 1e3 * limit_s,
        "share_of_limit": limit_s / step_s,
        "flops_per_step": cost.flops,
        "bytes_per_step": cost.bytes,
        "flops_per_s": cost.flops / step_s,
        "bytes_per_s": cost.bytes / step_s,
        "ceiling_flops_per_s": flops_per_s,
        "ceiling_bytes_per_s": bytes_per_s,
    }


def _ours(
    decoder: Decoder, decode: Callable[[Tensor], Tensor] | None, worker: DecodeWorker, labels: Tensor, ids: Tensor
) -> None:
    if decode is None:
        decoder.generate(labels, ids)
        return
    for _ in range(_PIPELINED):
        worker.run(decode, decoder.generate(labels, ids))
    worker.wait()


def _images(batch: int, decode: Callable[[Tensor], Tensor] | None) -> int:
    """The number of images of one call of _ours."""
    return batch if decode is None else batch * _PIPELINED


def _as_it_is(tokens: Tensor) -> Tensor:
    return tokens


def _plain(
    cfg: ExperimentConfig, decoder: Decoder, weights: dict[str, Tensor], labels: Tensor, ids: Tensor, *, cached: bool
) -> Tensor:
    generators, sampling = reference.load("generators"), reference.load("sampling")

    def forward(w: dict[str, Tensor], tokens: Tensor, condition: Tensor, cache: list[Any] | None) -> Tensor:
        return generators.rar_forward(w, tokens, condition, cfg.model.num_heads, cache=cache)[0]

    def draw(logits: Tensor, step: int) -> Tensor:
        return decoder.draw(logits.float() / cfg.sample.temperature, ids, step)

    first = cfg.tokenizer.codebook_size + 1
    scales = decoder.scales
    return sampling.sample(forward, weights, labels + first, cfg.model.num_classes + first, scales, draw, cached=cached)


def _image_decoder(cfg: ExperimentConfig, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    if cfg.tokenizer.weights is None:
        return None
    tokenizer = open_tokenizer(cfg.tokenizer, device)

    @torch.inference_mode()
    def decode(tokens: Tensor) -> Tensor:
        return tokenizer.decode(tokens)

    return decode
