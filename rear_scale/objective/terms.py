"""The terms of the training loss by name: the features that a term reads, its weight, and its value.

A new term is one file. In this folder it is imported automatically; elsewhere it must be imported before a model is built:

    @register
    class ZLoss(Term):
        name = "z"

        def __call__(self, output, task, directions):
            return output["logits"].float().logsumexp(-1).square().mean()

`objective.terms.z.weight=1e-4`, on the command line or in a file of configs/objective, then adds 1e-4 times that value to
the loss, and `loss_z` and `val_loss_z` to the metrics.
"""

# B images, N tokens of an image, K codes, D width of the model

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from rear_scale.config import ExperimentConfig, InputError, shown
from rear_scale.config.fields import suggest
from rear_scale.config.overrides import type_name

Positions = Literal["predicting", "own", "inner"]

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass
class Task:
    """The context and the targets of a micro-batch, in the order of prediction."""

    context: Tensor  # int64 [B, N], noisy or not
    tokens: Tensor  # int64 [B, N], clean
    order: Tensor | None  # int64 [B or 1, N], the position in the image of each token; None = as stored
    replaced: Tensor | None  # bool [B, N], the tokens of the context that were replaced; None = none


@dataclass(frozen=True)
class Feature:
    """Hidden features that a model returns in training. A model for sampling has neither these nor their heads.

    positions: "predicting" are the N positions that predict tokens 0 .. N-1; "own" those of tokens 0 .. N-1 themselves;
    "inner" those of tokens 0 .. N-2 themselves, [B, N-1, D].
    """

    name: str  # its key in the model's output
    tap: int  # number of blocks before it: 0 = the embeddings
    positions: Positions = "predicting"
    make_head: Callable[[], nn.Module] | None = (
        None  # a module that is applied to the features and trained with the model
    )
    head_name: str | None = None  # prefix of the names of the head's weights; None = term_heads.NAME
    head_products: int | None = None  # multiplications of the head at one position; None = the elements of its matrices

    @property
    def head(self) -> str | None:
        """The name of the head in the model; None = the features are returned without a head."""
        return None if self.make_head is None else self.head_name or f"term_heads.{self.name}"


class Term(ABC):
    """One term of the loss. `values` are the settings of objective.terms.NAME; raises InputError for wrong ones."""

    name: ClassVar[str]
    reports: ClassVar[tuple[str, ...]] = ()  # names of additional metrics, unique among all metrics
    built_in: ClassVar[bool] = False  # whether it is part of every loss, with settings elsewhere in the config

    @dataclass
    class Settings:
        """The settings with their defaults; a term with more settings derives its own dataclass from this one."""

        weight: float = 1.0

    weight: float

    def __init__(self, cfg: ExperimentConfig, values: Mapping[str, Any]) -> None:
        self.cfg = cfg
        self.settings = _typed(type(self).Settings, values, f"objective.terms.{self.name}")
        self.weight = self.settings.weight
        if not math.isfinite(self.weight):
            raise InputError(
                f"objective.terms.{self.name}.weight={self.weight} is not finite. Use a number such as 0.1"
            )

    def features(self) -> list[Feature]:
        """The features of the model that it reads besides the logits, with unique names: its own name, or that with a suffix."""
        return []

    @property
    def reads(self) -> tuple[str, ...]:
        """The keys of the model's output that it needs. Without them the term is left out, and its statistics are NaN."""
        return tuple(feature.name for feature in self.features())

    @abstractmethod
    def __call__(self, output: Mapping[str, Tensor], task: Task, directions: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The value averaged over the batch, a float32 scalar without the weight; then the values of `reports`, if any.

        output: "logits" [B, N, K], of which logits[:, t] predicts task.tokens[:, t], and the features by name. directions:
        float32 [K, Z], the codebook's rows at unit length.
        """


_TERMS: dict[str, type[Term]] = {}
_TermClass = TypeVar("_TermClass", bound=type[Term])


def register(term: _TermClass) -> _TermClass:
    """A class decorator that registers a term by name. Raises ValueError for a name that is taken or not [a-z][a-z0-9_]*."""
    if not _NAME.fullmatch(term.name) or term.name in _TERMS:
        raise ValueError(f"a term {term.name!r} cannot be registered: the name is taken, or is not {_NAME.pattern}")
    _TERMS[term.name] = term
    return term


def terms_of(cfg: ExperimentConfig) -> tuple[Term, ...]:
    """The terms of a config's loss: the built-in ones, then those of objective.terms in the order of their names.

    Raises InputError for an unknown term, for wrong settings, and for a tap that the model does not have.
    """
    given = cfg.objective.terms
    for name in given:
        term = _TERMS.get(name)
        if term is None:
            known = sorted(known for known, other in _TERMS.items() if not other.built_in)
            raise InputError(
                f"objective.terms.{shown(name)} is not a registered term ({', '.join(known) or 'there are none'}). Put the "
                f"file that registers it into rear_scale/objective, or leave it out{suggest(name, known)}"
            )
        if term.built_in:
            raise InputError(
                f"objective.terms.{name}: {name} is part of every loss and has no settings here. Leave it out; "
                "objective.heads sets the terms of the reAR heads"
            )
    built_in = [term(cfg, {}) for term in _TERMS.values() if term.built_in]
    terms = (*built_in, *(_TERMS[name](cfg, given[name]) for name in sorted(given)))
    _check_features(terms, cfg.model.depth)
    return terms


def features_of(cfg: ExperimentConfig) -> list[Feature]:
    """The features that the terms of a config's loss read. Raises InputError as `terms_of` does."""
    return [feature for term in terms_of(cfg) for feature in term.features()]


def _check_features(terms: tuple[Term, ...], depth: int) -> None:
    taken = {"logits"}
    for term in terms:
        for feature in term.features():
            if feature.name in taken or not _NAME.fullmatch(feature.name):
                raise ValueError(
                    f"feature {feature.name!r} of the term {term.name}: the name is taken, or is not {_NAME.pattern}"
                )
            taken.add(feature.name)
            # The taps of built-in terms are checked with the config.
            if not (term.built_in or 0 <= feature.tap <= depth):
                raise InputError(
                    f"objective.terms.{term.name} reads features after {feature.tap} blocks, outside "
                    f"0..model.depth={depth}. Use a tap from 0 for the embeddings to {depth} for the last block's output"
                )


def _typed(settings: type[Any], values: Mapping[str, Any], section: str) -> Any:
    """The settings as an instance of their dataclass. Raises InputError for unknown names and wrong types."""
    known = list(settings.__dataclass_fields__)
    for name in values:
        if name not in known:
            raise InputError(
                f"{section}.{shown(str(name))} is not a setting of that term{suggest(str(name), known)}. "
                f"Known here: {', '.join(known)}"
            )
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(settings), dict(values)))
    except OmegaConfBaseException as error:
        name = re.split(r"[.\[]", error.full_key or "")[0]
        wanted = type_name(get_type_hints(settings).get(name))
        raise InputError(
            f"{section}.{name}={shown(str(values.get(name)))} is of the wrong type: it takes {wanted}. Set another value"
        ) from None
