"""The transformer of RAR and reAR, with the parameter names of the released code.

A sequence is [cls, condition, token 1 .. token N-1]. AdaLN conditions every block on class and position; RAR's ablations use
the plain form, in which only the sequence contains the class.
"""

# B images, U distinct classes of a batch, R rows of a decoding batch, N tokens of an image, S positions, D width, K codes

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rear_scale.model.attention import Attend, Attention
from rear_scale.model.generator import Decoding, Generator, Shape, output_matrix
from rear_scale.model.modulation import rows_of
from rear_scale.objective.terms import Feature

# The released tables are longer than any sequence; the rows beyond N + 2 are never used and never trained.
SPARE_POSITIONS = 1024
_SPARE_TIMESTEPS = 100
_TABLE_POSITIONS = 32  # positions whose modulation cached decoding computes together

_norm = partial(nn.LayerNorm, eps=1e-6)


class FeedForward(nn.Module):
    """The feed-forward with GELU."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(hidden), self.dropout, self.training)


class _Layers(nn.Module):
    """The layers of a block, by the names of the released code."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = _norm(shape.width)
        self.attn = Attention(shape.width, shape.num_heads, shape.attn_dropout, shape.dropout, norm=_norm)
        self.norm2 = _norm(shape.width)
        self.mlp = FeedForward(shape.width, shape.mlp_width, shape.dropout)


class PlainBlock(_Layers):
    """Attention and feed-forward on the residual stream, unconditioned."""

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), attend)
        return x + self.mlp(self.norm2(x))


class Block(_Layers):
    """Attention and feed-forward, each shifted, scaled and gated as a function of class and position (AdaLN-zero)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(shape.width, 6 * shape.width))

    def forward(self, x: Tensor, condition: Tensor, class_index: Tensor | None) -> Tensor:
        """The output, [B, S, D], for x [B, S, D] and condition [U, S, D], to which SiLU is already applied.

        class_index: int64 [B], the index into the U conditions of each image; None: U = B, in order.
        """
        modulation = self.modulation(condition)
        return self.modulated(x, modulation if class_index is None else rows_of(modulation, class_index))

    def modulation(self, condition: Tensor) -> Tensor:
        """The modulation, [..., 6 D], of condition [..., D], to which SiLU is already applied, once for all blocks."""
        return self.adaLN_modulation[1](condition)

    def modulated(self, x: Tensor, modulation: Tensor, attend: Attend | None = None) -> Tensor:
        """The output, [B, S, D], for x [B, S, D] and its modulation [B or 1, S, 6 D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, attend)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalModulation(nn.Module):
    """LayerNorm without weights, then scale and shift. Scale comes before shift in its output, unlike in the blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor, class_index: Tensor | None) -> Tensor:
        modulation = self.modulation(condition)
        return self.modulated(x, modulation if class_index is None else rows_of(modulation, class_index))

    def modulation(self, condition: Tensor) -> Tensor:
        return self.adaLN_modulation[1](condition)

    def modulated(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class ViTGenerator(Generator):
    """RAR's sequence, positions and embeddings; subclasses define how the class conditions the blocks."""

    prefix = 2
    output_name = "lm_head"

    def __init__(self, shape: Shape, features: Sequence[Feature]) -> None:
        super().__init__(shape, features)
        N, D = shape.num_tokens, shape.width
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.pos_embed = nn.Parameter(torch.empty(1, N + SPARE_POSITIONS, D))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, N + SPARE_POSITIONS, D))
        self._build_conditioning()
        self.blocks = nn.ModuleList(self._new_block() for _ in range(shape.depth))
        # Rows: codes, one mask token, classes, the null class.
        self.embeddings = nn.Embedding(shape.codebook_size + 1 + shape.num_classes + 1, D)
        self._build_final()
        self.lm_head = output_matrix(shape)
        self._build_ends()

    @abstractmethod
    def _build_conditioning(self) -> None:
        """Adds the weights by which the class enters beside the sequence; they stand before the blocks in a weight file."""

    @abstractmethod
    def _new_block(self) -> nn.Module:
        """A block of the model's shape."""

    @abstractmethod
    def _build_final(self) -> None:
        """Adds the last norm; it stands before the output matrix in a weight file."""

    def sequence(self, tokens: Tensor, class_embedding: Tensor, order: Tensor | None, length: int) -> Tensor:
        B = len(tokens)
        x = torch.cat(
            (
                self.cls_token.expand(B, -1, -1),
                class_embedding[:, None],
                self.token_embedding(tokens[:, : length - self.prefix]),
            ),
            dim=1,
        )
        return F.dropout(x + self.positions(order, length), self.shape.embed_dropout, self.training)

    def positions(self, order: Tensor | None, length: int) -> Tensor:
        """The position embeddings, [B or 1, length, D]: each position's own row plus, where it predicts a token, the row of that
        token's position in the image.

        Rows 0 and 1 belong to cls and condition, row 2 + p to position p of the image. order: int64 [B or 1, N].
        """
        N = self.num_tokens
        if order is None:
            own, target = self.pos_embed[:, :length], self.target_aware_pos_embed[:, 2 : N + 2]
        else:
            of_tokens = self.pos_embed[0, 2 + order[:, : length - 2]]
            own = torch.cat((self.pos_embed[:, :2].expand(len(order), -1, -1), of_tokens), dim=1)
            target = self.target_aware_pos_embed[0, 2 + order]
        return own + F.pad(target, (0, 0, 1, length - 1 - N))


class AdaLNTransformer(ViTGenerator):
    """A transformer whose blocks are modulated by class and position: the final models of both papers."""

    def _build_conditioning(self) -> None:
        self.timesteps_embeddings = nn.Parameter(
            torch.empty(1, self.shape.num_tokens + _SPARE_TIMESTEPS, self.shape.width)
        )

    def _new_block(self) -> Block:
        return Block(self.shape)

    def _build_final(self) -> None:
        self.adaln_before_head = FinalModulation(self.shape.width)

    def block_arguments(
        self, class_embedding: Tensor, class_index: Tensor | None, order: Tensor | None, length: int
    ) -> tuple[Tensor, Tensor | None]:
        return self.condition(class_embedding, length), class_index

    def condition(self, class_embedding: Tensor, length: int) -> Tensor:
        """The input of modulation, [U, length, D], from class_embedding [U, D], with SiLU applied once for all blocks."""
        return F.silu(class_embedding[:, None] + self.timesteps_embeddings[:, :length])

    def logits(self, x: Tensor, class_embedding: Tensor, class_index: Tensor | None) -> Tensor:
        condition = self.condition(class_embedding, self.num_tokens + 1)[:, 1:]
        return self.token_logits(self.adaln_before_head(x, condition, class_index))

    def decoding(self, classes: Tensor, class_index: Tensor, order: Tensor | None) -> AdaLNDecoding:
        return AdaLNDecoding(self, classes, class_index, order)


class PlainTransformer(ViTGenerator):
    """A transformer with the class as a token of the sequence only: no AdaLN, no timestep embedding (RAR's ablations)."""

    def _build_conditioning(self) -> None:
        return

    def _new_block(self) -> PlainBlock:
        return PlainBlock(self.shape)

    def _build_final(self) -> None:
        self.norm = _norm(self.shape.width)

    def block_arguments(
        self, class_embedding: Tensor, class_index: Tensor | None, order: Tensor | None, length: int
    ) -> tuple[()]:
        return ()

    def logits(self, x: Tensor, class_embedding: Tensor, class_index: Tensor | None) -> Tensor:
        return self.token_logits(self.norm(x))

    def decoding(self, classes: Tensor, class_index: Tensor, order: Tensor | None) -> PlainDecoding:
        return PlainDecoding(self, classes, class_index, order)


class ViTDecoding(Decoding):
    """Cached decoding of a plain transformer."""

    def __init__(self, model: ViTGenerator, classes: Tensor, class_index: Tensor, order: Tensor | None) -> None:
        self.model, self.class_index = model, class_index
        self.blocks = list(model.blocks)
        self.class_embedding = model.class_embedding(classes)
        self.positions = model.positions(order, model.num_tokens + 1)

    def prefix(self) -> Tensor:
        cls = self.model.cls_token[0].expand(len(self.class_index), -1)
        return torch.stack((cls, self.class_embedding[self.class_index]), dim=1) + self.positions[:, :2]

    def token(self, tokens: Tensor, step: int) -> Tensor:
        return self.model.token_embedding(tokens)[:, None] + self.positions[:, 2 + step : 3 + step]


class PlainDecoding(ViTDecoding):
    model: PlainTransformer

    def arguments(self, number: int, start: int, count: int) -> tuple[()]:
        return ()

    @staticmethod
    def through(block: Any, attend: Attend, x: Tensor, *arguments: Tensor) -> Tensor:
        return block(x, attend)

    def logits(self, x: Tensor, position: int) -> Tensor:
        return self.model.token_logits(self.model.norm(x))[:, 0]


class AdaLNDecoding(ViTDecoding):
    """Cached decoding with a table of the modulation, which depends on class and position alone.

    The table covers the distinct classes of the batch and a few positions at a time, whose rows are contiguous in memory.
    """

    model: AdaLNTransformer

    def __init__(self, model: AdaLNTransformer, classes: Tensor, class_index: Tensor, order: Tensor | None) -> None:
        super().__init__(model, classes, class_index, order)
        condition = model.condition(self.class_embedding, model.num_tokens + 1)
        self.condition = condition.transpose(0, 1).contiguous()  # [S, U, D]
        self.start = self.end = 0  # the positions that the tables hold
        self.tables: list[Tensor] = []

    def prefix(self) -> Tensor:
        self._make_tables(0)
        return super().prefix()

    def token(self, tokens: Tensor, step: int) -> Tensor:
        if step + self.model.prefix == self.end:
            self._make_tables(self.end)
        return super().token(tokens, step)

    def _make_tables(self, start: int) -> None:
        """Makes the tables: [s, U, 6 D] per block and [s, U, 2 D] for the final modulation, with 1 + scale in place of scale."""
        condition = self.condition[start : start + _TABLE_POSITIONS]
        self.start, self.end = start, start + len(condition)
        # a list of modules does not say what it holds
        self.tables = [block.modulation(condition) for block in cast("list[Block]", self.blocks)]
        for table in self.tables:
            for scale in (1, 4):
                table.chunk(6, dim=-1)[scale].add_(1)
        self.final_table = self.model.adaln_before_head.modulation(condition)
        self.final_table.chunk(2, dim=-1)[0].add_(1)

    def _modulation(self, table: Tensor, position: int, count: int) -> Tensor:
        """The modulation, [R, count, ...], of the positions from `position` on."""
        first = position - self.start
        return table[first : first + count].index_select(1, self.class_index).transpose(0, 1)

    def arguments(self, number: int, start: int, count: int) -> tuple[Tensor]:
        return (self._modulation(self.tables[number], start, count),)

    @staticmethod
    def through(block: Any, attend: Attend, x: Tensor, *arguments: Tensor) -> Tensor:
        (modulation,) = arguments
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, block.attn(torch.addcmul(shift1, block.norm1(x), scale1), attend))
        return torch.addcmul(x, gate2, block.mlp(torch.addcmul(shift2, block.norm2(x), scale2)))

    def logits(self, x: Tensor, position: int) -> Tensor:
        scale, shift = self._modulation(self.final_table, position, 1).chunk(2, dim=-1)
        normal = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return self.model.token_logits(torch.addcmul(shift, normal, scale))[:, 0]
