"""The table of strategies, one row of properties each. Validation, planner, cost model and trainer decide by these properties,
never by a strategy's name.

To add a strategy, write a subclass of Strategy (strategy.py) and register a row for it, in any file:

    facts.register(Facts(name="mine", engine="my_file:MyStrategy", formulas="rear_scale.parallel.ddp", title="mine"))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from rear_scale.parallel.communication import Traffic
    from rear_scale.parallel.memory import Memory, Update
    from rear_scale.parallel.strategy import Strategy


@dataclass(frozen=True)
class Facts:
    """The properties of a strategy, and the modules of its code."""

    name: str  # strategy=NAME
    engine: str  # MODULE:CLASS of its Strategy subclass, imported when the strategy is opened
    formulas: (
        str  # module with memory(update) -> Memory and traffic(update) -> Traffic; imports nothing that `needs` names
    )
    title: str  # the engine, as docs/training.md names it
    needs: str | None = None  # the package that it needs beyond torch
    shards: tuple[str, ...] = ()  # what it shards: optimizer, gradients, weights, in this order
    alone: bool = False  # runs in a world of one process only
    fewest_ranks: int = 1
    replicates: bool = False  # heeds strategy.replicas: shards inside groups of ranks that each hold the whole model
    offloads: bool = False  # heeds strategy.cpu_offload
    defers: bool = False  # heeds strategy.defer_reduction
    defers_in_fp32: bool = False  # sums deferred gradients in float32, so that deferring does not change them
    reshards: bool = False  # heeds strategy.reshard_after_forward
    autocasts: bool = False  # trains in bf16 by autocast over float32 weights
    dtensors: bool = False  # weights are DTensors, which only torch's own optimizers update
    simulated: bool = False  # can run on fake tensors (scaling/simulate.py)
    no_compile: str | None = None  # why train.compile does not work: a clause that follows "strategy=NAME,"
    no_fp8: str | None = "its engine has not been tried with torchao's layers"  # why train.fp8 is refused
    # why optimizers whose updates need whole matrices are refused
    no_whole_matrices: str | None = "its engine has not been tried with updates of whole matrices"

    def runs_on(self, ranks: int) -> bool:
        return self.fewest_ranks <= ranks and (ranks == 1 or not self.alone)


class Named(Protocol):
    """An object with the name of a strategy, such as the strategy section of a config."""

    name: str


_OPTIMIZER, _GRADIENTS, _WEIGHTS = "optimizer", "gradients", "weights"
_ROWS: dict[str, Facts] = {}


def register(row: Facts) -> None:
    """Adds a strategy. Raises ValueError for a name that is taken by another row."""
    if _ROWS.get(row.name, row) != row:
        raise ValueError(f"strategy={row.name} is registered already, with other facts")
    _ROWS[row.name] = row


def rows() -> tuple[Facts, ...]:
    """All strategies, in the order of their registration."""
    return tuple(_ROWS.values())


def named(name: str) -> Facts:
    """The row of a strategy's name. Raises KeyError for an unknown name."""
    return _ROWS[name]


def of(section: Named) -> Facts:
    """The row of the strategy that a validated config names."""
    return _ROWS[section.name]


def names(having: Callable[[Facts], Any] = lambda row: True) -> tuple[str, ...]:
    """The names of the rows for which `having` is true."""
    return tuple(row.name for row in rows() if having(row))


class Formulas(Protocol):
    """The module of an engine's formulas."""

    def memory(self, update: Update) -> Memory:
        """Bytes of the rank that holds most, without activations."""
        ...

    def traffic(self, update: Update) -> Traffic:
        """Collectives of one update."""
        ...


def engine_class(row: Facts) -> type[Strategy]:
    """The Strategy subclass of a row, whose module is imported here."""
    module, _, name = row.engine.partition(":")
    engine: type[Strategy] = getattr(import_module(module), name)
    return engine


def formulas(row: Facts) -> Formulas:
    """The module with `memory` and `traffic` of the strategy, imported."""
    return cast("Formulas", import_module(row.formulas))


_DDP, _FSDP = "rear_scale.parallel.ddp", "rear_scale.parallel.fsdp"
_FSDP2 = Facts(
    "fsdp2",
    f"{_FSDP}:FSDPStrategy",
    _FSDP,
    "torch FSDP2",
    shards=(_OPTIMIZER, _GRADIENTS, _WEIGHTS),
    defers=True,
    defers_in_fp32=True,
    reshards=True,
    dtensors=True,
    simulated=True,
    no_fp8=None,
    no_whole_matrices=None,
)
_ZERO1 = Facts(
    "zero1",
    "rear_scale.parallel.deepspeed:DeepSpeedStrategy",
    "rear_scale.parallel.zero",
    "DeepSpeed",
    needs="deepspeed",
    shards=(_OPTIMIZER,),
    offloads=True,
    no_fp8="torchao's layers are verified with torch's own engines alone, and under ZeRO-3 they would keep their gathered "
    "weights until the backward pass",
    no_whole_matrices="DeepSpeed hands its optimizer flat pieces of many weights, and this update needs each matrix as a whole",
)
_BUILT_IN = (
    Facts(
        "single",
        f"{_DDP}:DDPStrategy",
        _DDP,
        "torch",
        alone=True,
        autocasts=True,
        simulated=True,
        no_fp8=None,
        no_whole_matrices=None,
    ),
    Facts(
        "ddp",
        f"{_DDP}:DDPStrategy",
        _DDP,
        "torch DistributedDataParallel",
        autocasts=True,
        no_fp8=None,
        no_whole_matrices=None,
    ),
    _FSDP2,
    replace(_FSDP2, name="hsdp", replicates=True, fewest_ranks=4),
    _ZERO1,
    replace(_ZERO1, name="zero2", shards=(_OPTIMIZER, _GRADIENTS), defers=True),
    replace(
        _ZERO1,
        name="zero3",
        shards=(_OPTIMIZER, _GRADIENTS, _WEIGHTS),
        defers=True,
        no_compile="whose hooks gather the weights of each layer and break every block's graph",
    ),
)
for _row in _BUILT_IN:
    register(_row)
