"""The reAR heads: side modules that map hidden features to codebook embeddings while training (Eq. 6). Sampling has none."""

from __future__ import annotations

from torch import nn


def alignment_head(width: int, hidden: int, codebook_dim: int) -> nn.Sequential:
    """The paper's head: two linear layers with a GELU between them (section 4.1, appendix A)."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, codebook_dim))
