"""Which rule a parameter follows: its optimizer, weight decay, learning rate and states.

optim.name chooses a function from (parameter name, weight, config) to a Rule. A new one is a module that registers its function,
and a line in config.schema.OPTIMIZERS that names the module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rear_scale.config import ExperimentConfig, OptimConfig
from rear_scale.config.schema import OPTIMIZERS

Groups = list[dict[str, Any]]  # of parameters, as torch.optim takes them

# The published rule (train_utils.py of the released code): a name with one of these, or fewer than two dimensions,
# means no weight decay. "ln" takes the final AdaLN (adaln_before_head) out too.
_NO_DECAY = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")
# Checkpoints hold these of every parameter, whatever its rule.
_RESERVED = ("param", "ema")


def _counts_no_steps(optimizer: torch.optim.Optimizer, weight: Tensor, step: int) -> None:
    pass


@dataclass(frozen=True)
class Rule:
    """How some of the parameters are updated.

    The update must be elementwise, because ZeRO hands flat partitions of many weights to the optimizer and FSDP2 hands shards.
    A state is a tensor in `optimizer.state[weight]` of the weight's shape, float32, and zero before the first update;
    checkpoints store it as STATE/PARAMETER.
    """

    name: str  # parameters of equal rules are one group; groups are sorted by this name
    # (optim, groups with weight_decay, device) -> optimizer; rules with the same function share one optimizer
    make: Callable[[OptimConfig, Groups, torch.device], torch.optim.Optimizer]
    states: tuple[str, ...]
    weight_decay: float = 0.0
    lr_multiplier: float = 1.0  # times the learning rate of the schedule
    # Sets the number of updates that a weight has had, where the optimizer keeps such a number
    set_step: Callable[[torch.optim.Optimizer, Tensor, int], None] = _counts_no_steps

    def __post_init__(self) -> None:
        for state in self.states:
            if not state.isidentifier() or state in _RESERVED:
                raise ValueError(f"{state!r} cannot name a state of the rule {self.name}")


ChooseRule = Callable[[str, Tensor, ExperimentConfig], Rule]
_registered: dict[str, ChooseRule] = {}


def register(name: str, choose: ChooseRule) -> None:
    """optim.name=`name` then gives each parameter the rule that `choose` returns for it. Every process that loads or uses
    such a config must have called this."""
    OPTIMIZERS.setdefault(name, choose.__module__)
    _registered[name] = choose


def rules_of(model: nn.Module, cfg: ExperimentConfig) -> dict[str, Rule]:
    """The rule of each parameter by its name, in the order of the model. Names and shapes are enough: the model may be on the
    meta device, but must not be sharded yet."""
    name = cfg.optim.name
    if name not in _registered:
        import_module(OPTIMIZERS[name])
    choose = _registered[name]
    return {key: choose(key, weight, cfg) for key, weight in model.named_parameters()}


# Per model and optim section: the planner asks thousands of times.
_sizes: WeakKeyDictionary[nn.Module, dict[str, dict[Rule, int]]] = WeakKeyDictionary()


def group_sizes(model: nn.Module, cfg: ExperimentConfig) -> dict[Rule, int]:
    """The number of weights that follow each rule: one group of parameters of the optimizer. As for rules_of, the model must
    not be sharded yet."""
    known = _sizes.setdefault(model, {})
    key = repr(cfg.optim)
    if key not in known:
        sizes: Counter[Rule] = Counter()
        rules = rules_of(model, cfg)
        for name, weight in model.named_parameters():
            sizes[rules[name]] += weight.numel()
        known[key] = dict(sizes)
    return known[key]


def states_per_weight(model: nn.Module, cfg: ExperimentConfig) -> float:
    """The mean number of states that the rules keep of a weight: 2.0 for AdamW. The moving average of optim.ema_decay comes on
    top."""
    sizes = group_sizes(model, cfg)
    return sum(len(rule.states) * size for rule, size in sizes.items()) / sum(sizes.values())


def decays(name: str, weight: Tensor, which: str) -> bool:
    """Whether weight decay applies to a parameter. which: optim.decay_parameters."""
    return weight.ndim >= 2 and (which == "matrices" or not any(fragment in name for fragment in _NO_DECAY))


def make_optimizer(
    model: nn.Module, rules: Mapping[str, Rule], optim: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer over one group of parameters per rule, each with its rule as group["rule"]. Learning rates are set later,
    by set_rates. Raises InputError as the rules' own functions do."""
    named = dict(model.named_parameters())
    weights: dict[Rule, list[nn.Parameter]] = {}
    for name, rule in sorted(rules.items(), key=lambda item: item[1].name):
        weights.setdefault(rule, []).append(named[name])
    groups: dict[Any, Groups] = {}
    for rule, members in weights.items():
        group = {"params": members, "weight_decay": rule.weight_decay, "rule": rule}
        groups.setdefault(rule.make, []).append(group)
    made = [make(optim, own, device) for make, own in groups.items()]
    return made[0] if len(made) == 1 else Composite(made)


class Composite(torch.optim.Optimizer):
    """Several optimizers as one, for engines that take one. Each updates the groups of its own rules.

    An engine may replace the list of groups, the parameters of a group and the states, all of which are this object's.
    """

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = {part.param_groups[0]["rule"].make: part for part in parts}

    def part(self, rule: Rule) -> torch.optim.Optimizer:
        """The optimizer of a rule, with the present groups and states."""
        part = self.parts[rule.make]
        part.param_groups = [group for group in self.param_groups if group["rule"].make is rule.make]
        part.state = self.state
        return part

    def step(self, closure: None = None) -> None:
        for rule in {group["rule"].make: group["rule"] for group in self.param_groups if group["params"]}.values():
            self.part(rule).step()


def set_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of each group: `lr` times the multiplier of its rule."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rule"].lr_multiplier


def prepare_states(optimizer: torch.optim.Optimizer, rule: Rule, weight: Tensor, step: int) -> None:
    """Adds the states that a weight of an optimizer lacks, as zeros, and sets the number of updates that it has had."""
    state = optimizer.state[weight]
    for name in rule.states:
        if name not in state:
            state[name] = torch.zeros_like(weight)
    rule.set_step(optimizer.part(rule) if isinstance(optimizer, Composite) else optimizer, weight, step)
