"""The coordinate check of a parametrization (launchers/study.py coordinates): the size of activations against the width.

Models of several widths and of one depth make a few updates on synthetic tokens. For each layer, the check measures the rms of
its output over images, positions and coordinates (`size`), and the rms of the difference from its output at the start, for the
same input (`change`). Under muP neither grows with the width (Yang et al. 2022, arXiv:2203.03466, Appendix D.1 and Figure 5).
"""

# B images, N tokens of an image

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rear_scale import cli, text_table
from rear_scale.config import ExperimentConfig, InputError, derive
from rear_scale.config.schema import OPTIMIZERS
from rear_scale.figures import logarithmic, plt, png
from rear_scale.files import atomic_open, write_text_atomically
from rear_scale.model import Generator
from rear_scale.model.attention import Attention, sdpa
from rear_scale.objective import MicroBatch, Objective
from rear_scale.progress import progress
from rear_scale.scaling.widths import PARAMETRIZATIONS, SmallRun, at_width, numbers_of, world_of_one
from rear_scale.world import World

QUANTITIES = ("size", "change")
_WIDTHS, _UPDATES = "64,128,256,512", 10
# Before the user's overrides, so that those win. Heads of 16 and more, whose width grows as in the papers.
_SETTINGS = (
    "model.depth=4",
    "model.num_heads=4",
    "train.global_batch_size=8",
    "train.precision=fp32",
)
# Not the user's to choose: dropout would be a part of the measured changes, and hooks need blocks that are not compiled.
_FIXED = (
    "strategy=single",
    "train.compile=false",
    "train.activation_checkpointing=none",
    "model.dropout=0",
    "model.attn_dropout=0",
    "model.embed_dropout=0",
)
_OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class Row:
    """The measurements of one layer in one run."""

    parametrization: str
    optimizer: str
    seed: int
    width: int
    layer: str
    start: float  # rms at the start
    size: float  # rms after the updates
    change: float  # rms of the difference of the two


@dataclass(frozen=True)
class Growth:
    """How much one quantity of one layer grows: the largest ratio of its value at a width to that at the narrowest width."""

    parametrization: str
    optimizer: str
    layer: str
    quantity: str
    factor: float


def main(arguments: Sequence[str]) -> None:
    """The command line behind the word `coordinates`. Raises InputError for a config or a width that does not work."""
    parser = cli.make_parser(__doc__ or "")
    parser.prog += " coordinates"
    parser.add_argument("--widths", default=_WIDTHS, metavar="W,W", help=f"widths; mup's base is the first ({_WIDTHS})")
    parser.add_argument("--updates", type=int, default=_UPDATES, help=f"updates before measuring ({_UPDATES})")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of weights and tokens, averaged (1)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/study/coordinates"), help="folder of the CSV and the PNG"
    )
    command = cli.parse(parser, [*_SETTINGS, *arguments, *_FIXED])
    args = command.args
    if min(args.updates, args.seeds) < 1:
        raise InputError(f"--updates={args.updates} and --seeds={args.seeds} must be at least 1. Use 10 and 1")
    widths = numbers_of(args.widths, "--widths")
    optimizers = optimizers_of(command.cfg, command.given)
    runs = [
        replace(at_width(cfg, width, parametrization, widths[0]), run=replace(cfg.run, seed=cfg.run.seed + seed))
        for optimizer in optimizers
        for cfg in [replace(command.cfg, optim=replace(command.cfg.optim, name=optimizer))]
        for parametrization in PARAMETRIZATIONS
        for width in widths
        for seed in range(args.seeds)
    ]
    if args.dry_run:
        print(f"{len(runs)} runs of {args.updates} updates: {', '.join(optimizers)} at widths {widths} -> {args.out}")
        return
    rows = list(measured(runs, args.updates, world_of_one()))
    growths = growths_of(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(args.out / "coordinates.csv", as_csv(rows))
    with atomic_open(args.out / "coordinates.png") as file:
        file.write(figure(rows, command.cfg.optim.lr, args.updates))
    print(summary(growths))
    cli.end(args.out / "coordinates.png")


def optimizers_of(cfg: ExperimentConfig, given: Iterable[str]) -> list[str]:
    """The optimizers to check: the one that the user names with optim.name, else AdamW and Muon, as far as there are."""
    if "optim.name" in given:
        return [cfg.optim.name]
    return [name for name in _OPTIMIZERS if name in OPTIMIZERS]


def measured(runs: Sequence[ExperimentConfig], updates: int, world: World) -> Iterator[Row]:
    """The rows of each run: measurements before the first and after the last of its updates."""
    with progress("coordinates", len(runs), "run") as bar:
        for cfg in runs:
            yield from _measure(cfg, updates, world)
            bar.update()


def _measure(cfg: ExperimentConfig, updates: int, world: World) -> list[Row]:
    generator = torch.Generator().manual_seed(cfg.run.seed)
    codebook = torch.randn(cfg.tokenizer.codebook_size, cfg.tokenizer.codebook_dim, generator=generator)
    run = SmallRun(cfg, derive(cfg, 1, cfg.train.global_batch_size), codebook, world)
    probe, *batches = (synthetic_batch(cfg, run.objective, number, generator) for number in range(updates + 1))
    before = activations(run.model, probe.to(world.device))
    for step, batch in enumerate(batches, 1):
        run.update(batch, step, cfg.optim.lr)
    after = activations(run.model, probe.to(world.device))
    own = (cfg.optim.parametrization, cfg.optim.name, cfg.run.seed, cfg.model.width)
    return [
        Row(*own, layer, _rms(value), _rms(after[layer]), _rms(after[layer] - value)) for layer, value in before.items()
    ]


def synthetic_batch(cfg: ExperimentConfig, objective: Objective, number: int, generator: torch.Generator) -> MicroBatch:
    """A global batch of sequences that walk through the codes in small steps from a code of their class, so that something can be
    learnt. number: of the batch; its images have ids of their own."""
    B, N, K = cfg.train.global_batch_size, cfg.tokenizer.num_tokens, cfg.tokenizer.codebook_size
    labels = torch.randint(cfg.model.num_classes, (B,), generator=generator)
    walk = torch.randint(3, (B, N), generator=generator).cumsum(1)
    ids = torch.arange(number * B, (number + 1) * B)
    return objective.micro_batch((labels[:, None] * 7 + walk) % K, labels, ids, torch.zeros_like(ids))


@torch.no_grad()
def activations(model: Generator, batch: MicroBatch) -> dict[str, Tensor]:
    """The outputs of the layers by name, float32 on the CPU: the input of the first block, and of each block the modulation,
    attention's logits (before the softmax), attention, feed-forward and the block itself; the last norm; `logits` and heads."""
    found: dict[str, Tensor] = {}
    with _recorded(model, found):
        model.eval()
        output = model(batch.tokens, batch.classes, batch.class_index)
        model.train()
    found.update((name, value.float().cpu()) for name, value in output.items())
    return found


_RECORDED = re.compile(r"blocks\.\d+(\.attn|\.mlp|\.adaLN_modulation\.1)?|adaln_before_head|norm")


@contextmanager
def _recorded(model: Generator, found: dict[str, Tensor]) -> Iterator[None]:
    """A context manager in which the forward pass of a model puts its layers' outputs into `found`."""

    def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if name == "blocks.0":
            found["embedded"] = inputs[0].float().cpu()
        found[name] = output.float().cpu()

    def attend(name: str, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        scores = (query @ key.transpose(-1, -2)).float() / math.sqrt(query.shape[-1])
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        found[f"{name}.logits"] = scores[..., seen].cpu()
        return sdpa(query, key, value, dropout)

    named = dict(model.named_modules())
    handles = [
        module.register_forward_hook(partial(keep, name)) for name, module in named.items() if _RECORDED.fullmatch(name)
    ]
    kernels = {name: module.kernel for name, module in named.items() if isinstance(module, Attention)}
    try:
        for name in kernels:
            cast("Attention", named[name]).kernel = partial(attend, name)
        yield
    finally:
        for name, kernel in kernels.items():
            cast("Attention", named[name]).kernel = kernel
        for handle in handles:
            handle.remove()


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def growths_of(rows: Sequence[Row]) -> list[Growth]:
    """The growth of each quantity of each layer in the mean over seeds, the largest first. A quantity that is zero at the
    narrowest width (AdaLN's at the start) has none."""
    found = []
    for (parametrization, optimizer, layer), by_width in _by_layer(rows).items():
        for quantity in QUANTITIES:
            first, *others = (_mean([getattr(row, quantity) for row in own]) for own in by_width.values())
            if first > 0:
                found.append(Growth(parametrization, optimizer, layer, quantity, max(others) / first))
    return sorted(found, key=lambda growth: -growth.factor)


def _by_layer(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[int, list[Row]]]:
    """(parametrization, optimizer, layer) -> width -> the rows of all seeds."""
    groups: dict[tuple[str, str, str], dict[int, list[Row]]] = {}
    for row in rows:
        group = groups.setdefault((row.parametrization, row.optimizer, row.layer), {})
        group.setdefault(row.width, []).append(row)
    return {name: dict(sorted(group.items())) for name, group in groups.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def summary(growths: Sequence[Growth]) -> str:
    """One line for each parametrization and optimizer: the quantity that grows most with the width."""
    lines = []
    for parametrization, optimizer in dict.fromkeys((one.parametrization, one.optimizer) for one in growths):
        most = next(one for one in growths if (one.parametrization, one.optimizer) == (parametrization, optimizer))
        lines.append(
            f"{parametrization}, {optimizer}: the largest growth from the narrowest width is {most.factor:.2f} times "
            f"({most.layer}, {most.quantity})"
        )
    return "\n".join(sorted(lines))


def as_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with a line of names."""
    return text_table.as_csv([field.name for field in fields(Row)], map(astuple, rows))


def figure(rows: Sequence[Row], lr: float, updates: int) -> bytes:
    """A PNG: one row of panels for each optimizer, with size and change under each parametrization; one curve per layer, as
    multiples of its value at the narrowest width."""
    layers = _by_layer(rows)
    optimizers = list(dict.fromkeys(row.optimizer for row in rows))
    columns = [(parametrization, quantity) for parametrization in PARAMETRIZATIONS for quantity in QUANTITIES]
    names = list(dict.fromkeys(row.layer for row in rows))
    colours = dict(zip(names, plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(names))), strict=True))
    drawn, panels = plt.subplots(
        len(optimizers), 4, figsize=(15, 0.6 + 3.6 * len(optimizers)), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for optimizer, row_of_panels in zip(optimizers, panels, strict=True):
        for (parametrization, quantity), axes in zip(columns, row_of_panels, strict=True):
            for layer in names:
                by_width = layers[parametrization, optimizer, layer]
                values = [_mean([getattr(row, quantity) for row in own]) for own in by_width.values()]
                if values[0] > 0:
                    shown = [value / values[0] for value in values]
                    axes.plot(list(by_width), shown, marker=".", color=colours[layer], label=layer, linewidth=1.2)
            axes.set(yscale="log", title=f"{parametrization}, {optimizer}: {quantity}")
            logarithmic(axes, by_width)
            axes.axhline(1, color="black", linewidth=0.6)
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("width")
    for axes in panels[:, 0]:
        axes.set_ylabel("multiple of the narrowest width's")
    drawn.suptitle(f"rms of activations after {updates} updates at a learning rate of {lr:g}, and of their change")
    drawn.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return png(drawn)
