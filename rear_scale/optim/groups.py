"""The update rule of each parameter: its optimizer, weight decay, learning rate and states.

optim.name chooses a function from (parameter name, weight, config) to a Rule. A new one is a module that registers its function,
and a line in config.schema.OPTIMIZERS that names the module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rear_scale.config import ExperimentConfig, OptimConfig
from rear_scale.config.schema import OPTIMIZERS, WHOLE_MATRIX_OPTIMIZERS
from rear_scale.optim.parametrization import scale_of
from rear_scale.optim.posthoc_ema import is_average
from rear_scale.optim.whole_matrix import MatrixSize, WholeMatrix

Groups = list[dict[str, Any]]  # parameter groups, as torch.optim takes them

# The published rule (train_utils.py of the released code): a name with one of these, or fewer than two dimensions,
# means no weight decay. "ln" also matches the final AdaLN (adaln_before_head).
_NO_DECAY = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")


def _counts_no_steps(optimizer: torch.optim.Optimizer, weight: Tensor, step: int) -> None:
    pass


@dataclass(frozen=True)
class Rule:
    """The way in which some of the parameters are updated.

    The update must be elementwise, because the optimizer gets flat partitions of many weights from ZeRO, and shards from FSDP2,
    unless `whole_matrix` says otherwise: then `make` returns a WholeMatrixOptimizer, and strategies that cannot give it whole
    matrices (Facts.no_whole_matrices) refuse the rule.
    A state is a tensor in `optimizer.state[weight]` of the weight's shape, float32, and zero before the first update;
    checkpoints store it as STATE/PARAMETER.
    """

    name: str  # parameters with equal rules are one group; groups are sorted by this name
    # (optim, groups with weight_decay, device) -> optimizer; rules with the same function share one optimizer
    make: Callable[[OptimConfig, Groups, torch.device], torch.optim.Optimizer]
    states: tuple[str, ...]
    weight_decay: float = 0.0
    lr_multiplier: float = 1.0  # times the learning rate of the schedule
    # Under optim.parametrization=mup, the learning rate of a matrix inside the model is divided by (width / base width) to this
    # power: 1 where the entries of an update have a size that does not depend on the width (Adam), 0 where its spectral norm
    # has, 1/2 where an orthogonal update is scaled to entries of such a size.
    width_exponent: float = 1.0
    # Sets the number of updates that a weight has had, for an optimizer that stores it
    set_step: Callable[[torch.optim.Optimizer, Tensor, int], None] = _counts_no_steps
    # The part of the update that needs whole matrices; None = the update is elementwise
    whole_matrix: WholeMatrix | None = None

    def __post_init__(self) -> None:
        for state in self.states:
            if not state.isidentifier() or state == "param" or is_average(state):
                raise ValueError(f"{state!r} is not allowed as the name of a state of the rule {self.name}")


ChooseRule = Callable[[str, Tensor, ExperimentConfig], Rule]
_registered: dict[str, ChooseRule] = {}


def register(name: str, choose: ChooseRule, *, whole_matrices: bool = False) -> None:
    """Registers optim.name=`name`: each parameter gets the rule that `choose` returns for it.

    whole_matrices: whether there are rules with `whole_matrix`, so that validation refuses strategies that cannot give them
    whole matrices. Every process that loads or uses such a config must have called this.
    """
    OPTIMIZERS.setdefault(name, choose.__module__)
    if whole_matrices:
        WHOLE_MATRIX_OPTIMIZERS.add(name)
    _registered[name] = choose


def rules_of(model: nn.Module, cfg: ExperimentConfig) -> dict[str, Rule]:
    """The rule of each parameter by name, in the order of the model.

    Depends on names and shapes alone: the model may be on the meta device, but must not be sharded yet.
    """
    name = cfg.optim.name
    if name not in _registered:
        import_module(OPTIMIZERS[name])
    choose = _registered[name]
    return {key: _scaled(choose(key, weight, cfg), key, weight, cfg) for key, weight in model.named_parameters()}


def _scaled(rule: Rule, name: str, weight: Tensor, cfg: ExperimentConfig) -> Rule:
    """The rule with the factors of optim.parametrization. Learning rate times weight decay stays what it is."""
    scale = scale_of(name, weight, cfg, rule.width_exponent)
    if scale.rate == 1:
        return rule
    return replace(
        rule,
        name=f"{rule.name}_{scale.kind}",
        lr_multiplier=rule.lr_multiplier * scale.rate,
        weight_decay=rule.weight_decay / scale.rate,
    )


# Cached per model and optim section, because the planner calls it thousands of times.
_sizes: WeakKeyDictionary[nn.Module, dict[str, dict[Rule, int]]] = WeakKeyDictionary()


def group_sizes(model: nn.Module, cfg: ExperimentConfig) -> dict[Rule, int]:
    """The number of weights of each rule, that is of each parameter group. The model must not be sharded yet, as for rules_of."""
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
    """The mean number of optimizer states per weight: 2.0 for AdamW, without averages of the weights."""
    sizes = group_sizes(model, cfg)
    return sum(len(rule.states) * size for rule, size in sizes.items()) / sum(sizes.values())


_matrices: WeakKeyDictionary[nn.Module, dict[str, tuple[MatrixSize, ...]]] = WeakKeyDictionary()


def whole_matrices(model: nn.Module, cfg: ExperimentConfig) -> tuple[MatrixSize, ...]:
    """The sizes of the matrices that an update transforms as a whole. The model must not be sharded yet, as for rules_of."""
    known = _matrices.setdefault(model, {})
    key = repr((cfg.optim, cfg.train.precision))
    if key not in known:
        rules = rules_of(model, cfg)
        sizes: list[MatrixSize] = []
        for name, weight in model.named_parameters():
            whole = rules[name].whole_matrix
            if whole is not None:
                rows, columns = whole.part_shape(weight.shape)
                size = MatrixSize(rows * columns, whole.transform.flops(rows, columns), whole.transform.dtype.itemsize)
                sizes += [size] * whole.parts
        known[key] = tuple(sizes)
    return known[key]


def decays(name: str, weight: Tensor, which: str) -> bool:
    """Whether weight decay applies to a parameter. which: the value of optim.decay_parameters."""
    return weight.ndim >= 2 and (which == "matrices" or not any(fragment in name for fragment in _NO_DECAY))


def make_optimizer(
    model: nn.Module, rules: Mapping[str, Rule], optim: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer over one group of parameters per rule, each with its rule as group["rule"]. Learning rates are set later,
    by set_rates. Raises InputError as the functions of the rules do."""
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

    The list of groups, their parameters and the states are attributes of this object, so that an engine may replace them.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        super().__init__([group for one in optimizers for group in one.param_groups], {})
        self.optimizers = {one.param_groups[0]["rule"].make: one for one in optimizers}

    def of_rule(self, rule: Rule) -> torch.optim.Optimizer:
        """The optimizer of a rule, with the current groups and states."""
        optimizer = self.optimizers[rule.make]
        optimizer.param_groups = [group for group in self.param_groups if group["rule"].make is rule.make]
        optimizer.state = self.state
        return optimizer

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no engine passes a closure
        for rule in {group["rule"].make: group["rule"] for group in self.param_groups if group["params"]}.values():
            self.of_rule(rule).step()


def optimizers_in(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that update weights: those of a Composite, or the one itself."""
    return list(optimizer.optimizers.values()) if isinstance(optimizer, Composite) else [optimizer]


def set_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of each group: `lr` times the multiplier of its rule."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rule"].lr_multiplier


def prepare_states(optimizer: torch.optim.Optimizer, rule: Rule, weight: Tensor, step: int) -> None:
    """Adds the missing states of a weight as zeros, and sets the number of updates that it has had."""
    state = optimizer.state[weight]
    for name in rule.states:
        if name not in state:
            state[name] = torch.zeros_like(weight)
    rule.set_step(optimizer.of_rule(rule) if isinstance(optimizer, Composite) else optimizer, weight, step)
