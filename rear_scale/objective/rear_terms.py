"""The loss terms of the papers: next-token prediction, and the codebook embedding regularization of reAR (Eq. 6)."""

# B images, N tokens of an image, Z width of a code

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from rear_scale.config import ExperimentConfig, HeadsConfig
from rear_scale.objective import losses
from rear_scale.objective.terms import Feature, Positions, Task, Term, register


@register
class NextToken(Term):
    """Cross-entropy per token (Eq. 5), with weight 1, and the fraction of correct argmax predictions."""

    name = "ar"
    reports = ("accuracy",)
    built_in = True

    def __init__(self, cfg: ExperimentConfig, values: Mapping[str, Any]) -> None:
        self.cfg, self.weight = cfg, 1.0

    def __call__(self, output: Mapping[str, Tensor], task: Task, directions: Tensor) -> tuple[Tensor, ...]:
        return losses.next_token(output["logits"], task.tokens)


class _Alignment(Term):
    """One of the two terms of Eq. 6. heads.lone_term has the factor that the released code gives it without the other."""

    built_in = True
    other: ClassVar[str]

    def __init__(self, cfg: ExperimentConfig, values: Mapping[str, Any]) -> None:
        self.cfg, self.heads, self.weight = cfg, cfg.objective.heads, cfg.objective.heads.weight

    def features(self) -> list[Feature]:
        both = alignment_features(self.heads, self.cfg.model.width, self.cfg.tokenizer.codebook_dim)
        return [feature for feature in both if feature.name == self.name]

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.name,)  # with a tap of None there is no such feature, and the statistic is NaN

    def __call__(self, output: Mapping[str, Tensor], task: Task, directions: Tensor) -> Tensor:
        # Clean targets under noisy context: "the embedding of the ground truth token as well" (section 3.2).
        targets, replaced = task.tokens, task.replaced
        if self.heads.positions == "eq6":
            inner = slice(0, -1) if self.name == "encode" else slice(1, None)
            targets, replaced = targets[:, inner], None if replaced is None else replaced[:, inner]
        clean = ~replaced if self.heads.encode_counts == "clean" and replaced is not None else None
        counted = [clean if self.name == "encode" else None]
        if self.heads.lone_term == "twice" and self.other not in output:
            counted = [clean, None]
        offset = 1.0 if self.heads.distance == "one_minus_cosine" else 0.0
        of_targets = directions[targets]
        first, *others = (
            losses.embedding_distance(output[self.name], of_targets, task.tokens.numel(), counted=mask, offset=offset)
            for mask in counted
        )
        return sum(others, start=first)


@register
class Encode(_Alignment):
    """The encode head, which predicts the codebook embedding of the current token."""

    name = "encode"
    other = "decode"


@register
class Decode(_Alignment):
    """The decode head, which predicts the codebook embedding of the next token."""

    name = "decode"
    other = "encode"


def alignment_features(heads: HeadsConfig, width: int, codebook_dim: int) -> list[Feature]:
    """The features that the reAR heads read; a head's output is [B, N-1, Z] with heads.positions=eq6, [B, N, Z] with all."""

    def make_head() -> nn.Sequential:
        return alignment_head(width, heads.hidden, codebook_dim, heads.form)

    every = heads.positions == "all"
    taps: tuple[tuple[str, int | None, Positions], ...] = (
        ("encode", heads.encode_tap, "own"),
        ("decode", heads.decode_tap, "predicting"),
    )
    products = heads.hidden * (width + codebook_dim + (heads.hidden if heads.form == "released" else 0))
    return [
        Feature(
            name,
            tap,
            positions if every else "inner",
            make_head,
            "align_mlp" if heads.shared else f"{name}_align_mlp",
            products,
        )
        for name, tap, positions in taps
        if tap is not None
    ]


def alignment_head(width: int, hidden: int, codebook_dim: int, form: str) -> nn.Sequential:
    """A head. paper: two linear layers with a GELU between them (section 4.1, appendix A); released: three with SiLU."""
    if form == "released":
        return nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, codebook_dim)
        )
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, codebook_dim))
