"""Rules between fields of a config, as far as they can be checked without other machines, files or processes.

The rules of single fields are in schema.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rear_scale.config.derived import branch_point
from rear_scale.config.errors import InputError
from rear_scale.config.fields import check_fields
from rear_scale.config.geometry import fits
from rear_scale.config.renamed import KEYS
from rear_scale.config.schema import WHOLE_MATRIX_OPTIMIZERS, ExperimentConfig
from rear_scale.parallel import facts
from rear_scale.parallel.facts import Facts


def _require(ok: bool, name: str, value: Any, rule: str, way_out: str) -> None:
    if not ok:
        raise InputError(f"{name}={value} {rule}. {way_out}")


def validate(cfg: ExperimentConfig) -> None:
    """Raises InputError for the first broken rule of a config. Needs no other machine, file or process."""
    check_fields(cfg)
    for key in cfg.resume.allow:
        new = KEYS.get(key, key)
        _require(new == key, "resume.allow", f"[{key}]", f"names a key that was renamed to {new}", f"Use [{new}]")
    _validate_model(cfg)
    _validate_tokenizer(cfg)
    _validate_objective(cfg)
    _validate_training(cfg)
    _validate_sampling(cfg)


def _listed(names: Sequence[str], joint: str = "and") -> str:
    """The names as a list in words: a, b and c."""
    *most, last = names
    return f"{', '.join(most)} {joint} {last}" if most else last


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((one for one in range(1, number + 1) if number % one == 0), key=lambda one: abs(one - wanted))


def _validate_model(cfg: ExperimentConfig) -> None:
    model = cfg.model
    _require(
        model.width % model.num_heads == 0,
        "model.width",
        model.width,
        f"is not a multiple of model.num_heads={model.num_heads}",
        f"Use model.num_heads={_nearest_divisor(model.width, model.num_heads)}, or "
        f"model.width={model.width // model.num_heads * model.num_heads or model.num_heads}",
    )
    if model.architecture == "alitok":
        head_width = model.width // model.num_heads
        _require(
            head_width % 4 == 0,
            "model.width",
            model.width,
            f"gives heads of width {head_width}, but the rotary grid needs a multiple of 4",
            "Use another width or number of heads",
        )


def _validate_tokenizer(cfg: ExperimentConfig) -> None:
    _validate_geometry(cfg)
    training = cfg.tokenizer.training
    if training is not None:
        _require(
            0 <= training.continuous_steps < training.steps,
            "tokenizer.training.continuous_steps",
            training.continuous_steps,
            f"must lie between 0 and tokenizer.training.steps={training.steps}: the codes are initialized after them and trained "
            "in the rest",
            f"Use {training.steps // 4}, or more steps",
        )


def _validate_geometry(cfg: ExperimentConfig) -> None:
    tokenizer = cfg.tokenizer
    _require(
        tokenizer.grid is not None or tokenizer.prefix_tokens == 0,
        "tokenizer.prefix_tokens",
        tokenizer.prefix_tokens,
        "stands before a grid, but tokenizer.grid=null",
        "Set tokenizer.grid=[ROWS,COLUMNS], or tokenizer.prefix_tokens=0",
    )
    _require(
        fits(tokenizer),
        "tokenizer.grid",
        tokenizer.grid,
        f"behind tokenizer.prefix_tokens={tokenizer.prefix_tokens} does not give tokenizer.num_tokens={tokenizer.num_tokens}",
        "Set the three so that PREFIX + ROWS x COLUMNS is the number, or tokenizer.grid=null for a sequence without a grid",
    )
    _require(
        tokenizer.grid is not None or cfg.model.architecture != "alitok",
        "model.architecture",
        cfg.model.architecture,
        f"has rotary positions on a grid, but tokenizer.grid=null: the {tokenizer.num_tokens} tokens of "
        f"tokenizer.name={tokenizer.name} are a sequence",
        "Set tokenizer.grid=[ROWS,COLUMNS] and tokenizer.prefix_tokens=N, or use model.architecture=rar",
    )


def _validate_objective(cfg: ExperimentConfig) -> None:
    noise, heads = cfg.objective.noise, cfg.objective.heads
    _check_interval("objective.noise", noise.start, noise.end)
    _validate_permutation(cfg)
    for name in ("encode_tap", "decode_tap"):
        tap = getattr(heads, name)
        if tap is not None:
            _require(
                0 <= tap <= cfg.model.depth,
                f"objective.heads.{name}",
                tap,
                f"is outside 0..model.depth={cfg.model.depth} (a tap is the number of blocks before the head)",
                f"Use 0 for the embeddings, {cfg.model.depth} for the last block's output, or null for no head",
            )


def _check_interval(section: str, start: float, end: float) -> None:
    """Raises InputError where a schedule ends before it starts; a fraction of the run and a step cannot be compared."""
    both_fractions, both_steps = max(start, end) <= 1, min(start, end) > 1
    _require(
        start <= end or not (both_fractions or both_steps),
        f"{section}.end",
        end,
        f"lies before {section}.start={start}",
        f"Use {section}.end={start} or later",
    )


def _validate_permutation(cfg: ExperimentConfig) -> None:
    permutation, tokenizer = cfg.objective.permutation, cfg.tokenizer
    _check_interval("objective.permutation", permutation.start, permutation.end)
    name, order = "objective.permutation.order", permutation.order
    if cfg.sample.order is not None:
        name, order = "sample.order", cfg.sample.order
    _require(
        order != "random" or permutation.never_settles,
        name,
        order,
        f"needs a model that was trained with permutations to the end, but objective.permutation.end={permutation.end}",
        "Use null for the scan order of its training, or name a scan order",
    )
    if order in ("row_major", "random"):
        return
    _require(
        tokenizer.grid is not None,
        name,
        order,
        f"is a scan order of a grid, but tokenizer.grid=null: the {tokenizer.num_tokens} tokens of "
        f"tokenizer.name={tokenizer.name} are a sequence",
        f"Use {name}=row_major, or set tokenizer.grid=[ROWS,COLUMNS]",
    )
    assert tokenizer.grid is not None, "required above"
    rows, columns = tokenizer.grid
    _require(
        order != "subsample" or (rows == columns and rows & (rows - 1) == 0),
        name,
        order,
        f"halves both sides of the grid until one token is left, but tokenizer.grid={tokenizer.grid}",
        "Use another order, or a tokenizer whose grid is square with a power of two as its side",
    )


def _validate_training(cfg: ExperimentConfig) -> None:
    train, optim = cfg.train, cfg.optim
    _require(
        (train.epochs is None) != (train.total_steps is None),
        "train.total_steps",
        train.total_steps,
        f"and train.epochs={train.epochs}: exactly one of the two must set the length of the run",
        "Set train.total_steps=N or train.epochs=N",
    )
    _validate_strategy(cfg)
    _require(
        cfg.data.use_share == 1 or cfg.data.mode == "mmap",
        "data.use_share",
        cfg.data.use_share,
        "chooses images by their class, which data.mode=stream does not know before it reads them",
        "Use data.mode=mmap, or data.use_share=1",
    )
    _require(
        cfg.train.val_every is None or cfg.data.val is not None,
        "train.val_every",
        cfg.train.val_every,
        "needs data.val",
        "Set data.val to a folder of token shards, or train.val_every=null",
    )
    _require(
        0 <= optim.end_lr <= optim.lr,
        "optim.end_lr",
        optim.end_lr,
        f"must lie between 0 and optim.lr={optim.lr}",
        "The papers use 1e-5",
    )
    _require(
        optim.parametrization == "standard" or cfg.model.tie_codebook != "both",
        "optim.parametrization",
        optim.parametrization,
        "does not work with model.tie_codebook=both, whose projection would need one scale at the input and one at the output",
        "Use model.tie_codebook=input or output, or optim.parametrization=standard",
    )
    _require(
        cfg.checkpoint.ema_every_steps is None or bool(optim.posthoc_ema),
        "checkpoint.ema_every_steps",
        cfg.checkpoint.ema_every_steps,
        "stores the averages of optim.posthoc_ema, which is empty",
        "Set optim.posthoc_ema=[0.05,0.1], or checkpoint.ema_every_steps=null",
    )
    if train.branch_from is not None:
        _validate_branch(cfg)


def _validate_branch(cfg: ExperimentConfig) -> None:
    train = cfg.train
    _require(
        cfg.optim.schedule == "wsd",
        "train.branch_from",
        train.branch_from,
        f"needs a learning rate that is constant for a while, but optim.schedule={cfg.optim.schedule}",
        "Use optim.schedule=wsd, or train.branch_from=null",
    )
    _require(
        train.init_from is None,
        "train.branch_from",
        train.branch_from,
        f"brings all weights, but train.init_from={train.init_from} names others",
        "Set one of the two to null",
    )
    branch_point(str(train.branch_from))


def _validate_strategy(cfg: ExperimentConfig) -> None:
    section, row = cfg.strategy, facts.of(cfg.strategy)
    _require(
        row.offloads or not section.cpu_offload,
        "strategy.cpu_offload",
        section.cpu_offload,
        f"is offered by {_listed(facts.names(lambda row: row.offloads))}, not by strategy={row.name}",
        "Use one of them, or strategy.cpu_offload=false",
    )
    _require(
        row.reshards or section.reshard_after_forward,
        "strategy.reshard_after_forward",
        section.reshard_after_forward,
        f"is offered by {_listed(facts.names(lambda row: row.reshards))}, not by strategy={row.name}",
        "Use one of them, or strategy.reshard_after_forward=true",
    )
    _require(
        section.replicas >= 2 or not row.replicates,
        "strategy.replicas",
        section.replicas,
        f"must be at least 2 under {row.name}",
        "Use 2 or more, or strategy=fsdp2",
    )
    _require(
        cfg.optim.backend not in ("deepspeed", "apex") or not row.dtensors,
        "optim.backend",
        cfg.optim.backend,
        f"cannot update the sharded tensors of strategy={row.name}",
        "Use optim.backend=auto",
    )
    _require(
        row.no_whole_matrices is None or cfg.optim.name not in WHOLE_MATRIX_OPTIMIZERS,
        "optim.name",
        cfg.optim.name,
        f"is not offered with strategy={row.name}: {row.no_whole_matrices}",
        f"Use strategy={_listed(_sharding_most(lambda row: row.no_whole_matrices is None), 'or')}, or optim.name=adamw",
    )
    if cfg.train.fp8:
        _validate_fp8(cfg)
    if cfg.train.compile is True:
        _require(
            row.no_compile is None,
            "train.compile",
            True,
            f"does not work with strategy={row.name}, {row.no_compile}",
            "Use strategy=fsdp2, or train.compile=false",
        )
        _require(
            cfg.train.activation_checkpointing != "selective",
            "train.compile",
            True,
            "does not work with train.activation_checkpointing=selective, which selects single operations, and a compiled "
            "block has none",
            "Use full or every_n, or train.compile=false",
        )


def _sharding_most(having: Callable[[Facts], Any]) -> list[str]:
    """The names of the strategies for which `having` is true; those that shard most come first."""
    return sorted(facts.names(having), key=lambda name: -len(facts.named(name).shards))


def _validate_fp8(cfg: ExperimentConfig) -> None:
    row = facts.of(cfg.strategy)
    others = _sharding_most(lambda row: row.no_fp8 is None)
    _require(
        cfg.train.precision == "bf16",
        "train.fp8",
        True,
        f"needs train.precision=bf16 for everything but the matrix products of the blocks, not {cfg.train.precision}",
        "Use train.precision=bf16, or train.fp8=false",
    )
    _require(
        row.no_fp8 is None,
        "train.fp8",
        True,
        f"is not offered with strategy={row.name}: {row.no_fp8}",
        f"Use strategy={_listed(others, 'or')}, or train.fp8=false",
    )
    _require(
        cfg.model.width % 16 == 0,
        "train.fp8",
        True,
        f"needs matrices whose sides are multiples of 16, and model.width={cfg.model.width} is a side of every one",
        f"Use model.width={-(-cfg.model.width // 16) * 16}, or train.fp8=false",
    )


def _validate_sampling(cfg: ExperimentConfig) -> None:
    sample = cfg.sample
    if sample.labels is not None:
        known = cfg.model.num_classes
        _require(
            len(sample.labels) > 0 and all(0 <= label < known for label in sample.labels),
            "sample.labels",
            sample.labels,
            f"must be one or more class ids in 0 .. {known - 1} (model.num_classes={known})",
            "Leave other numbers out, or use null for all classes",
        )
    _require(
        0 <= sample.guidance.scale < math.inf,
        "sample.guidance.scale",
        sample.guidance.scale,
        "must not be negative",
        f"{0 if sample.guidance.schedule == 'linear' else 1} = no guidance under sample.guidance.schedule="
        f"{sample.guidance.schedule}",
    )
