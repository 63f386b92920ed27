"""Causal self-attention with QK-norm. How keys and values are attended to is the caller's: training and cached decoding
share everything else."""

# B images, S positions, D width, H heads, K head width

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

# (query, key, value), each [B, H, S, K] -> [B, H, S, K]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, attn_dropout: float, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.attn_dropout, self.dropout = num_heads, attn_dropout, dropout
        head_width = width // num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(head_width, eps=1e-6)
        self.k_norm = nn.LayerNorm(head_width, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """[B, S, D] of x [B, S, D]. Without `attend`, position s sees positions 0..s of x."""
        B, S, D = x.shape
        query, key, value = self.qkv(x).view(B, S, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        attended = (attend or self.causal)(query, key, value)
        return F.dropout(self.proj(attended.transpose(1, 2).reshape(B, S, D)), self.dropout, self.training)

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # is_causal instead of a mask: a mask tensor would rule out the flash kernel and do twice the work.
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.attn_dropout if self.training else 0.0, is_causal=True
        )
