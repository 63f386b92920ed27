"""Values derived from a config: run length, gradient accumulation, schedule times in steps; and the checks of a resumed run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import Any

from rear_scale.config import geometry
from rear_scale.config.errors import InputError, UnknownLength
from rear_scale.config.fields import declaration
from rear_scale.config.renamed import upgraded
from rear_scale.config.schema import ExperimentConfig, OptimConfig, StrategyConfig, TrainConfig
from rear_scale.config.values import leaves, to_dict
from rear_scale.parallel import facts


@dataclass(frozen=True)
class Plan:
    """The numbers of a run on a given number of ranks and images. Steps are optimizer updates."""

    world_size: int
    accumulation: int  # micro-steps per update
    total_steps: int  # the length of the schedules
    last_step: int  # at which this run ends: total_steps, or train.stop_at_step if that is smaller
    decay_steps: int  # the last steps of optim.schedule=wsd, in which the learning rate decays; 0 under other schedules
    images_per_epoch: int | None  # None = unknown: no shards, and no data.assumed_images
    noise_start_step: int
    noise_end_step: int
    permutation_start_step: int
    permutation_end_step: int

    def epochs(self, steps: int, global_batch_size: int) -> float | None:
        """Epochs of images that `steps` updates see."""
        return None if self.images_per_epoch is None else steps * global_batch_size / self.images_per_epoch


def derive(cfg: ExperimentConfig, world_size: int, images_per_epoch: int | None) -> Plan:
    """The plan of a config on `world_size` ranks. images_per_epoch: those of data.use_share; None = data.assumed_images.

    Raises InputError for an indivisible batch or an unknown epoch length."""
    train = cfg.train
    _check_ranks(cfg.strategy, world_size)
    _check_batch(train, world_size)
    if not images_per_epoch and cfg.data.assumed_images is not None:
        images_per_epoch = max(1, round(cfg.data.assumed_images * cfg.data.use_share))
    if train.total_steps is not None:
        total_steps = train.total_steps
    elif images_per_epoch is None:
        raise UnknownLength(
            f"train.epochs={train.epochs} needs the number of images, but {cfg.data.train} has no manifest. "
            "Make the shards first, or set data.assumed_images or train.total_steps"
        )
    else:
        assert train.epochs is not None, "validate requires it where there is no total_steps"
        total_steps = max(1, round(train.epochs * images_per_epoch / train.global_batch_size))
    noise, permutation = cfg.objective.noise, cfg.objective.permutation
    return Plan(
        world_size=world_size,
        accumulation=train.global_batch_size // (train.micro_batch_size * world_size),
        total_steps=total_steps,
        last_step=min(total_steps, train.stop_at_step or total_steps),
        decay_steps=decay_steps_of(cfg.optim, total_steps),
        images_per_epoch=images_per_epoch,
        noise_start_step=_as_steps(noise.start, total_steps),
        noise_end_step=_as_steps(noise.end, total_steps),
        permutation_start_step=_as_steps(permutation.start, total_steps),
        permutation_end_step=_as_steps(permutation.end, total_steps),
    )


def length_of_run(cfg: ExperimentConfig, images_per_epoch: int | None) -> int:
    """The length of the run in updates. Raises UnknownLength where it is given in epochs of unknown length."""
    train = cfg.train
    if train.total_steps is not None:
        return train.total_steps
    if images_per_epoch is None:
        raise UnknownLength(
            f"train.epochs={train.epochs} needs the number of images, but {cfg.data.train} has no manifest. "
            "Make the shards first, or set data.assumed_images or train.total_steps"
        )
    assert train.epochs is not None, "validate requires it where there is no total_steps"
    return max(1, round(train.epochs * images_per_epoch / train.global_batch_size))


def decay_steps_of(optim: OptimConfig, total_steps: int) -> int:
    """The steps of the decay of optim.schedule=wsd; 0 under other schedules. Raises InputError for a decay that begins before
    the end of the warm-up."""
    if optim.schedule != "wsd":
        return 0
    steps = round(optim.decay_share * total_steps)
    if steps and total_steps - steps < optim.warmup_steps:
        raise InputError(
            f"optim.decay_share={optim.decay_share} of {total_steps:,} steps begins to decay after step {total_steps - steps:,}, "
            f"before the end of optim.warmup_steps={optim.warmup_steps:,}. Use a shorter warm-up, a smaller share or a longer run"
        )
    return steps


def branch_point(text: str) -> tuple[str, int]:
    """The run folder and the step of train.branch_from=RUN@STEP. Raises InputError for a text of another form."""
    run, _, step = text.rpartition("@")
    if not run or not step.isascii() or not step.isdigit() or not 0 < int(step) <= 99_999_999:
        raise InputError(
            f"train.branch_from={text} does not name a run folder and a step. Use train.branch_from=RUN@STEP, as in "
            "runs/trunk@200000"
        )
    return run, int(step)


def _check_ranks(strategy: StrategyConfig, world_size: int) -> None:
    row, replicas = facts.of(strategy), strategy.replicas
    if row.alone and world_size != 1:
        raise InputError(
            f"strategy={row.name} runs in one process, but {world_size} were started. Use strategy=ddp or strategy=zero1"
        )
    if row.replicates and (world_size % replicas or world_size < 2 * replicas):
        raise InputError(
            f"strategy={row.name} with strategy.replicas={replicas} needs a multiple of {replicas} ranks, at least "
            f"{2 * replicas}, but {world_size} were started. Use strategy=fsdp2, or another strategy.replicas"
        )
    if world_size < row.fewest_ranks:
        raise InputError(
            f"strategy={row.name} needs at least {row.fewest_ranks} ranks, but {world_size} were started. Start more, or use "
            "strategy=fsdp2"
        )


def _as_steps(value: float, total_steps: int) -> int:
    """The step of a time in the run: a fraction of its length (up to 1) or a number of steps (above 1)."""
    return round(value * total_steps) if value <= 1 else int(value)


def _check_batch(train: TrainConfig, world_size: int) -> None:
    per_step = train.micro_batch_size * world_size
    if train.global_batch_size % per_step == 0:
        return
    rule = (
        f"train.global_batch_size={train.global_batch_size} is not a multiple of "
        f"train.micro_batch_size={train.micro_batch_size} x {world_size} ranks ({per_step})"
    )
    if train.global_batch_size % world_size:
        near = max(1, round(train.global_batch_size / per_step)) * per_step
        raise InputError(
            f"{rule}, nor of the number of ranks. Use train.global_batch_size={near}, or another number of ranks"
        )
    per_rank = train.global_batch_size // world_size
    small = [size for size in takewhile(lambda size: size * size <= per_rank, count(1)) if per_rank % size == 0]
    fitting = sorted({*small, *(per_rank // size for size in small)})
    below = max(size for size in fitting if size <= max(train.micro_batch_size, 1))
    above = min((size for size in fitting if size >= train.micro_batch_size), default=below)
    choices = " or ".join(str(size) for size in sorted({below, above}))
    raise InputError(f"{rule}. Use train.micro_batch_size={choices}")


# The values that a checkpoint without a field was trained with: the field's default, except where the program then behaved
# otherwise.
_DEFAULTS = to_dict(ExperimentConfig())
del _DEFAULTS["tokenizer"]["grid"], _DEFAULTS["tokenizer"]["prefix_tokens"]
_DEFAULTS["data"]["group_by_class"] = False


def completed(saved: dict[str, Any]) -> dict[str, Any]:
    """The values of a checkpoint's config under today's names, completed by the fields that it does not have: the values whose
    effect the program had then."""
    return geometry.completed(_completed(_DEFAULTS, upgraded(saved)))


def _completed(defaults: Any, values: Any) -> Any:
    if not isinstance(defaults, dict) or not isinstance(values, dict):
        return values
    return {**defaults, **{key: _completed(defaults.get(key), value) for key, value in values.items()}}


def groups_by_class(cfg: ExperimentConfig) -> bool:
    """Whether a new run hands out each global batch in the order of classes."""
    if cfg.data.group_by_class is not None:
        return cfg.data.group_by_class
    adaln = cfg.model.architecture == "rar" and cfg.model.conditioning == "adaln"
    return adaln and cfg.model.modulation != "per_sample" and cfg.data.mode == "mmap"


def wants_compile(cfg: ExperimentConfig, device: str) -> bool:
    """Whether blocks are compiled on a device ("cuda" or "cpu").

    train.compile=auto compiles on GPUs, where separate elementwise operations are bound by memory bandwidth, unless the
    strategy or the recomputation policy does not work with compilation.
    """
    if cfg.train.compile != "auto":
        return bool(cfg.train.compile)
    works = facts.of(cfg.strategy).no_compile is None and cfg.train.activation_checkpointing != "selective"
    return device == "cuda" and works


def settled(cfg: ExperimentConfig, saved: dict[str, Any] | None) -> ExperimentConfig:
    """The config with its open choices (null and auto) settled.

    A resumed run takes them from `saved`, the values of the checkpoint's config, so that it goes on as it began. A new run
    (saved=None) settles data.group_by_class by `groups_by_class`.
    """
    if saved is None:
        return replace(cfg, data=replace(cfg.data, group_by_class=groups_by_class(cfg)))
    before = completed(saved)
    grouped, modulation = before["data"]["group_by_class"], before["model"]["modulation"]
    compiled = before["train"]["compile"]
    if cfg.data.group_by_class is None:
        cfg = replace(cfg, data=replace(cfg.data, group_by_class=grouped))
    if cfg.model.modulation == "auto":
        cfg = replace(cfg, model=replace(cfg.model, modulation=modulation))
    if cfg.train.compile == "auto":
        cfg = replace(cfg, train=replace(cfg.train, compile=compiled))
    return cfg


# Fields in which a branch may differ from its trunk (train.branch_from), beside those that may change when a run is resumed:
# length and decay, and times of other schedules, which are shares of it.
OWN_OF_BRANCH = (
    "train.branch_from",
    "train.epochs",
    "train.total_steps",
    "optim.decay_share",
    "optim.decay_form",
    "optim.end_lr",
    "objective.noise.schedule",
    "objective.noise.start",
    "objective.noise.end",
    "objective.permutation.start",
    "objective.permutation.end",
)


def check_resumable(
    cfg: ExperimentConfig, saved: dict[str, Any], source: str, may_change: Collection[str] = ()
) -> None:
    """Raises InputError for the first field that would change the run and is not in resume.allow.

    `saved` are the values of the checkpoint's config, `source` its name. may_change: keys that may differ in addition.
    """
    before = leaves(completed(saved))
    now = leaves(to_dict(cfg))
    # An empty section has no entry to compare; the entries of the other side are named below.
    before, now = ({key: value for key, value in one.items() if value != {}} for one in (before, now))
    for key in sorted(before.keys() | now.keys()):
        own = declaration(ExperimentConfig, key)
        allowed = (own is not None and own.may_change) or any(
            key == name or key.startswith(f"{name}.") for name in (*cfg.resume.allow, *may_change)
        )
        if before.get(key) != now.get(key) and not allowed:
            raise InputError(
                f"{key}={now.get(key)}, but {source} was trained with {key}={before.get(key)}: another value changes the run. "
                f"Set it back, start another run.dir, or allow it with resume.allow=[{key}]"
            )
