"""The AdaLN transformer of RAR and reAR, with the parameter names of the released code.

A sequence is [cls, condition, token 1 .. token N-1]: position s = t + 1 predicts token t (t = 0 .. N-1 in the code). The
last token predicts nothing and nobody attends to it, so it is never run.
"""

# B images, U distinct classes of a batch, N tokens of an image, S = N + 1 positions, D width, K codes

from __future__ import annotations

from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rear_scale import rng
from rear_scale.config import HeadsConfig
from rear_scale.model.attention import Attend, Attention
from rear_scale.model.heads import alignment_head

# The released tables are longer than any sequence; the rows beyond N + 2 are never used and never trained.
_SPARE_POSITIONS = 1024
_SPARE_TIMESTEPS = 100


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(hidden), self.dropout, self.training)


class Block(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by class and position (AdaLN-zero)."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, attn_dropout: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads, attn_dropout, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = FeedForward(width, mlp_width, dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor | None) -> Tensor:
        """x [B, S, D]; condition [U, S, D], already through SiLU; rows int64 [B]: which of the U belongs to each image.

        rows None: U = B, in order.
        """
        modulation = self.modulation(condition)
        return self.modulated(x, modulation if rows is None else modulation.index_select(0, rows))

    def modulation(self, condition: Tensor) -> Tensor:
        """[..., 6 D] of condition [..., D], already through SiLU: the blocks share that."""
        return self.adaLN_modulation[1](condition)

    def modulated(self, x: Tensor, modulation: Tensor, attend: Attend | None = None) -> Tensor:
        """x [B, S, D] and its modulation [B or 1, S, 6 D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, attend)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalModulation(nn.Module):
    """LayerNorm without weights, scaled and shifted. The chunks come in the other order than in the blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor | None) -> Tensor:
        modulation = self.modulation(condition)
        return self.modulated(x, modulation if rows is None else modulation.index_select(0, rows))

    def modulation(self, condition: Tensor) -> Tensor:
        return self.adaLN_modulation[1](condition)

    def modulated(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class AdaLNTransformer(nn.Module):
    """Class-conditional next-token prediction over one image's tokens.

    heads: reAR side modules at their taps; None, or taps of None, build none at all.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        num_heads: int,
        mlp_width: int,
        num_classes: int,
        codebook_size: int,
        num_tokens: int,
        codebook_dim: int,
        dropout: float,
        attn_dropout: float,
        heads: HeadsConfig | None,
    ) -> None:
        super().__init__()
        self.num_classes, self.codebook_size, self.num_tokens = num_classes, codebook_size, num_tokens
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens + _SPARE_POSITIONS, width))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, num_tokens + _SPARE_POSITIONS, width))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, num_tokens + _SPARE_TIMESTEPS, width))
        # Rows: codes, one mask token (unused), classes, the null class.
        self.embeddings = nn.Embedding(codebook_size + 1 + num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_width, attn_dropout, dropout) for _ in range(depth))
        self.adaln_before_head = FinalModulation(width)
        self.lm_head = nn.Linear(width, codebook_size)
        self.encode_tap = heads.encode_tap if heads else None
        self.decode_tap = heads.decode_tap if heads else None
        if self.encode_tap is not None:
            self.encode_align_mlp = alignment_head(width, heads.hidden, codebook_dim)
        if self.decode_tap is not None:
            self.decode_align_mlp = alignment_head(width, heads.hidden, codebook_dim)

    @property
    def null_class(self) -> int:
        """The class id that stands for "no class" in guidance."""
        return self.num_classes

    def forward(self, tokens: Tensor, classes: Tensor, rows: Tensor | None) -> dict[str, Tensor]:
        """Logits of every token given the tokens before it, and what the heads say.

        tokens: int64 [B, N], the context (noisy or not). classes: int64 [U], class ids with null_class = no class.
        rows: int64 [B], which of `classes` belongs to each image; None when they are one per image, in order.

        Returns logits [B, N, K] (logits[:, t] predicts token t) and, where the heads exist, "encode" and "decode", both
        [B, N-1, codebook_dim], at the positions of tokens 0 .. N-2: encode recovers that token's embedding, decode
        predicts the next one's (Eq. 6, i = 1 .. N-1).
        """
        class_embedding = self.class_embedding(classes)
        x = self.embed(tokens, class_embedding if rows is None else class_embedding.index_select(0, rows))
        condition = self.condition(class_embedding, x.shape[1])
        output: dict[str, Tensor] = {}
        for done, block in enumerate(self.blocks):
            self._tap(done, x, output)
            x = block(x, condition, rows)
        self._tap(len(self.blocks), x, output)
        x = self.adaln_before_head(x[:, 1:], condition[:, 1:], rows)
        output["logits"] = self.lm_head(x)
        return output

    def class_embedding(self, classes: Tensor) -> Tensor:
        """[U, D] of class ids (int64 [U])."""
        return self.embeddings(classes + self.codebook_size + 1)

    def embed(self, tokens: Tensor, class_embedding: Tensor) -> Tensor:
        """The input sequence [B, N + 1, D] of tokens [B, N] and class_embedding [B, D]: the last token is left out."""
        B = len(tokens)
        sequence = torch.cat(
            (self.cls_token.expand(B, -1, -1), class_embedding[:, None], self.embeddings(tokens[:, :-1])), dim=1
        )
        return sequence + self.positions()

    def positions(self) -> Tensor:
        """[1, N + 1, D]: each position's own row plus, from position 1 on, the row of the position that it predicts."""
        S = self.num_tokens + 1
        return self.pos_embed[:, :S] + F.pad(self.target_aware_pos_embed[:, 2 : S + 1], (0, 0, 1, 0))

    def condition(self, class_embedding: Tensor, length: int) -> Tensor:
        """The modulation input [U, length, D], through SiLU once for all blocks, of class_embedding [U, D]."""
        return F.silu(class_embedding[:, None] + self.timesteps_embeddings[:, :length])

    def _tap(self, done: int, x: Tensor, output: dict[str, Tensor]) -> None:
        if done == self.encode_tap:
            output["encode"] = self.encode_align_mlp(x[:, 2:])
        if done == self.decode_tap:
            output["decode"] = self.decode_align_mlp(x[:, 2:])

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialises every weight as a function of (seed, its name): another depth or other heads change no other weight.

        Truncated normal of deviation 0.02, biases 0, AdaLN-zero: each block starts as the identity.
        """
        for name, weight in self.named_parameters():
            generator = torch.Generator().manual_seed(rng.fold(seed, rng.Purpose.WEIGHT_INIT, crc32(name.encode())))
            if "adaLN_modulation" in name or name == "cls_token" or name.endswith("bias"):
                weight.zero_()
            elif "norm" in name:
                weight.fill_(1.0)
            else:
                drawn = torch.empty(weight.shape, dtype=torch.float32)
                weight.copy_(nn.init.trunc_normal_(drawn, std=0.02, a=-2.0, b=2.0, generator=generator))
