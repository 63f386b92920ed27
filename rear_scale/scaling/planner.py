"""The planner: memory and time of every strategy with every policy of activation checkpointing on a cluster."""

# W ranks

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import yaml

from rear_scale.config import CONFIG_DIR, ExperimentConfig, InputError, Plan, derive
from rear_scale.config.devices import devices
from rear_scale.config.schema import RECOMPUTE_POLICIES, STRATEGY_KEY, WHOLE_MATRIX_OPTIMIZERS, StrategyConfig
from rear_scale.config.validate import validate
from rear_scale.model.activations import head_activation_bytes
from rear_scale.model.generator import Generator
from rear_scale.parallel import facts
from rear_scale.parallel.facts import Facts
from rear_scale.parallel.memory import elements, memory_per_rank
from rear_scale.places import IN_CHECKOUT, as_typed
from rear_scale.scaling.cluster import Cluster, cluster_of, near
from rear_scale.scaling.cost import StepTime, step_time

GIB = 2**30
# The fraction of a GPU's memory that a plan may fill. The rest is for the runtime and for fragmentation.
USABLE = 0.92
# Choices whose step times differ by less than this fraction count as equally fast; that with the least memory is recommended.
_AS_FAST = 0.01
PARTS = ("weights", "gradients", "optimizer", "activations", "heads", "buffers")
# Fields of the strategy section other than its name, and the property (parallel/facts.py) of strategies that use the field.
_HEEDED = {
    "replicas": "replicates",
    "cpu_offload": "offloads",
    "defer_reduction": "defers",
    "reshard_after_forward": "reshards",
}
STRATEGY_KEYS = tuple(f"strategy.{field}" for field in _HEEDED)


@dataclass(frozen=True)
class Choice:
    """A strategy with a policy, at the largest micro-batch size that fits, or at the smallest if none fits."""

    cfg: ExperimentConfig
    asked: StrategyConfig  # the strategy section of the user's config
    plan: Plan
    # Memory of the rank that needs most: PARTS, their sum (total), and the peak at any time, which decides whether it fits.
    memory_gib: dict[str, float]
    fits: bool
    time: StepTime

    @property
    def row(self) -> Facts:
        return facts.of(self.cfg.strategy)

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def checkpointing(self) -> str:
        return self.cfg.train.activation_checkpointing

    @property
    def run_s(self) -> float:
        return self.plan.last_step * self.time.total_s

    @property
    def gpu_hours(self) -> float:
        return self.run_s * self.plan.world_size / 3600

    @property
    def settings(self) -> list[str]:
        """The overrides that turn the user's config into this choice."""
        overrides, defaults = [f"strategy={self.name}"], group_defaults(self.name)
        for field in _HEEDED:
            value = getattr(self.cfg.strategy, field)
            # strategy=NAME does not reset fields that a file or another override has set.
            same = value == getattr(defaults, field) == getattr(self.asked, field)
            if field == "replicas":
                same = not self.row.replicates
            if not same:
                overrides.append(f"strategy.{field}={str(value).lower()}")
        return [
            *overrides,
            f"train.activation_checkpointing={self.checkpointing}",
            f"train.micro_batch_size={self.cfg.train.micro_batch_size}",
        ]


def choices(
    cfg: ExperimentConfig,
    cluster: Cluster,
    model: Generator,
    fixed: frozenset[str] = frozenset(),
    slowness: float = 1.0,
) -> list[Choice]:
    """All strategies that W ranks can run, with all policies.

    model: gives the shapes. fixed: keys whose values in the config are kept, such as train.micro_batch_size. slowness: see
    step_time. Raises InputError when the number of GPUs does not divide the global batch.
    """
    _check_divides(cfg, cluster)
    best_by_policy = []
    for row in facts.rows():
        for policy in RECOMPUTE_POLICIES:
            variants = [
                _largest(one, cfg.strategy, cluster, fixed, model, slowness)
                for one in _variants(cfg, cluster, row, policy, fixed)
            ]
            if variants:
                best_by_policy.append(min(variants, key=lambda one: (not one.fits, one.time.total_s)))
    return best_by_policy


def refused(cfg: ExperimentConfig) -> dict[str, str]:
    """The strategies that cannot run the config's optimizer on any number of GPUs, with the reason, a clause."""
    if cfg.optim.name not in WHOLE_MATRIX_OPTIMIZERS:
        return {}
    return {row.name: row.no_whole_matrices for row in facts.rows() if row.no_whole_matrices is not None}


def recommend(
    cfg: ExperimentConfig,
    cluster: Cluster,
    model: Generator,
    candidates: list[Choice],
    fixed: frozenset[str] = frozenset(),
) -> Choice:
    """The fastest choice that fits and keeps the fixed keys. Raises InputError, with the rule and a way out, if there is none."""
    allowed = [one for one in candidates if _keeps(one, cfg, fixed)]
    fitting = [one for one in allowed if one.fits]
    if not fitting:
        raise InputError(_impossible(cfg, cluster, model, candidates, allowed, fixed))
    fastest = min(one.time.total_s for one in fitting)
    equal = [one for one in fitting if one.time.total_s <= (1 + _AS_FAST) * fastest]
    return min(equal, key=lambda one: one.memory_gib["peak"])


def command(config: str, overrides: list[str], cluster: Cluster, choice: Choice) -> str:
    """The line to paste, as README has it: in a shell on the one machine, or where sbatch is for several."""
    if cluster.gpus == 1:
        start = "python launchers/train.py"
    elif cluster.nodes == 1:
        start = f"torchrun --nproc-per-node {cluster.gpus} launchers/train.py"
    elif IN_CHECKOUT:
        start = f"sbatch --nodes {cluster.nodes} launchers/slurm/train.sbatch"
    else:
        # The batch scripts are in a checkout alone.
        tasks = f"--ntasks-per-node {cluster.per_node} --gpus-per-node {cluster.per_node}"
        start = f"srun --nodes {cluster.nodes} {tasks} python launchers/train.py"
    words = ["--config", config, *_arguments(overrides, cluster, choice)]
    return as_typed(f"{start} {shlex.join(words)}")


def _arguments(overrides: list[str], cluster: Cluster, choice: Choice) -> list[str]:
    settings = choice.settings
    ours = {text.split("=")[0] for text in settings} | {STRATEGY_KEY, "cluster.gpus", "cluster.gpu"}
    own = [text for text in overrides if text.split("=")[0].lstrip("+") not in ours]
    # The plan's settings come last, because an override of the user may set a whole section.
    return [*own, *settings, f"cluster.gpus={cluster.gpus}", f"cluster.gpu={cluster.gpu}"]


@cache
def group_defaults(name: str) -> StrategyConfig:
    """The strategy section that `strategy=NAME` gives: from its config file, or else the defaults of the schema."""
    path = CONFIG_DIR / "strategy" / f"{name}.yaml"
    return StrategyConfig(**yaml.safe_load(path.read_text())) if path.is_file() else StrategyConfig(name=name)


def _check_divides(cfg: ExperimentConfig, cluster: Cluster) -> None:
    batch = cfg.train.global_batch_size
    if batch < cluster.gpus:
        raise InputError(
            f"cluster.gpus={cluster.gpus} is more than train.global_batch_size={batch}, but every GPU needs at least one image. "
            f"Use cluster.gpus={near(batch, cluster.gpus, cluster.device)[0]}, or a larger global batch"
        )
    if batch % cluster.gpus:
        others = " or ".join(f"cluster.gpus={number}" for number in near(batch, cluster.gpus, cluster.device))
        raise InputError(
            f"cluster.gpus={cluster.gpus} does not divide train.global_batch_size={batch}. Use {others}, or "
            f"train.global_batch_size={max(1, round(batch / cluster.gpus)) * cluster.gpus}"
        )


def _variants(
    cfg: ExperimentConfig, cluster: Cluster, row: Facts, policy: str, fixed: frozenset[str]
) -> Iterator[ExperimentConfig]:
    """Yields the valid configs of a strategy with a policy, with gradients reduced in each micro-step and once per update."""
    if not row.runs_on(cluster.gpus) or (row.replicates and cluster.nodes < 2):
        return
    strategy = cfg.strategy if row is facts.of(cfg.strategy) else group_defaults(row.name)
    for field, heeds in _HEEDED.items():
        if getattr(row, heeds) and (f"strategy.{field}" in fixed or field == "cpu_offload"):
            strategy = replace(strategy, **{field: getattr(cfg.strategy, field)})
    if row.replicates and "strategy.replicas" not in fixed:
        strategy = replace(strategy, replicas=cluster.nodes)
    free = row.defers_in_fp32 and "strategy.defer_reduction" not in fixed
    for deferred in (True, False) if free else (strategy.defer_reduction,):
        train = replace(cfg.train, activation_checkpointing=policy)
        variant = replace(cfg, strategy=replace(strategy, defer_reduction=deferred), train=train)
        try:
            validate(variant)
        except InputError:
            continue
        yield variant


def _largest(
    cfg: ExperimentConfig,
    asked: StrategyConfig,
    cluster: Cluster,
    fixed: frozenset[str],
    model: Generator,
    slowness: float,
) -> Choice:
    """The choice with the largest micro-batch size that divides a GPU's part of the batch and fits; the smallest if none fits."""
    images_per_gpu = cfg.train.global_batch_size // cluster.gpus
    sizes = [size for size in range(images_per_gpu, 0, -1) if images_per_gpu % size == 0]
    if "train.micro_batch_size" in fixed:
        sizes = [cfg.train.micro_batch_size]
    for size in sizes:
        cfg = replace(cfg, train=replace(cfg.train, micro_batch_size=size))
        plan = derive(cfg, cluster.gpus, None)
        memory = memory_gib(cfg, cluster.gpus, plan.accumulation, model)
        fits = memory["peak"] <= USABLE * cluster.device.memory_gib
        if fits:
            break
    return Choice(cfg, asked, plan, memory, fits, step_time(cfg, cluster, plan.accumulation, model, slowness))


def memory_gib(cfg: ExperimentConfig, world_size: int, accumulation: int, model: Generator) -> dict[str, float]:
    """PARTS, total and peak of memory_per_rank, in GiB.

    "optimizer" has moments and float32 master weights; "heads" all parts of the heads of loss terms; "buffers" those of
    collectives, and gathered or cast weights.
    """
    memory = memory_per_rank(cfg, world_size, accumulation, model, "cuda")
    of_heads = sum(elements(module) for module in model.heads().values()) / elements(model)
    states = {
        "weights": memory.weights,
        "gradients": memory.all_gradients,
        "optimizer": memory.optimizer + memory.masters,
    }
    head_activations = head_activation_bytes(cfg)
    parts = {
        **{part: size * (1 - of_heads) for part, size in states.items()},
        "activations": memory.activations - head_activations,
        "heads": of_heads * sum(states.values()) + head_activations,
        "buffers": memory.buffers + memory.gathered,
    }
    return {**{part: parts[part] / GIB for part in PARTS}, "total": memory.total / GIB, "peak": memory.peak / GIB}


_KEPT_BY_CHOICE = {
    "strategy": lambda one, cfg: one.row is facts.of(cfg.strategy),
    "train.activation_checkpointing": lambda one, cfg: one.checkpointing == cfg.train.activation_checkpointing,
    "strategy.cpu_offload": lambda one, cfg: one.cfg.strategy.cpu_offload == cfg.strategy.cpu_offload,
    "strategy.reshard_after_forward": lambda one, cfg: (
        one.cfg.strategy.reshard_after_forward == cfg.strategy.reshard_after_forward
    ),
}


def _keeps(choice: Choice, cfg: ExperimentConfig, fixed: frozenset[str]) -> bool:
    return all(keeps(choice, cfg) for key, keeps in _KEPT_BY_CHOICE.items() if key in fixed)


def _impossible(
    cfg: ExperimentConfig,
    cluster: Cluster,
    model: Generator,
    candidates: list[Choice],
    allowed: list[Choice],
    fixed: frozenset[str],
) -> str:
    asked = [key for key in (*_KEPT_BY_CHOICE, "train.micro_batch_size") if key in fixed]
    if not allowed:
        others = ", ".join(sorted({f"strategy={one.name}" for one in candidates}))
        policy = f"train.activation_checkpointing={cfg.train.activation_checkpointing}"
        return (
            f"strategy={facts.of(cfg.strategy).name}, {policy} cannot run on cluster.gpus={cluster.gpus} (machines: "
            f"{cluster.nodes}). Use one of {others}, or another number of GPUs"
        )
    least = min(allowed, key=lambda one: one.memory_gib["peak"])
    need = least.memory_gib["peak"]
    what = " ".join(least.settings)
    if not asked:
        what = f"no strategy fits, and the one with the least memory ({what})"
    rule = (
        f"cluster.gpu={cluster.gpu}, cluster.gpus={cluster.gpus}: {what} needs {need:.1f} GiB per GPU, and "
        f"{USABLE * cluster.device.memory_gib:.1f} of {cluster.device.memory_gib} GiB can be used"
    )
    return f"{rule}. {_way_out(cfg, cluster, model, candidates, need)}"


def _way_out(cfg: ExperimentConfig, cluster: Cluster, model: Generator, candidates: list[Choice], need: float) -> str:
    other = min((one for one in candidates if one.fits), key=lambda one: one.time.total_s, default=None)
    if other is not None:
        return f"Use {' '.join(other.settings)}"
    larger = [name for name, device in devices().items() if USABLE * device.memory_gib >= need]
    for gpus in more_gpus(cfg, cluster):
        wider = cluster_of(gpus, cluster.gpu, cluster.device)
        if any(one.fits for one in choices(cfg, wider, model)):
            return f"Use cluster.gpus={gpus}" + (f", or cluster.gpu={larger[0]}" if larger else "")
    return f"Use cluster.gpu={larger[0]}" if larger else "Use a smaller model"


def more_gpus(cfg: ExperimentConfig, cluster: Cluster) -> list[int]:
    """Larger numbers of GPUs, by doubling up to 1,024, that divide the global batch and fill their machines."""
    counts = [cluster.gpus * 2**power for power in range(1, 11)]
    batch, device = cfg.train.global_batch_size, cluster.device
    return [gpus for gpus in counts if gpus <= 1024 and batch % gpus == 0 and device.fills_machines(gpus)]
