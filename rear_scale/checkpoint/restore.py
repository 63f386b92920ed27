"""Puts what a checkpoint holds into a model or a strategy."""

from __future__ import annotations

from torch import nn

from rear_scale.checkpoint import released as official
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.config import InputError
from rear_scale.model import Generator
from rear_scale.parallel.strategy import Strategy


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Fills a plain model. It may lack parameters of the checkpoint (the heads), but not have others."""
    read = checkpoint.reader("param")
    model.load_state_dict({name: read(name) for name, _ in model.named_parameters()})


def load_generator_weights(found: Checkpoint, model: Generator) -> None:
    """Fills a model without heads in place, whatever its device and dtype, one weight at a time.

    Raises InputError unless all weights of the source but heads have their place in it, and are finite.
    """
    read, own = found.reader("param"), model.state_dict()
    names = [name for name in found.names() if not official.is_head(name)]
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

    All ranks must call this. (An engine's copies of the weights are made when it is built, and not set again here.)
    """
    for kind in strategy.kinds:
        # Averaging may begin at any time: with the weights as they are then.
        stored = "param" if kind == "ema" and not checkpoint.has("ema") else kind
        strategy.load_tensors(kind, checkpoint.reader(stored), checkpoint.meta["optimizer_step"])
