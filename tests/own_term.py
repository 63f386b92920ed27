"""Terms of the loss as a user adds them, in one file: on the logits, on features after a block, and with a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from rear_scale.config import InputError
from rear_scale.objective.terms import Feature, Task, Term, register


@register
class ZLoss(Term):
    name = "z"
    reports = ("log_z",)

    def __call__(self, output: Mapping[str, Tensor], task: Task, directions: Tensor) -> tuple[Tensor, ...]:
        log_z = output["logits"].float().logsumexp(-1)
        return log_z.square().mean(), log_z.mean()


@dataclass
class AtTap(Term.Settings):
    tap: int = 1


@register
class Smooth(Term):
    """Features that change little from one position to the next."""

    name = "smooth"
    Settings = AtTap

    def features(self) -> list[Feature]:
        return [Feature("smooth", self.settings.tap)]

    def __call__(self, output: Mapping[str, Tensor], task: Task, directions: Tensor) -> Tensor:
        return output["smooth"].float().diff(dim=1).square().mean()


@register
class Ahead(Term):
    """The token after the next one, predicted by a head of its own."""

    name = "ahead"
    Settings = AtTap

    def features(self) -> list[Feature]:
        if self.cfg.tokenizer.num_tokens < 2:
            raise InputError("objective.terms.ahead needs images of two tokens or more. Leave it out")
        return [Feature("ahead", self.settings.tap, make_head=self._head)]

    def _head(self) -> nn.Module:
        return nn.Linear(self.cfg.model.width, self.cfg.tokenizer.codebook_size)

    def __call__(self, output: Mapping[str, Tensor], task: Task, directions: Tensor) -> Tensor:
        return F.cross_entropy(output["ahead"][:, :-1].flatten(0, 1).float(), task.tokens[:, 1:].flatten())
