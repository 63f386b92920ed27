"""Learning-rate transfer across widths (launchers/study.py transfer): how far the best learning rate moves as the model widens.

Trains every width with every rate and seed under `standard` and `mup`, on token shards: on a CPU in several processes of one
thread, which is faster for small models than one process with several threads, and on a GPU in one. The base width of `mup` is
the narrowest one. The same command continues a killed study: finished cells are in the CSV, and are not trained again.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rear_scale import cli, text_table
from rear_scale.config import ExperimentConfig, InputError, Plan, derive, override_keys, to_dict
from rear_scale.device import uses_cuda
from rear_scale.figures import logarithmic, plt, png
from rear_scale.files import atomic_open, write_text_atomically
from rear_scale.locks import locked
from rear_scale.objective import Task, shared_classes
from rear_scale.objective.prediction import held_out_task
from rear_scale.optim.schedule import learning_rate
from rear_scale.progress import progress, say
from rear_scale.run.side_by_side import side_by_side
from rear_scale.scaling.widths import PARAMETRIZATIONS, SmallRun, at_width, numbers_of, world_of_one
from rear_scale.shards.codebook import codebook_of, read_both
from rear_scale.shards.reader import TokenSet, open_tokens
from rear_scale.world import World


class _Grid(NamedTuple):
    widths: str
    rates: str
    seeds: int
    updates: int


_USUAL = _Grid("64,128,256,512", "0.002,0.004,0.008,0.016,0.032,0.064", seeds=2, updates=200)
_QUICK = _Grid("32,64", "0.001,0.01", seeds=1, updates=8)
_WARMUP = 0.1  # fraction of the updates
_LAST = 0.1  # fraction of the updates whose mean is the training loss of a cell
_VALIDATED = 360  # sequences of data.val at most
# Before the user's overrides, so that those win.
_SETTINGS = ("model.depth=4", "model.num_heads=4", "train.global_batch_size=8", "train.precision=fp32")
# Set for each cell, or not used: a cell has the linear warm-up and the cosine of `_config_of`.
_NOT_TAKEN = ("optim.lr", "optim.end_lr", "optim.warmup_steps", "optim.schedule", "optim.parametrization", "optim.base_width",
              "optim.base_num_heads", "model.width")  # fmt: skip
_FIXED = ("strategy=single", "train.activation_checkpointing=none", "train.epochs=null", "train.stop_at_step=null")


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    parametrization: str
    width: int
    rate: float
    seed: int


@dataclass(frozen=True)
class Result(Cell):
    """The result of a cell: mean training loss of its last updates, and next-token loss of data.val with a clean context. NaN:
    the loss was not finite at some update, or there is no data.val."""

    loss: float
    val_loss: float
    seconds: float


def main(arguments: Sequence[str]) -> None:
    """The command line behind the word `transfer`. Raises InputError for a config, a grid or shards that do not work, and for
    an --out that holds the results of other settings."""
    parser = cli.make_parser(__doc__ or "")
    parser.prog += " transfer"
    parser.add_argument("--widths", metavar="W,W", help=f"widths; mup's base is the first ({_USUAL.widths})")
    parser.add_argument("--rates", metavar="R,R", help=f"peak learning rates ({_USUAL.rates})")
    parser.add_argument("--seeds", type=int, help=f"seeds of weights and of the order of data ({_USUAL.seeds})")
    parser.add_argument("--updates", type=int, help=f"updates of a run ({_USUAL.updates})")
    parser.add_argument("--jobs", type=int, help="runs at a time on a CPU, which share its cores (one for each core)")
    parser.add_argument("--quick", action="store_true", help="a tiny grid, which takes seconds and shows nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/study/transfer"), help="folder of the CSV and the PNG")
    first = parser.parse_intermixed_args([*_SETTINGS, *arguments])
    usual = _QUICK if first.quick else _USUAL
    widths_text, rates_text = first.widths or usual.widths, first.rates or usual.rates
    seeds = usual.seeds if first.seeds is None else first.seeds
    updates = usual.updates if first.updates is None else first.updates
    if min(seeds, updates) < 1:
        raise InputError(
            f"--seeds={seeds} and --updates={updates} must be at least 1. Use {_USUAL.seeds} and {_USUAL.updates}"
        )
    if ignored := sorted({*override_keys(first.overrides)} & {*_NOT_TAKEN}):
        raise InputError(
            f"{ignored[0]} is set for each run of the grid, by --widths and --rates, with a warm-up over a tenth of the updates "
            f"and a cosine to 0. Leave {ignored[0]} out"
        )
    jobs = _jobs_of(first.jobs)
    command = cli.parse(parser, [*_SETTINGS, *arguments, *_FIXED, f"train.total_steps={updates}"])
    widths, rates = numbers_of(widths_text, "--widths"), _rates_of(rates_text)
    cells = [
        Cell(parametrization, width, rate, seed)
        for width in widths
        for parametrization in PARAMETRIZATIONS
        for rate in rates
        for seed in range(seeds)
    ]
    for cell in cells:
        _config_of(command.cfg, cell, widths[0])  # refuses a width before anything is trained
    if first.dry_run:
        print(f"{len(cells)} runs of {updates} updates: widths {widths}, rates {rates}, {seeds} seeds -> {first.out}")
        return
    with locked(first.out / ".lock", f"--out={first.out} is in use by another process. Wait for it, or name another"):
        if jobs > 1:
            # Before any work, after which a process with threads could not be forked.
            torch.set_num_threads(max(1, _cores() // jobs))
        study = _Study(command.cfg, widths[0], first.out)
        if jobs > 1:
            _train_side_by_side(study, cells, jobs)
        with progress("transfer", len(cells), "run") as bar:
            results = []
            for cell in cells:
                results.append(study.result(cell))
                bar.update()
        with atomic_open(first.out / "transfer.png") as file:
            file.write(figure(results))
    text = table(results)
    write_text_atomically(first.out / "transfer.txt", text + "\n")
    print(text)
    cli.end(first.out / "transfer.png")


def _jobs_of(asked: int | None) -> int:
    """The number of processes. Raises InputError for less than one, and for several that would share a GPU."""
    if asked is not None and asked < 1:
        raise InputError(f"--jobs={asked} must be at least 1. Leave it out for one run per core")
    if not uses_cuda():
        return asked or _cores()
    if asked not in (None, 1):
        raise InputError(f"--jobs={asked} is for CPUs: on a GPU, runs are made one after another. Leave --jobs out")
    return 1


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _train_side_by_side(study: _Study, cells: Sequence[Cell], jobs: int) -> None:
    """Trains the cells that have no result, in so many processes at a time, the widest first: the last ones are then short."""
    missing = [number for number, cell in enumerate(cells) if study.is_to_train(cell)]
    missing.sort(key=lambda number: -cells[number].width)

    def train(number: int) -> None:
        result = study.result(cells[number])
        left = sum(study.is_to_train(cell) for cell in cells)
        say(
            f"{result.parametrization}, width {result.width}, rate {result.rate:g}, seed {result.seed}: training loss "
            f"{result.loss:.4f} after {result.seconds:.0f} s; {left} runs are left"
        )

    ended = side_by_side(jobs, missing, train)
    study.read()
    if ended is not None:
        raise InputError(f"a process that trains runs {ended}. The same command continues with the runs that are left")


def _rates_of(text: str) -> list[float]:
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError:
        rates = []
    if len(rates) < 2 or rates != sorted(set(rates)) or not 0 < rates[0] <= rates[-1] < math.inf:
        raise InputError(f"--rates={text} must be two or more increasing numbers above 0. Use --rates {_USUAL.rates}")
    return rates


def _config_of(cfg: ExperimentConfig, cell: Cell, base_width: int) -> ExperimentConfig:
    """The config of a cell: linear warm-up over a tenth of the updates, then the cosine to 0."""
    warmup = round(_WARMUP * (cfg.train.total_steps or 0))
    optim = replace(cfg.optim, lr=cell.rate, end_lr=0.0, warmup_steps=warmup)
    cfg = replace(cfg, optim=optim, run=replace(cfg.run, seed=cfg.run.seed + cell.seed))
    return at_width(cfg, cell.width, cell.parametrization, base_width)


class _Study:
    """The cells of a grid, trained when their result is first asked for, and kept in OUT/transfer.csv."""

    def __init__(self, cfg: ExperimentConfig, base_width: int, out: Path) -> None:
        self.cfg, self.base_width, self.path = cfg, base_width, out / "transfer.csv"
        manifest, val = read_both(cfg, is_main=True)
        self.world: World = world_of_one()
        tokens = open_tokens(str(cfg.data.train), cfg.data.cache_dir, say, manifest)
        self.tokens = replace(tokens, share=cfg.data.use_share)
        self.val = None if val is None else open_tokens(str(cfg.data.val), cfg.data.cache_dir, say, val)
        self.codebook = codebook_of(cfg, manifest)
        self.results: dict[Cell, Result] = {}
        self._check_settings(out / "settings.json", manifest.fingerprint)
        self.read()

    def read(self) -> None:
        """Takes over the results of the CSV, which other processes may have added to."""
        if self.path.exists():
            for result in read_csv(self.path.read_text()):
                self.results[_cell_of(result)] = result

    def is_to_train(self, cell: Cell) -> bool:
        """Whether a cell has no result, and none of its own can be taken from another cell."""
        return cell not in self.results and self._twin(cell) == cell

    def _twin(self, cell: Cell) -> Cell:
        """The cell whose result this one has: at the base width, mup is standard with the same bits."""
        return replace(cell, parametrization="standard") if cell.width == self.base_width else cell

    def _check_settings(self, path: Path, fingerprint: str) -> None:
        """Writes the settings that all cells share, or raises InputError where the folder's results have others."""
        sections = ("model", "tokenizer", "objective", "optim", "train")
        values = {name: part for name, part in to_dict(self.cfg).items() if name in sections}
        values = {"base_width": self.base_width, "seed": self.cfg.run.seed, "data": fingerprint, **values}
        if self.cfg.data.use_share != 1:
            values["use_share"] = self.cfg.data.use_share
        text = json.dumps(values, indent=1, sort_keys=True) + "\n"
        if not path.exists():
            write_text_atomically(path, text)
        elif sha256(path.read_bytes()).digest() != sha256(text.encode()).digest():
            raise InputError(
                f"--out={path.parent} holds results of other settings or data ({path.name}). Use the same, or another --out"
            )

    def result(self, cell: Cell) -> Result:
        if cell not in self.results:
            twin = self._twin(cell)
            if twin != cell and twin in self.results:
                values = asdict(self.results[twin]) | {"parametrization": cell.parametrization, "seconds": 0.0}
                result = Result(**values)
            else:
                result = self._train(cell)
            with locked(self.path.with_name(".transfer.csv.lock")):
                self.read()
                self.results[cell] = result
                write_text_atomically(self.path, as_csv(sorted(self.results.values(), key=_place)))
        return self.results[cell]

    def _train(self, cell: Cell) -> Result:
        started = time.monotonic()
        cfg = _config_of(self.cfg, cell, self.base_width)
        plan = derive(cfg, 1, len(self.tokens))
        torch.manual_seed(cfg.run.seed)  # of dropout
        run = SmallRun(cfg, plan, self.codebook, self.world)
        losses = list(_losses(run, cfg, plan, self.tokens))
        finite = all(map(math.isfinite, losses))
        last = losses[-max(1, round(_LAST * plan.total_steps)) :]
        loss = sum(last) / len(last) if finite else math.nan
        val_loss = _val_loss(run, cfg, self.val) if finite and self.val is not None else math.nan
        return Result(**asdict(cell), loss=loss, val_loss=val_loss, seconds=round(time.monotonic() - started, 2))


def _losses(run: SmallRun, cfg: ExperimentConfig, plan: Plan, tokens: TokenSet) -> Iterator[float]:
    """Trains, yielding the loss of each update, to the end or to the first loss that is not finite."""
    order = tokens.order(cfg.train.global_batch_size, cfg.run.seed)
    optim = cfg.optim
    for step in range(1, plan.total_steps + 1):
        ((ids, epochs),) = order.rank_batches(step, 0, 1, 1)
        batch = run.objective.micro_batch(*tokens.rows(ids), ids, epochs)
        lr = learning_rate(
            step, peak=optim.lr, end=optim.end_lr, warmup_steps=optim.warmup_steps, total_steps=plan.total_steps
        )
        loss = run.update(batch, step, lr)
        yield loss
        if not math.isfinite(loss):
            return


def _val_loss(run: SmallRun, cfg: ExperimentConfig, tokens: TokenSet) -> float:
    """The mean next-token loss of the first sequences of a set, with a clean context, their classes and no dropout."""
    total, count = 0.0, min(len(tokens), _VALIDATED)
    for ids in torch.arange(count).split(60):
        codes, labels = (tensor.to(run.world.device) for tensor in tokens.rows(ids))
        classes, class_index = shared_classes(labels, cfg.model.modulation)
        task = held_out_task(codes, ids.to(codes.device), run.objective.fixed_order, None)

        def compute(
            forward: nn.Module, given: tuple[Task, Tensor, Tensor | None] = (task, classes, class_index)
        ) -> tuple[Tensor, Tensor]:
            task, classes, class_index = given
            return run.objective.loss(forward(task.context, classes, class_index, task.order), task)

        statistics = run.strategy.evaluate(compute)
        total += run.objective.statistic(statistics, "loss_ar").item() * len(ids)
    return total / count


def _cell_of(result: Result) -> Cell:
    return Cell(result.parametrization, result.width, result.rate, result.seed)


def _place(result: Result) -> tuple[int, int, float, int]:
    return result.width, PARAMETRIZATIONS.index(result.parametrization), result.rate, result.seed


def as_csv(results: Sequence[Result]) -> str:
    """The results as CSV with a line of names; a value that is not there is empty."""
    cells = ([None if value != value else value for value in astuple(result)] for result in results)
    return text_table.as_csv([field.name for field in fields(Result)], cells)


def read_csv(text: str) -> list[Result]:
    """The results of a CSV that `as_csv` has written."""
    types: dict[str, Callable[[str], object]] = {"parametrization": str, "width": int, "seed": int}
    return [
        Result(**{name: types.get(name, float)(value or "nan") for name, value in line.items()})  # type: ignore[arg-type]
        for line in csv.DictReader(io.StringIO(text))
    ]


def is_validated(results: Sequence[Result]) -> bool:
    """Whether the runs are compared by their losses of data.val, and not by those of training."""
    return any(not math.isnan(result.val_loss) for result in results)


def losses_by_rate(results: Sequence[Result], parametrization: str) -> dict[int, dict[float, float]]:
    """width -> rate -> loss of data.val, or the training loss without one; the mean over seeds, infinite where one diverged."""
    found: dict[int, dict[float, list[float]]] = {}
    validated = is_validated(results)
    for result in results:
        if result.parametrization == parametrization:
            loss = result.val_loss if validated else result.loss
            found.setdefault(result.width, {}).setdefault(result.rate, []).append(loss)
    return {
        width: {
            rate: math.inf if math.isnan(sum(values)) else sum(values) / len(values) for rate, values in own.items()
        }
        for width, own in found.items()
    }


def best_rates(results: Sequence[Result], parametrization: str) -> dict[int, float]:
    """width -> the rate with the smallest loss."""
    curves = losses_by_rate(results, parametrization)
    return {width: min(curve, key=lambda rate: curve[rate]) for width, curve in curves.items()}


def moved(results: Sequence[Result], parametrization: str) -> int:
    """By how many steps of the grid the best rate moves at most, from that of the narrowest width."""
    rates = sorted({result.rate for result in results})
    first, *others = (rates.index(rate) for _, rate in sorted(best_rates(results, parametrization).items()))
    return max(abs(other - first) for other in others)


def table(results: Sequence[Result]) -> str:
    """For each parametrization the losses by width and rate with the best of each width in stars, and a sentence about how far
    the best rate moves."""
    rates = sorted({result.rate for result in results})
    lines = [f"{_quantity(results)}; * marks the best rate of a width"]
    for parametrization in PARAMETRIZATIONS:
        best = best_rates(results, parametrization)
        lines.append(f"{parametrization:<8}  {'  '.join(f'{rate:>9g}' for rate in rates)}")
        for width, curve in sorted(losses_by_rate(results, parametrization).items()):
            shown = [f"{'*' if rate == best[width] else ''}{curve[rate]:.4f}" for rate in rates]
            lines.append(f"{width:>8}  {'  '.join(f'{text:>9}' for text in shown)}")
        steps = moved(results, parametrization)
        edges = [width for width, rate in sorted(best.items()) if rate in (rates[0], rates[-1])]
        edge = f" (at the edge of the grid at width {', '.join(map(str, edges))}: the true best may lie outside)"
        lines.append(
            f"{parametrization}: from width {min(best)} to {max(best)} the best rate goes from {best[min(best)]:g} to "
            f"{best[max(best)]:g}; it moves by at most {steps} step{'' if steps == 1 else 's'} of the grid"
            f"{edge if edges else ''}.\n"
        )
    return "\n".join(lines).rstrip()


def _quantity(results: Sequence[Result]) -> str:
    return f"{'validation' if is_validated(results) else 'training'} loss, mean over seeds"


def figure(results: Sequence[Result]) -> bytes:
    """A PNG: the loss against the learning rate, a curve for each width with its best rate marked, under each parametrization."""
    drawn, panels = plt.subplots(1, 2, figsize=(10, 4), sharex=True, sharey=True, layout="constrained")
    for parametrization, axes in zip(PARAMETRIZATIONS, panels, strict=True):
        curves, best = losses_by_rate(results, parametrization), best_rates(results, parametrization)
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(curves)))
        for (width, curve), colour in zip(sorted(curves.items()), colours, strict=True):
            points = sorted((rate, loss) for rate, loss in curve.items() if math.isfinite(loss))
            if points:  # not all rates diverged
                axes.plot(*zip(*points, strict=True), marker=".", color=colour, label=f"width {width}")
                axes.plot(best[width], curve[best[width]], marker="*", markersize=13, color=colour)
        axes.set(xlabel="peak learning rate", title=parametrization)
        logarithmic(axes, [result.rate for result in results])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(_quantity(results))
    panels[0].legend()
    return png(drawn)
