"""The generators: causal transformers over token ids, without any distributed code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rear_scale.config import ExperimentConfig, HeadsConfig
from rear_scale.model.alitok import AliTokTransformer, feed_forward_width
from rear_scale.model.generator import Generator, Shape
from rear_scale.model.transformer import AdaLNTransformer, PlainTransformer
from rear_scale.objective.rear_terms import alignment_features
from rear_scale.objective.terms import Feature, features_of


def build_model(cfg: ExperimentConfig, *, with_heads: bool = True) -> Generator:
    """The generator of a config, with uninitialized weights. Sampling needs neither features nor heads.

    Raises InputError for wrong terms of the loss, as `terms_of` does.
    """
    return build_generator(cfg.model.architecture, shape_of(cfg), features=features_of(cfg) if with_heads else ())


def meta_model(cfg: ExperimentConfig, *, with_heads: bool = True) -> Generator:
    """The generator of a config on the meta device: names and shapes alone."""
    with torch.device("meta"), _SkipInit():
        return build_model(cfg, with_heads=with_heads)


def empty_model(
    cfg: ExperimentConfig, device: torch.device, dtype: torch.dtype, *, with_heads: bool = False
) -> Generator:
    """The generator of a config, allocated on a device in a dtype, with uninitialized weights."""
    # Same as nn.Module.to_empty, without its import of torch's whole compiler.
    return meta_model(cfg, with_heads=with_heads)._apply(
        lambda weight: torch.empty(weight.shape, dtype=dtype, device=device)
    )


class _SkipInit(TorchFunctionMode):
    """Skips random initialization, which on the meta device makes torch import its whole compiler."""

    def __torch_function__(self, function: Any, types: Any, inputs: Any = (), named: Any = None) -> Any:
        initializers = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)
        named = named or {}
        return (*inputs, named.get("tensor"))[0] if function in initializers else function(*inputs, **named)


def build_generator(
    architecture: str, shape: Shape, heads: HeadsConfig | None = None, features: Sequence[Feature] = ()
) -> Generator:
    """A generator of a shape, with uninitialized weights. architecture: rar (RAR and reAR) or alitok.

    heads: the reAR heads, for a model without a config; features: all other features.
    """
    if heads is not None:
        features = (*alignment_features(heads, shape.width, shape.codebook_dim), *features)
    if architecture == "alitok":
        return AliTokTransformer(shape, features)
    return (AdaLNTransformer if shape.conditioning == "adaln" else PlainTransformer)(shape, features)


def head_matrices(feature: Feature) -> list[torch.Size]:
    """The shapes of the matrices in a feature's head, [outputs, inputs]."""
    if feature.make_head is None:
        return []
    with torch.device("meta"), _SkipInit():
        return [weight.shape for weight in feature.make_head().parameters() if weight.ndim > 1]


def head_products(feature: Feature) -> int:
    """The number of multiplications of a feature's head at one position."""
    if feature.head_products is not None:
        return feature.head_products
    return sum(shape.numel() for shape in head_matrices(feature))


def shape_of(cfg: ExperimentConfig) -> Shape:
    """The shape of a config's generator: all that its weights depend on, except for the heads."""
    model, tokenizer = cfg.model, cfg.tokenizer
    return Shape(
        depth=model.depth,
        width=model.width,
        num_heads=model.num_heads,
        mlp_width=mlp_width(cfg),
        num_classes=model.num_classes,
        codebook_size=tokenizer.codebook_size,
        num_tokens=tokenizer.num_tokens,
        codebook_dim=tokenizer.codebook_dim,
        dropout=model.dropout,
        attn_dropout=model.attn_dropout,
        embed_dropout=model.embed_dropout,
        conditioning=model.conditioning,
        tie_codebook=model.tie_codebook,
        target_aware=model.architecture == "alitok" and cfg.objective.permutation.active,
        grid=None if tokenizer.grid is None else (tokenizer.grid[0], tokenizer.grid[1]),
        prefix_tokens=tokenizer.prefix_tokens,
    )


def mlp_width(cfg: ExperimentConfig) -> int:
    """The hidden width of the feed-forward: model.mlp_width, else 4 x width, or AliTok's rule for its generator."""
    if cfg.model.mlp_width is not None:
        return cfg.model.mlp_width
    return feed_forward_width(cfg.model.width) if cfg.model.architecture == "alitok" else 4 * cfg.model.width
