"""The base class of generators: token prediction from embedded sequences, features for loss terms, tied embeddings.

A sequence is a prefix (the class, and what a model puts before it) and tokens 1 .. N-1. Position s = prefix - 1 + t
predicts token t (t = 0 .. N-1 in the code). No prediction depends on the last token, so it is
computed only as far as a feature needs it.
"""

# B images, U distinct classes of a batch, N tokens of an image, P prefix positions, S positions of a sequence, D width,
# K codes, Z width of a code

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rear_scale import rng
from rear_scale.model.attention import Attend
from rear_scale.objective.terms import Feature, Positions


@dataclass(frozen=True)
class Shape:
    """All that a generator's weights depend on, except for the heads."""

    depth: int
    width: int
    num_heads: int
    mlp_width: int
    num_classes: int
    codebook_size: int
    num_tokens: int
    codebook_dim: int
    dropout: float = 0.0
    attn_dropout: float = 0.0
    embed_dropout: float = 0.0
    conditioning: str = "adaln"  # adaln | in_context
    tie_codebook: str | None = None  # input | output | both: code embeddings are a projection of the codebook
    target_aware: bool = False  # AliTok's generator: whether each position gets the position of the token to predict
    grid: tuple[int, int] | None = None  # rows and columns of the tokens after the prefix; None = a sequence
    prefix_tokens: int = 0  # tokens before the grid


class Generator(nn.Module, ABC):
    """Class-conditional next-token prediction over the tokens of an image.

    features: hidden features to return besides the logits, with their heads; none for sampling.
    """

    prefix: int  # P
    output_name: str  # of the output matrix
    blocks: nn.ModuleList
    embeddings: nn.Embedding  # rows: codes, one mask token, classes, the null class
    codebook: Tensor  # float [K, Z], of a tied model alone
    codebook_proj: nn.Linear | None  # codes to width D; None = nothing is tied

    def __init__(self, shape: Shape, features: Sequence[Feature]) -> None:
        super().__init__()
        self.shape, self.features = shape, tuple(features)
        # Set by `with_fixed_codes` alone. Plain attributes, so that they are in no weight file.
        self.fixed_codes: Tensor | None = None
        self.fixed_table: Tensor | None = None
        self.num_classes, self.codebook_size, self.num_tokens = (
            shape.num_classes,
            shape.codebook_size,
            shape.num_tokens,
        )

    def _build_ends(self) -> None:
        """Makes embeddings, output matrix and heads. Subclasses call it where their weight files have these parameters."""
        shape = self.shape
        if shape.tie_codebook is None:
            self.codebook_proj = None
        else:
            # Set from the tokenizer (`set_codebook`), so it is in no checkpoint and has no gradient.
            self.register_buffer("codebook", torch.empty(shape.codebook_size, shape.codebook_dim), persistent=False)
            self.codebook_proj = nn.Linear(shape.codebook_dim, shape.width, bias=False)
        for feature in self.features:
            if feature.make_head is not None and feature.head is not None:
                folder, _, name = feature.head.rpartition(".")
                if folder and not hasattr(self, folder):
                    self.add_module(folder, nn.Module())
                parent = self.get_submodule(folder)
                if not hasattr(parent, name):  # an earlier feature may have the same head
                    parent.add_module(name, feature.make_head())

    def heads(self) -> dict[str, nn.Module]:
        """The modules that features pass through, by name."""
        return {feature.head: self.get_submodule(feature.head) for feature in self.features if feature.head is not None}

    def separate_heads(self) -> list[nn.Module]:
        """The heads that run once per forward pass, because only one feature passes through each."""
        uses = Counter(feature.head for feature in self.features)
        return [head for name, head in self.heads().items() if uses[name] == 1]

    @property
    def null_class(self) -> int:
        """The id of the null class of classifier-free guidance."""
        return self.num_classes

    def set_codebook(self, codebook: Tensor) -> None:
        """Sets the codebook, float [K, Z], of a model with tied embeddings. Other models ignore it."""
        if self.codebook_proj is not None:
            self.codebook = codebook.to(self.codebook_proj.weight)

    def forward(
        self, tokens: Tensor, classes: Tensor, class_index: Tensor | None = None, order: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The logits of every token given the tokens before it, and the features.

        tokens: int64 [B, N], the context (noisy or not), in the order of prediction. classes: int64 [U], class ids with
        null_class = no class. class_index: int64 [B], the index into `classes` of each image; None when they are one per
        image. order: int64 [B or 1, N], the position in the image of each token; None = in stored order.

        Returns "logits" [B, N, K] (logits[:, t] predicts token t) and each feature by its name: [B, N, D] or [B, N-1, D] at
        its positions, or the output of its head.
        """
        class_embedding = self.class_embedding(classes)
        last_until = max((feature.tap for feature in self.features if feature.positions == "own"), default=-1)
        length = self.prefix + self.num_tokens - (last_until < 0)
        x = self.sequence(
            tokens, class_embedding if class_index is None else class_embedding[class_index], order, length
        )
        arguments = self.block_arguments(class_embedding, class_index, order, length)
        output: dict[str, Tensor] = {}
        for done in range(len(self.blocks) + 1):
            for feature in self.features:
                if done == feature.tap:
                    hidden = self._at(feature.positions, x)
                    output[feature.name] = hidden if feature.head is None else self.get_submodule(feature.head)(hidden)
            if done == last_until:
                length = self.prefix + self.num_tokens - 1
                x, arguments = x[:, :length], self.block_arguments(class_embedding, class_index, order, length)
            if done < len(self.blocks):
                x = self.blocks[done](x, *arguments)
        output["logits"] = self.logits(x[:, self.prefix - 1 :], class_embedding, class_index)
        return output

    def _at(self, positions: Positions, x: Tensor) -> Tensor:
        """x [B, length, D] at the positions of a feature, [B, N or N-1, D]."""
        start = self.prefix - (positions == "predicting")
        return x[:, start : start + self.num_tokens - (positions == "inner")]

    @abstractmethod
    def sequence(self, tokens: Tensor, class_embedding: Tensor, order: Tensor | None, length: int) -> Tensor:
        """The input [B, length, D] of tokens [B, N] and class_embedding [B, D]."""

    @abstractmethod
    def block_arguments(
        self, class_embedding: Tensor, class_index: Tensor | None, order: Tensor | None, length: int
    ) -> tuple[Any, ...]:
        """The arguments of each block besides x [B, length, D]."""

    @abstractmethod
    def logits(self, x: Tensor, class_embedding: Tensor, class_index: Tensor | None) -> Tensor:
        """The logits, [B, N, K], from the last block's output at the N predicting positions, x [B, N, D]."""

    @abstractmethod
    def decoding(self, classes: Tensor, class_index: Tensor, order: Tensor | None) -> Decoding:
        """The state of cached decoding, with everything that does not depend on the tokens computed in advance.

        classes: int64 [U]; class_index: int64 [R]; order: int64 [R or 1, N].
        """

    def class_embedding(self, classes: Tensor) -> Tensor:
        """The embeddings, [U, D], of class ids (int64 [U])."""
        return self.embeddings(classes + self.codebook_size + 1)

    def token_embedding(self, tokens: Tensor) -> Tensor:
        """The embeddings, [..., D], of token ids. The mask token of noisy contexts has id K."""
        if self.shape.tie_codebook not in ("input", "both"):
            return self.embeddings(tokens)
        return F.embedding(tokens, self._tied_table() if self.fixed_table is None else self.fixed_table)

    def token_logits(self, x: Tensor) -> Tensor:
        """The logits, [..., K], of normalized features [..., D]."""
        output = getattr(self, self.output_name)
        if self.shape.tie_codebook not in ("output", "both"):
            return output(x)
        return output(F.linear(x, self._code_embeddings().to(x.dtype)))

    def _tied_table(self) -> Tensor:
        """The embeddings of all codes and the mask token, [K + 1, D]."""
        mask = self.embeddings(torch.full((1,), self.codebook_size, device=self.codebook.device))
        return torch.cat((self._code_embeddings().to(mask.dtype), mask))

    def _code_embeddings(self) -> Tensor:
        if self.fixed_codes is not None:
            return self.fixed_codes
        assert self.codebook_proj is not None, "nothing is tied"
        # FSDP2 casts weights to bf16, and no buffers.
        return self.codebook_proj(self.codebook.to(self.codebook_proj.weight.dtype))

    @torch.no_grad()
    def with_fixed_codes(self) -> Generator:
        """A copy of the model for decoding, with the embeddings of a tied codebook computed once.

        It shares all weights, but later changes of the projection have no effect on it. Returns the model itself without tied
        embeddings.
        """
        if self.codebook_proj is None:
            return self
        fixed = copy.copy(self)
        fixed.fixed_codes = self._code_embeddings()
        fixed.fixed_table = fixed._tied_table()
        return fixed

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initializes every weight as a function of (seed, name), so that other depths or heads do not change the other weights.

        Truncated normal with standard deviation 0.02, biases 0, AdaLN-zero: each block starts as the identity.
        """
        for name, weight in self.named_parameters():
            generator = torch.Generator().manual_seed(rng.fold(seed, rng.Purpose.WEIGHT_INIT, crc32(name.encode())))
            if "adaLN_modulation" in name or name == "cls_token" or name.endswith("bias"):
                weight.zero_()
            elif "norm" in name:
                weight.fill_(1.0)
            else:
                values = torch.empty(weight.shape, dtype=torch.float32)
                weight.copy_(nn.init.trunc_normal_(values, std=0.02, a=-2.0, b=2.0, generator=generator))


def is_head(name: str) -> bool:
    """Whether a parameter belongs to a head of a loss term, which sampling does not need."""
    return "align_mlp" in name or name.startswith("term_heads.")


class OutputBias(nn.Module):
    """The bias of an output layer whose weight matrix is tied to the codebook."""

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(codebook_size))

    def forward(self, scores: Tensor) -> Tensor:
        return scores + self.bias


def output_matrix(shape: Shape) -> nn.Module:
    """The output layer from features to logits; only its bias where the weight matrix is tied to the codebook."""
    if shape.tie_codebook in ("output", "both"):
        return OutputBias(shape.codebook_size)
    return nn.Linear(shape.width, shape.codebook_size)


class Decoding(ABC):
    """The precomputed tables of one batch for cached decoding."""

    blocks: Sequence[nn.Module]

    @abstractmethod
    def prefix(self) -> Tensor:
        """The input at the positions of the prefix, [R, P, D]."""

    @abstractmethod
    def token(self, tokens: Tensor, step: int) -> Tensor:
        """The input at the position of token `step`, [R, 1, D]; tokens: int64 [R]."""

    def block(self, number: int, x: Tensor, start: int, attend: Attend) -> Tensor:
        """The output of one block for x [R, s, D], the positions from `start` on."""
        return self.through(self.blocks[number], attend, x, *self.arguments(number, start, x.shape[1]))

    @abstractmethod
    def arguments(self, number: int, start: int, count: int) -> tuple[Tensor, ...]:
        """The tensors besides x that a block needs at `count` positions from `start` on."""

    @staticmethod
    @abstractmethod
    def through(block: Any, attend: Attend, x: Tensor, *arguments: Tensor) -> Tensor:
        """The output of a block. Depends on its arguments alone, so that one compiled form serves all blocks and steps."""

    @abstractmethod
    def logits(self, x: Tensor, position: int) -> Tensor:
        """The logits, [R, K], from the last block's output at one position, x [R, 1, D]."""
