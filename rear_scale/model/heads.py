"""The reAR heads: side modules that map hidden features to codebook embeddings while training (Eq. 6). Sampling has none."""

from __future__ import annotations

from torch import nn


def alignment_head(width: int, hidden: int, codebook_dim: int, form: str) -> nn.Sequential:
    """The paper's head: two linear layers with a GELU between them (section 4.1, appendix A). The released code's: three
    with SiLU."""
    if form == "released":
        return nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, codebook_dim)
        )
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, codebook_dim))
