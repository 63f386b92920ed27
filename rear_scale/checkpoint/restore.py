"""Loading of checkpoints into models and strategies."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from rear_scale.checkpoint import released as official
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.model import Generator
from rear_scale.optim.groups import Rule
from rear_scale.optim.posthoc_ema import is_average
from rear_scale.parallel.strategy import Strategy


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Loads the weights into a plain model, which may lack parameters of the checkpoint (heads), but not have others."""
    read = checkpoint.reader("param")
    model.load_state_dict({name: read(name) for name, _ in model.named_parameters()})


def load_generator_weights(checkpoint: Checkpoint, model: Generator) -> None:
    """Loads the weights into a model in place, whatever its device and dtype, one at a time, without heads that it lacks.

    Raises InputError for weights other than heads that do not fit, and for values that are not finite.
    """
    own = model.state_dict()
    names = [name for name in checkpoint.names() if name in own or not official.is_head(name)]
    stored = checkpoint.shapes()
    shapes = {name: torch.empty(stored[name], device="meta") for name in names}
    official.check_fits(shapes, model, str(checkpoint.path), heads_optional=True)
    for name in names:
        # A new reader, and so a new mapping of the file, per weight: pages read through a mapping count towards the memory of
        # the process until it is closed.
        weight = checkpoint.reader("param")(name)
        if not weight.isfinite().all():
            raise InputError(
                f"{checkpoint.path}: {name} holds values that are not finite, so no samples can be made. "
                "Use an earlier checkpoint, or get the file again"
            )
        own[name].copy_(weight)


def restore(checkpoint: Checkpoint, strategy: Strategy) -> None:
    """Sets the master weights and optimizer states of a strategy, built with a model that has the checkpoint's weights already.

    All ranks must call this. Raises InputError for the states of other rules (check_states). An engine copies the weights when
    it is built, so they are not set again here.
    """
    check_states(checkpoint, strategy.rules, strategy.cfg)
    for state_name in strategy.state_names:
        # A checkpoint without an average of the weights starts it from the current weights, as if they had always been these.
        stored = "param" if is_average(state_name) and not checkpoint.has(state_name) else state_name
        strategy.load_tensors(state_name, checkpoint.reader(stored), checkpoint.meta["optimizer_step"])


def check_states(checkpoint: Checkpoint, rules: Mapping[str, Rule], cfg: ExperimentConfig) -> None:
    """Raises InputError when the optimizer states of a checkpoint are not those of the parameters' rules."""
    stored: dict[str, set[str]] = {name: set() for name in rules}
    for key in checkpoint.meta["index"]:
        state_name, _, name = key.partition("/")
        if state_name != "param" and not is_average(state_name) and name in stored:
            stored[name].add(state_name)
    for name, rule in rules.items():
        if stored[name] != set(rule.states):
            raise InputError(
                f"{checkpoint.path} has {_listed(stored[name])} of {name}, but optim.name={cfg.optim.name} updates it with "
                f"{_listed(rule.states)}. Set optim.name as in its training, or start another run.dir from its weights with "
                f"train.init_from={checkpoint.path}"
            )


def _listed(states: Collection[str]) -> str:
    return " and ".join(sorted(states)) or "no optimizer state"
