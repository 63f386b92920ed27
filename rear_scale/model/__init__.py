"""The generators: causal transformers over token ids, with nothing distributed in them."""

from __future__ import annotations

from rear_scale.config import ExperimentConfig
from rear_scale.model.transformer import AdaLNTransformer


def build_model(cfg: ExperimentConfig, *, with_heads: bool = True) -> AdaLNTransformer:
    """The generator of a config, with uninitialised weights. Sampling needs no heads."""
    return AdaLNTransformer(
        depth=cfg.model.depth,
        width=cfg.model.width,
        num_heads=cfg.model.num_heads,
        mlp_width=cfg.model.mlp_width or 4 * cfg.model.width,
        num_classes=cfg.model.num_classes,
        codebook_size=cfg.tokenizer.codebook_size,
        num_tokens=cfg.tokenizer.num_tokens,
        codebook_dim=cfg.tokenizer.codebook_dim,
        dropout=cfg.model.dropout,
        attn_dropout=cfg.model.attn_dropout,
        heads=cfg.objective.heads if with_heads else None,
    )
