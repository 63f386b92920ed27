"""Exact numbers of parameters and floating-point operations, computed from shapes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rear_scale.config import ExperimentConfig, groups_by_class
from rear_scale.model import head_products, meta_model, mlp_width
from rear_scale.model.generator import is_head
from rear_scale.objective import worth_sharing
from rear_scale.objective.terms import features_of


def parameters_by_part(cfg: ExperimentConfig, model: nn.Module | None = None) -> dict[str, int]:
    """The number of trainable parameters of each part of the model; `total` includes `heads`.

    model: where to count; by default a model on the meta device.
    """
    if model is None:
        model = meta_model(cfg)
    parts = {
        "embeddings": 0,
        "positions": 0,
        "attention": 0,
        "feed_forward": 0,
        "modulation": 0,
        "norms": 0,
        "output": 0,
        "heads": 0,
    }
    for name, weight in model.named_parameters():
        parts[_part(name)] += weight.numel()
    total = sum(parts.values())
    return {**parts, "without_heads": total - parts["heads"], "total": total}


def _part(name: str) -> str:
    if is_head(name):
        return "heads"
    for fragment, part in (
        ("adaLN_modulation", "modulation"),
        (".attn.", "attention"),
        (".mlp.", "feed_forward"),
        ("norm", "norms"),
        ("lm_head", "output"),
        ("output.", "output"),
        ("codebook_proj", "embeddings"),
        ("embeddings.weight", "embeddings"),
    ):
        if fragment in name:
            return part
    return "positions"  # cls_token and the position and timestep tables


def distinct_classes_per_image(cfg: ExperimentConfig) -> float:
    """The expected number of modulation rows per image of a micro-batch, for equally frequent classes; 1 without sharing."""
    train, model, dropped = cfg.train, cfg.model, cfg.objective.class_dropout
    if not _modulated(cfg) or model.modulation == "per_sample":
        return 1.0
    batch, images, classes = train.global_batch_size, train.micro_batch_size, model.num_classes
    labelled = (batch if groups_by_class(cfg) else images) * (1 - dropped)
    present = classes * (1 - (1 - 1 / classes) ** labelled)
    if groups_by_class(cfg):
        micro_batches = batch / images
        # A class at the boundary of two micro-batches counts in both, and images of the null class are in every micro-batch.
        cut = (micro_batches - 1) * (1 - present / labelled) if labelled else 0.0
        distinct = (present + cut + micro_batches * min(1.0, images * dropped)) / batch
    else:
        distinct = (present + 1 - (1 - dropped) ** images) / images
    shared = model.modulation == "per_class" or worth_sharing(distinct, 1.0)
    return min(1.0, distinct) if shared else 1.0


def train_flops_per_image(cfg: ExperimentConfig, distinct: float = 1.0) -> int:
    """The floating-point operations of the forward and backward pass of one image, with modulation computed `distinct` times.

    A product of [m, k] and [k, n] counts 2 m k n; attention counts the causal half, S (S + 1) / 2 pairs of positions;
    the backward pass counts twice the forward; recomputation under activation checkpointing is not counted.
    """
    D, N, K, Z = cfg.model.width, cfg.tokenizer.num_tokens, cfg.tokenizer.codebook_size, cfg.tokenizer.codebook_dim
    adaln = distinct * _modulated(cfg)
    S, block = _positions(cfg), _block_forward(cfg, distinct)
    tied = cfg.model.tie_codebook
    output = 2 * N * (2 * D * D * adaln + D * K) + 2 * K * Z * D * {None: 0, "both": 2}.get(tied, 1)
    features = features_of(cfg)
    heads = sum(2 * (N - (feature.positions == "inner")) * head_products(feature) for feature in features)
    # With a feature of the last token, that token passes through the blocks before the feature.
    last = max((feature.tap for feature in features if feature.positions == "own"), default=0) * (block / S)
    return round(3 * (cfg.model.depth * block + output + heads + last))


def recomputed_flops_per_image(cfg: ExperimentConfig, distinct: float = 1.0) -> int:
    """The operations that activation checkpointing recomputes for one image; matrix products and attention alone."""
    depth, policy = cfg.model.depth, cfg.train.activation_checkpointing
    blocks = {"full": depth, "every_n": -(-depth // cfg.train.recompute_every_n)}.get(policy, 0)
    return round(blocks * _block_forward(cfg, distinct))


def _positions(cfg: ExperimentConfig) -> int:
    return cfg.tokenizer.num_tokens + (cfg.model.architecture != "alitok")


def _modulated(cfg: ExperimentConfig) -> bool:
    return cfg.model.architecture != "alitok" and cfg.model.conditioning == "adaln"


def _block_forward(cfg: ExperimentConfig, distinct: float) -> float:
    D, S = cfg.model.width, _positions(cfg)
    alitok = cfg.model.architecture == "alitok"
    adaln = distinct * _modulated(cfg)
    return 2 * S * (4 * D * D + (3 if alitok else 2) * D * mlp_width(cfg) + 6 * D * D * adaln) + 2 * S * (S + 1) * D


@dataclass(frozen=True)
class StepCost:
    """The cost of one step of cached decoding of a whole batch, at the mean length of the prefix."""

    flops: float
    bytes: float  # weights, and keys and values of the live prefix, read once


def decode_step_cost(cfg: ExperimentConfig, *, guided: bool) -> StepCost:
    """The minimum cost of a decoding step: matrix products, and reads of weights and cache; modulation is precomputed.

    With guidance there are two rows per image. Values have the itemsize of train.precision (2 or 4 bytes).
    """
    D, N, K = cfg.model.width, cfg.tokenizer.num_tokens, cfg.tokenizer.codebook_size
    rows = cfg.sample.batch_size * (2 if guided else 1)
    alitok = cfg.model.architecture == "alitok"
    block = 4 * D * D + (3 if alitok else 2) * D * mlp_width(cfg)
    weights = cfg.model.depth * block + D * K
    prefix = (1 if alitok else 2) + (N - 1) / 2  # one more position at every step
    cached = 2 * cfg.model.depth * D * prefix
    itemsize = 2 if cfg.train.precision == "bf16" else 4
    return StepCost(flops=2.0 * rows * (weights + cached), bytes=itemsize * (weights + rows * cached))
