"""Exact counts of parameters and of floating-point operations, from the shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rear_scale.config import ExperimentConfig, groups_by_class
from rear_scale.model import head_products, meta_model, mlp_width
from rear_scale.model.generator import is_head
from rear_scale.objective import worth_sharing
from rear_scale.objective.terms import features_of


def parameters_by_part(cfg: ExperimentConfig, model: nn.Module | None = None) -> dict[str, int]:
    """Trainable parameters of each part, counted on a model, by default one without memory. `total` includes `heads`."""
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
    """Rows of modulation per image of a micro-batch, expected for equally frequent classes: 1 where each image has its own."""
    train, model, dropped = cfg.train, cfg.model, cfg.objective.class_dropout
    if not _modulated(cfg) or model.modulation == "per_sample":
        return 1.0
    batch, images, classes = train.global_batch_size, train.micro_batch_size, model.num_classes
    labelled = (batch if groups_by_class(cfg) else images) * (1 - dropped)
    present = classes * (1 - (1 - 1 / classes) ** labelled)
    if groups_by_class(cfg):
        parts = batch / images
        # A class that is cut by the end of a micro-batch counts on both sides; images without one are in every micro-batch.
        cut = (parts - 1) * (1 - present / labelled) if labelled else 0.0
        distinct = (present + cut + parts * min(1.0, images * dropped)) / batch
    else:
        distinct = (present + 1 - (1 - dropped) ** images) / images
    shared = model.modulation == "per_class" or worth_sharing(distinct, 1.0)
    return min(1.0, distinct) if shared else 1.0


def train_flops_per_image(cfg: ExperimentConfig, distinct: float = 1.0) -> int:
    """Floating-point operations of forward and backward for one image, with modulation computed `distinct` times per image.

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
    # A feature of the last token has it run through the blocks before it.
    last = max((feature.tap for feature in features if feature.positions == "own"), default=0) * (block / S)
    return round(3 * (cfg.model.depth * block + output + heads + last))


def recomputed_flops_per_image(cfg: ExperimentConfig, distinct: float = 1.0) -> int:
    """What activation checkpointing computes again in the backward pass of one image. Matrix products and attention alone."""
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
    """One step of cached decoding, for a whole batch, at the mean length of the prefix."""

    flops: float
    bytes: float  # weights, and keys and values of the live prefix, read once


def decode_step_cost(cfg: ExperimentConfig, *, guided: bool) -> StepCost:
    """What a step of decoding cannot do without: products, and reads of weights and cache; modulation is a table.

    Guidance runs two rows per image. Values have the width of train.precision (2 or 4 bytes).
    """
    D, N, K = cfg.model.width, cfg.tokenizer.num_tokens, cfg.tokenizer.codebook_size
    rows = cfg.sample.batch_size * (2 if guided else 1)
    alitok = cfg.model.architecture == "alitok"
    block = 4 * D * D + (3 if alitok else 2) * D * mlp_width(cfg)
    weights = cfg.model.depth * block + D * K
    prefix = (1 if alitok else 2) + (N - 1) / 2  # one position more at every step, from the first one's on
    cached = 2 * cfg.model.depth * D * prefix
    width = 2 if cfg.train.precision == "bf16" else 4
    return StepCost(flops=2.0 * rows * (weights + cached), bytes=width * (weights + rows * cached))
