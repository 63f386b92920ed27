"""AliTok's generator: RMSNorm, SwiGLU, rotary positions, no AdaLN, with the parameter names of the released code.

A sequence is [class, token 1 .. token N-1]. The first tokens of an image are a 1-D prefix, the rest a grid.
"""

# B images, R rows of a decoding batch, N tokens of an image, S positions, D width, K head width

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rear_scale.model.attention import Attend, Attention
from rear_scale.model.generator import Decoding, Generator, Shape, output_matrix
from rear_scale.objective.terms import Feature

_ROTARY_BASE = 10_000.0
_norm = partial(nn.RMSNorm, eps=1e-5)


def feed_forward_width(width: int) -> int:
    """The released hidden width: 8/3 of the model's, rounded up to a multiple of 256."""
    return -(-(8 * width // 3) // 256) * 256


def rotary_table(prefix: int, grid: tuple[int, int], head_width: int) -> Tensor:
    """Cosine and sine of the rotary angles, float32 [N + 1, K / 2, 2], of the class, `prefix` tokens and a grid of (rows,
    columns).

    The row of the class is zero, so that its query and key are zero; the angles of prefix tokens count in one dimension; those
    of grid tokens count rows (first half of the pairs) and columns (second half), starting after the prefix.
    """
    rows, columns = grid
    line = torch.arange(prefix).float()[:, None] * _frequencies(head_width)
    angle = (prefix + torch.arange(max(grid))).float()[:, None] * _frequencies(head_width // 2)
    by_row, by_column = angle[:rows, None].expand(-1, columns, -1), angle[None, :columns].expand(rows, -1, -1)
    angles = torch.cat((line, torch.cat((by_row, by_column), dim=-1).flatten(0, 1)))
    return torch.cat((torch.zeros(1, head_width // 2, 2), torch.stack((angles.cos(), angles.sin()), dim=-1)))


def _frequencies(width: int) -> Tensor:
    return 1.0 / _ROTARY_BASE ** (torch.arange(0, width, 2)[: width // 2].float() / width)


class SwiGLU(nn.Module):
    """The SwiGLU feed-forward."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class AliTokBlock(nn.Module):
    """A pre-norm transformer block with RMSNorm and SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = _norm(shape.width)
        self.attn = Attention(shape.width, shape.num_heads, shape.attn_dropout, shape.dropout, norm=_norm)
        self.norm2 = _norm(shape.width)
        self.mlp = SwiGLU(shape.width, shape.mlp_width, shape.dropout)

    def forward(self, x: Tensor, rotation: Tensor, attend: Attend | None = None) -> Tensor:
        """The output, [B, S, D], for x [B, S, D]; rotation [B or 1, S, K / 2, 2]."""
        x = x + self.attn(self.norm1(x), attend, rotation)
        return x + self.mlp(self.norm2(x))


class AliTokTransformer(Generator):
    """AliTok's generator.

    With shape.target_aware it has RAR's second position table (our definition of RAR for this model): one row per token, added
    to the input of the position that predicts that token.
    """

    prefix = 1
    output_name = "output"

    def __init__(self, shape: Shape, features: Sequence[Feature]) -> None:
        super().__init__(shape, features)
        self.blocks = nn.ModuleList(AliTokBlock(shape) for _ in range(shape.depth))
        # Rows: codes, one mask token, classes, the null class.
        self.embeddings = nn.Embedding(shape.codebook_size + 1 + shape.num_classes + 1, shape.width)
        self.norm = _norm(shape.width)
        self.output = output_matrix(shape)
        if shape.target_aware:
            self.target_aware_pos_embed = nn.Parameter(torch.empty(1, shape.num_tokens, shape.width))
        self.rotary: Tensor | None = (
            None  # a plain attribute, so that it is in no weight file and never in half precision
        )
        self._build_ends()

    def sequence(self, tokens: Tensor, class_embedding: Tensor, order: Tensor | None, length: int) -> Tensor:
        x = torch.cat((class_embedding[:, None], self.token_embedding(tokens[:, : length - self.prefix])), dim=1)
        target = self.targets(order)
        if target is not None:
            x = x + F.pad(target, (0, 0, 0, length - self.num_tokens))
        return F.dropout(x, self.shape.embed_dropout, self.training)

    def targets(self, order: Tensor | None) -> Tensor | None:
        """The rows of the second table, [B or 1, N, D], for the positions of the tokens to predict; None without that table."""
        if not self.shape.target_aware:
            return None
        return self.target_aware_pos_embed if order is None else self.target_aware_pos_embed[0, order]

    def rotation(self, order: Tensor | None, device: torch.device) -> Tensor:
        """The rotations, [B or 1, N + 1, K / 2, 2]: each token has that of its own position in the image."""
        if self.rotary is None or self.rotary.device != device:
            shape = self.shape
            assert shape.grid is not None, "AliTok's generator needs a grid"
            self.rotary = rotary_table(shape.prefix_tokens, shape.grid, shape.width // shape.num_heads).to(device)
        if order is None:
            return self.rotary[None]
        return self.rotary[F.pad(1 + order, (1, 0))]

    def block_arguments(
        self, class_embedding: Tensor, class_index: Tensor | None, order: Tensor | None, length: int
    ) -> tuple[Tensor]:
        return (self.rotation(order, class_embedding.device)[:, :length],)

    def logits(self, x: Tensor, class_embedding: Tensor, class_index: Tensor | None) -> Tensor:
        return self.token_logits(self.norm(x))

    def decoding(self, classes: Tensor, class_index: Tensor, order: Tensor | None) -> AliTokDecoding:
        return AliTokDecoding(self, classes, class_index, order)


class AliTokDecoding(Decoding):
    """Cached decoding of AliTok's generator."""

    def __init__(self, model: AliTokTransformer, classes: Tensor, class_index: Tensor, order: Tensor | None) -> None:
        self.model, self.blocks = model, list(model.blocks)
        self.first = model.class_embedding(classes)[class_index][:, None]
        self.rotation = model.rotation(order, self.first.device)
        self.targets = model.targets(order)

    def prefix(self) -> Tensor:
        return self.first if self.targets is None else self.first + self.targets[:, :1]

    def token(self, tokens: Tensor, step: int) -> Tensor:
        x = self.model.token_embedding(tokens)[:, None]
        return x if self.targets is None else x + self.targets[:, step + 1 : step + 2]

    def arguments(self, number: int, start: int, count: int) -> tuple[Tensor]:
        return (self.rotation[:, start : start + count],)

    @staticmethod
    def through(block: Any, attend: Attend, x: Tensor, *arguments: Tensor) -> Tensor:
        return block(x, *arguments, attend)

    def logits(self, x: Tensor, position: int) -> Tensor:
        return self.model.token_logits(self.model.norm(x))[:, 0]
