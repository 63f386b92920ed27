"""Puts what a checkpoint holds into a model or a strategy."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from rear_scale.checkpoint import released as official
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.model import Generator
from rear_scale.optim.groups import Rule
from rear_scale.parallel.strategy import Strategy


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Fills a plain model. It may lack parameters of the checkpoint (the heads), but not have others."""
    read = checkpoint.reader("param")
    model.load_state_dict({name: read(name) for name, _ in model.named_parameters()})


def load_generator_weights(found: Checkpoint, model: Generator) -> None:
    """Fills a model in place, whatever its device and dtype, one weight at a time. Heads that the model lacks are left out.

    Raises InputError unless all weights of the source but heads have their place in it, and are finite.
    """
    read, own = found.reader("param"), model.state_dict()
    names = [name for name in found.names() if name in own or not official.is_head(name)]
    shapes = {name: read(name).to("meta") for name in names}
    official.check_fits(shapes, model, str(found.path), heads_optional=True)
    for name in names:
        # Through a mapping of its own: what was read through one counts as memory of the process while that one lasts.
        weight = found.reader("param")(name)
        if not weight.isfinite().all():
            raise InputError(
                f"{found.path}: {name} holds values that are not finite, which samples cannot be drawn from. "
                "Use an earlier checkpoint, or get the file again"
            )
        own[name].copy_(weight)


def restore(checkpoint: Checkpoint, strategy: Strategy) -> None:
    """Sets master weights and moments of a strategy that was built around a model with the checkpoint's weights in it.

    All ranks must call this. Raises InputError when the checkpoint has the states of other rules (check_states). (An engine's
    copies of the weights are made when it is built, and not set again here.)
    """
    check_states(checkpoint, strategy.rules, strategy.cfg)
    for state_name in strategy.state_names:
        # Averaging may begin at any time: with the weights as they are then.
        stored = "param" if state_name == "ema" and not checkpoint.has("ema") else state_name
        strategy.load_tensors(state_name, checkpoint.reader(stored), checkpoint.meta["optimizer_step"])


def check_states(checkpoint: Checkpoint, rules: Mapping[str, Rule], cfg: ExperimentConfig) -> None:
    """Raises InputError when a checkpoint's optimizer states are not those that the rules of the parameters name."""
    stored: dict[str, set[str]] = {name: set() for name in rules}
    for key in checkpoint.meta["index"]:
        state_name, _, name = key.partition("/")
        if state_name not in ("param", "ema") and name in stored:
            stored[name].add(state_name)
    for name, rule in rules.items():
        if stored[name] != set(rule.states):
            raise InputError(
                f"{checkpoint.path} has {_listed(stored[name])} of {name}, but optim.name={cfg.optim.name} updates it with "
                f"{_listed(rule.states)}. Set optim.name as it was trained, or begin another run.dir from its weights with "
                f"train.init_from={checkpoint.path}"
            )


def _listed(states: Collection[str]) -> str:
    return " and ".join(sorted(states)) or "no optimizer state"
