"""The rules of single configs: every one that needs no other machine, file or process."""

from __future__ import annotations

import difflib
import math
from typing import Any

from rear_scale.config.schema import ExperimentConfig, InputError
from rear_scale.config.values import leaves, to_dict

STRATEGIES = ("single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
PRECISIONS = ("fp32", "bf16")
BACKENDS = ("auto", "torch_fused", "torch_foreach", "deepspeed", "apex")
RECOMPUTE_POLICIES = ("none", "full", "every_n", "selective")
GUIDANCE_SCHEDULES = ("constant", "linear", "power_cosine")
SCAN_ORDERS = ("row_major", "spiral_in", "spiral_out", "z_curve", "subsample", "alternate")
QUANTISERS = ("trunc255", "round")
COPIES = ("png", "tar")
NEIGHBOUR_MODES = ("exact", "adm_fp16")
_LARGEST_SEED = 2**63 - 1
# Far above what anybody trains: a config, which may come with a file, costs bounded time and memory before it is refused.
_LARGEST = {
    "model.depth": 1024,
    "model.width": 131_072,
    "model.mlp_width": 1_048_576,
    "tokenizer.image_size": 65_536,
    "tokenizer.num_tokens": 65_536,
    "tokenizer.codebook_dim": 65_536,
    "objective.heads.hidden": 1_048_576,
    "train.total_steps": 99_999_999,  # folders of checkpoints have eight digits
    "train.global_batch_size": 2**31,
    "train.micro_batch_size": 1_048_576,
    "data.lanes": 1_048_576,
    "data.buffer_samples": 2**31,
    "guard.spike_window": 1_048_576,
    "sample.num_images": 100_000_000,
    "sample.batch_size": 1_048_576,
    "evaluate.batch_size": 1_048_576,
    "evaluate.bootstrap": 100_000,
    "evaluate.replace_draws": 100_000,
    "pretokenize.batch_size": 1_048_576,
    "pretokenize.samples_per_shard": 16_777_216,
    "cluster.gpus": 1_048_576,
}


def suggest(wrong: str, known: list[str]) -> str:
    """ "; did you mean X?" where one of the known words is close, else nothing."""
    by_lower = {word.lower(): word for word in known}
    close = difflib.get_close_matches(wrong.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def _require(ok: bool, name: str, value: Any, rule: str, way_out: str) -> None:
    if not ok:
        raise InputError(f"{name}={value} {rule}. {way_out}")


def validate(cfg: ExperimentConfig) -> None:
    """Checks every rule that needs no other machine, file or process. Raises InputError at the first that is broken."""
    _validate_seeds(cfg)
    _validate_sizes(cfg)
    _validate_model(cfg)
    _validate_objective(cfg)
    _validate_training(cfg)
    _validate_sampling(cfg)
    _validate_data(cfg)


def _validate_seeds(cfg: ExperimentConfig) -> None:
    for name, value in leaves(to_dict(cfg)).items():
        if name.endswith(".seed") and isinstance(value, int):
            # Draws take 64 bits of it without sign: seeds beyond would be others of these under another name.
            _require(0 <= value <= _LARGEST_SEED, name, value, "must lie between 0 and 2^63 - 1", f"Set {name}=0")


def _validate_sizes(cfg: ExperimentConfig) -> None:
    values = leaves(to_dict(cfg))
    for name, largest in _LARGEST.items():
        value = values[name]
        _require(value is None or value <= largest, name, value, f"is above {largest:,}", "Use a smaller one")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        way_out = f"Use one of them{suggest(value, list(choices))}"
        if all(part in choices for part in value.split(",")):
            way_out = "One run takes one value: start a run for each of a sweep"
        _require(False, name, value, f"is not one of {', '.join(choices)}", way_out)


def _positive(cfg: ExperimentConfig, *names: str) -> None:
    for name in names:
        value = cfg
        for part in name.split("."):
            value = getattr(value, part)
        if value is not None:
            _require(0 < value < math.inf, name, value, "must be above 0", f"Set {name} to a positive number")


def _share(name: str, value: float) -> None:
    _require(0 <= value <= 1, name, value, "must lie between 0 and 1", f"Set {name} to a share such as 0.1")


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((one for one in range(1, number + 1) if number % one == 0), key=lambda one: abs(one - wanted))


def _validate_model(cfg: ExperimentConfig) -> None:
    model = cfg.model
    _positive(cfg, "model.depth", "model.width", "model.num_heads", "model.mlp_width", "model.num_classes")
    _positive(cfg, "tokenizer.image_size", "tokenizer.num_tokens", "tokenizer.codebook_size", "tokenizer.codebook_dim")
    _require(
        model.width % model.num_heads == 0,
        "model.width",
        model.width,
        f"is not a multiple of model.num_heads={model.num_heads}",
        f"Use model.num_heads={_nearest_divisor(model.width, model.num_heads)}, or "
        f"model.width={model.width // model.num_heads * model.num_heads or model.num_heads}",
    )
    for name in ("dropout", "attn_dropout", "embed_dropout"):
        value = getattr(model, name)
        _require(0 <= value < 1, f"model.{name}", value, "must lie in [0, 1)", "The papers use 0.1")
    _one_of("model.modulation", model.modulation, ("auto", "per_class", "per_sample"))
    _one_of("model.architecture", model.architecture, ("rar", "alitok"))
    _one_of("model.conditioning", model.conditioning, ("adaln", "in_context"))
    _one_of("model.kernel", model.kernel, ("auto", "flash", "sdpa"))
    if model.tie_codebook is not None:
        _one_of("model.tie_codebook", model.tie_codebook, ("input", "output", "both"))
    if model.architecture == "alitok":
        head_width = model.width // model.num_heads
        _require(
            head_width % 4 == 0,
            "model.width",
            model.width,
            f"gives heads of width {head_width}, but the rotary grid needs a multiple of 4",
            "Use another width or number of heads",
        )
    _one_of("tokenizer.precision", cfg.tokenizer.precision, PRECISIONS)
    # Shards hold uint16.
    _require(
        cfg.tokenizer.codebook_size <= 65_536,
        "tokenizer.codebook_size",
        cfg.tokenizer.codebook_size,
        "does not fit the 16-bit tokens of the shards",
        "Use at most 65536 codes",
    )
    _require(
        model.num_classes <= 65_536,
        "model.num_classes",
        model.num_classes,
        "does not fit the 16-bit labels of the shards",
        "Use at most 65536 classes",
    )
    if cfg.tokenizer.training is not None:
        _positive(cfg, *(f"tokenizer.training.{n}" for n in ("steps", "batch_size", "lr", "channels")))
        _share("tokenizer.training.ema_decay", cfg.tokenizer.training.ema_decay)
        steps = cfg.tokenizer.training.steps
        _require(
            0 <= cfg.tokenizer.training.continuous_steps < steps,
            "tokenizer.training.continuous_steps",
            cfg.tokenizer.training.continuous_steps,
            f"must lie between 0 and tokenizer.training.steps={steps}: the codes are placed and used after them",
            f"Use {steps // 4}, or more steps",
        )


def _validate_objective(cfg: ExperimentConfig) -> None:
    _share("objective.class_dropout", cfg.objective.class_dropout)
    noise, heads = cfg.objective.noise, cfg.objective.heads
    _share("objective.noise.max", noise.max)
    _one_of("objective.noise.schedule", noise.schedule, ("linear", "constant"))
    _one_of("objective.noise.rate", noise.rate, ("uniform", "fixed"))
    _one_of("objective.noise.replacement", noise.replacement, ("uniform", "mask"))
    _marks("objective.noise", noise.start, noise.end)
    _validate_permutation(cfg)
    _positive(cfg, "objective.heads.hidden")
    _one_of("objective.heads.form", heads.form, ("paper", "released"))
    _one_of("objective.heads.positions", heads.positions, ("eq6", "all"))
    _one_of("objective.heads.encode_counts", heads.encode_counts, ("all", "unperturbed"))
    _one_of("objective.heads.distance", heads.distance, ("one_minus_cosine", "negative_cosine"))
    _one_of("objective.heads.lone_term", heads.lone_term, ("once", "twice"))
    _require(
        0 <= heads.weight < math.inf, "objective.heads.weight", heads.weight, "must not be negative", "The paper uses 1"
    )
    for name in ("encode_tap", "decode_tap"):
        tap = getattr(heads, name)
        if tap is not None:
            _require(
                0 <= tap <= cfg.model.depth,
                f"objective.heads.{name}",
                tap,
                f"is outside 0..model.depth={cfg.model.depth} (a tap is a number of blocks done)",
                f"Use 0 for the embeddings up to {cfg.model.depth} for the last block's output, or null for no head",
            )


def _marks(section: str, start: float, end: float) -> None:
    """Where something falls: shares of the run up to 1, steps above 1."""
    for name, value in (("start", start), ("end", end)):
        _require(
            0 <= value < math.inf and (value <= 1 or value == int(value)),
            f"{section}.{name}",
            value,
            "is neither a share of the run (0 to 1) nor a whole number of steps",
            "Use 0.75 for three quarters of the run, or 187500 for a step",
        )
    both_shares, both_steps = max(start, end) <= 1, min(start, end) > 1
    _require(
        start <= end or not (both_shares or both_steps),
        f"{section}.end",
        end,
        f"lies before {section}.start={start}",
        f"Use {section}.end={start} or later",
    )


def _validate_permutation(cfg: ExperimentConfig) -> None:
    permutation, tokenizer = cfg.objective.permutation, cfg.tokenizer
    _marks("objective.permutation", permutation.start, permutation.end)
    _one_of("objective.permutation.order", permutation.order, SCAN_ORDERS)
    _one_of("objective.permutation.prefix", permutation.prefix, ("permuted", "fixed"))
    name, order = "objective.permutation.order", permutation.order
    if cfg.sample.order is not None:
        name, order = "sample.order", cfg.sample.order
        _one_of(name, order, (*SCAN_ORDERS, "random"))
    _require(
        order != "random" or permutation.never_settles,
        name,
        order,
        f"needs a model that was permuted to the end, but objective.permutation.end={permutation.end}",
        "Use null for the order that it was trained to, or a scan order",
    )
    if order in ("row_major", "random"):
        return
    side = math.isqrt(tokenizer.num_tokens)
    _require(
        not tokenizer.name.startswith("titok"),
        name,
        order,
        f"scans a grid, but the tokens of tokenizer.name={tokenizer.name} are a line",
        f"Use {name}=row_major",
    )
    _require(
        order != "subsample" or side & (side - 1) == 0,
        name,
        order,
        f"halves the grid until one token is left, but tokenizer.num_tokens={tokenizer.num_tokens} gives a side of {side}",
        "Use another order, or a tokenizer whose grid has a power of two as its side",
    )


def _validate_training(cfg: ExperimentConfig) -> None:
    train, optim = cfg.train, cfg.optim
    _require(
        (train.epochs is None) != (train.total_steps is None),
        "train.total_steps",
        train.total_steps,
        f"with train.epochs={train.epochs}: exactly one of the two sets the length of a run",
        "Set train.total_steps=N or train.epochs=N",
    )
    _positive(cfg, "train.epochs", "train.total_steps", "train.stop_at_step", "train.log_every")
    _positive(cfg, "train.global_batch_size", "train.micro_batch_size", "data.assumed_images", "cluster.gpus")
    _positive(cfg, "checkpoint.every_steps", "checkpoint.keep_last", "optim.lr", "optim.grad_clip")
    _positive(cfg, "checkpoint.keep_every", "train.val_every")
    _require(
        0 <= optim.ema_decay < 1, "optim.ema_decay", optim.ema_decay, "must lie in [0, 1)", "Use 0 for none, or 0.9999"
    )
    _one_of("optim.backend", optim.backend, BACKENDS)
    _require(
        optim.backend not in ("deepspeed", "apex") or cfg.strategy.name not in ("fsdp2", "hsdp"),
        "optim.backend",
        optim.backend,
        f"cannot update the sharded tensors of strategy={cfg.strategy.name}",
        "Use optim.backend=auto",
    )
    _one_of("train.precision", train.precision, PRECISIONS)
    _one_of("optim.schedule", optim.schedule, ("paper", "released"))
    _one_of("optim.decay", optim.decay, ("released", "matrices"))
    _one_of("train.activation_checkpointing", train.activation_checkpointing, RECOMPUTE_POLICIES)
    _positive(cfg, "train.recompute_every_n")
    _validate_strategy(cfg)
    _validate_guard(cfg)
    _one_of("wandb.mode", cfg.wandb.mode, ("disabled", "offline", "online"))
    _require(
        0 <= optim.end_lr <= optim.lr,
        "optim.end_lr",
        optim.end_lr,
        f"must lie between 0 and optim.lr={optim.lr}",
        "The papers use 1e-5",
    )
    _require(
        optim.warmup_steps >= 0, "optim.warmup_steps", optim.warmup_steps, "must not be negative", "Use 0 for none"
    )
    _require(
        0 <= optim.weight_decay < math.inf,
        "optim.weight_decay",
        optim.weight_decay,
        "must not be negative",
        "The papers use 0.03",
    )
    _require(
        len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas),
        "optim.betas",
        optim.betas,
        "must be two numbers in [0, 1)",
        "The papers use [0.9,0.96]",
    )


def _validate_strategy(cfg: ExperimentConfig) -> None:
    strategy = cfg.strategy
    _one_of("strategy.name", strategy.name, STRATEGIES)
    _require(
        not strategy.cpu_offload or strategy.name.startswith("zero"),
        "strategy.cpu_offload",
        strategy.cpu_offload,
        f"is offered by zero1, zero2 and zero3, not by strategy={strategy.name}",
        "Use one of them, or strategy.cpu_offload=false",
    )
    _require(
        strategy.reshard_after_forward or strategy.name in ("fsdp2", "hsdp"),
        "strategy.reshard_after_forward",
        strategy.reshard_after_forward,
        f"is offered by fsdp2 and hsdp, not by strategy={strategy.name}",
        "Use one of them, or strategy.reshard_after_forward=true",
    )
    _require(
        strategy.replicas >= 2 or strategy.name != "hsdp",
        "strategy.replicas",
        strategy.replicas,
        "must be at least 2 under hsdp",
        "Use 2 or more, or strategy=fsdp2",
    )
    if cfg.train.fp8:
        _validate_fp8(cfg)
    _require(
        cfg.train.compile in (True, False, "auto"),
        "train.compile",
        repr(cfg.train.compile),
        "is neither true, false nor auto",
        "Use train.compile=auto",
    )
    if cfg.train.compile is True:
        _require(
            strategy.name != "zero3",
            "train.compile",
            True,
            "does not work with strategy=zero3, whose hooks gather the weights of each layer and break every block's graph",
            "Use strategy=fsdp2, or train.compile=false",
        )
        _require(
            cfg.train.activation_checkpointing != "selective",
            "train.compile",
            True,
            "does not work with train.activation_checkpointing=selective, which chooses among the single operations that a "
            "compiled block no longer has",
            "Use full or every_n, or train.compile=false",
        )


def _validate_fp8(cfg: ExperimentConfig) -> None:
    _require(
        cfg.train.precision == "bf16",
        "train.fp8",
        True,
        f"needs train.precision=bf16 for all that is not a product of a block, not {cfg.train.precision}",
        "Use train.precision=bf16, or train.fp8=false",
    )
    _require(
        not cfg.strategy.name.startswith("zero"),
        "train.fp8",
        True,
        f"is not offered with strategy={cfg.strategy.name}: torchao's layers are verified with torch's own engines alone, and "
        "under ZeRO-3 they would keep their gathered weights until the backward pass",
        "Use strategy=fsdp2, hsdp, ddp or single, or train.fp8=false",
    )
    _require(
        cfg.model.width % 16 == 0,
        "train.fp8",
        True,
        f"needs matrices whose sides are multiples of 16, and model.width={cfg.model.width} is a side of every one",
        f"Use model.width={-(-cfg.model.width // 16) * 16}, or train.fp8=false",
    )


def _validate_guard(cfg: ExperimentConfig) -> None:
    guard, steps = cfg.guard, cfg.profile.steps
    _one_of("guard.on_nonfinite", guard.on_nonfinite, ("stop", "skip"))
    _one_of("guard.on_spike", guard.on_spike, ("log", "rewind"))
    _positive(cfg, "guard.max_skips", "guard.spike_sigma", "guard.spike_window", "guard.max_rewinds")
    _require(
        guard.hang_timeout_s >= 0,
        "guard.hang_timeout_s",
        guard.hang_timeout_s,
        "must not be negative",
        "Use 0 for no watchdog, or some minutes",
    )
    _require(
        steps is None or (len(steps) == 2 and 1 <= steps[0] <= steps[1]),
        "profile.steps",
        steps,
        "is not a first and a last step",
        "Use profile.steps=[10,12], or null",
    )
    _require(
        cfg.train.val_every is None or cfg.data.val is not None,
        "train.val_every",
        cfg.train.val_every,
        "needs data.val",
        "Set data.val to a folder of token shards, or train.val_every=null",
    )


def _validate_sampling(cfg: ExperimentConfig) -> None:
    sample = cfg.sample
    _positive(
        cfg, "sample.num_images", "sample.batch_size", "sample.temperature", "sample.guidance.power", "sample.top_k"
    )
    if sample.top_p is not None:
        _require(0 < sample.top_p <= 1, "sample.top_p", sample.top_p, "must lie in (0, 1]", "null = all codes")
    _one_of("sample.guidance.schedule", sample.guidance.schedule, GUIDANCE_SCHEDULES)
    _one_of("sample.quantiser", sample.quantiser, QUANTISERS)
    _positive(cfg, "sample.grid_every_images")
    if sample.copies is not None:
        _one_of("sample.copies", sample.copies, COPIES)
    if sample.labels is not None:
        known = cfg.model.num_classes
        _require(
            len(sample.labels) > 0 and all(0 <= label < known for label in sample.labels),
            "sample.labels",
            sample.labels,
            f"must be class ids 0 .. {known - 1} of model.num_classes={known}, one at least",
            "Leave other numbers out; null = all classes in turn",
        )
    _require(
        0 <= sample.guidance.scale < math.inf,
        "sample.guidance.scale",
        sample.guidance.scale,
        "must not be negative",
        f"{0 if sample.guidance.schedule == 'linear' else 1} = no guidance under sample.guidance.schedule="
        f"{sample.guidance.schedule}",
    )
    _share("evaluate.replace_rate", cfg.evaluate.replace_rate)
    _positive(cfg, "evaluate.replace_draws", "evaluate.batch_size", "pretokenize.batch_size")
    _validate_scores(cfg)


def _validate_data(cfg: ExperimentConfig) -> None:
    data, pretokenize = cfg.data, cfg.pretokenize
    _one_of("data.mode", data.mode, ("resident", "stream"))
    _one_of("data.on_error", data.on_error, ("raise", "skip"))
    _share("data.max_skipped_share", data.max_skipped_share)
    _positive(cfg, "data.lanes", "data.buffer_samples")
    _one_of("pretokenize.crops", pretokenize.crops, ("center", "flip", "ten"))
    _one_of("pretokenize.exif", pretokenize.exif, ("ignore", "apply"))
    _one_of("evaluate.exif", cfg.evaluate.exif, ("ignore", "apply"))
    _one_of("pretokenize.precision", pretokenize.precision, PRECISIONS)
    _share("pretokenize.max_bad_share", pretokenize.max_bad_share)
    _require(
        pretokenize.samples_per_shard >= 10,
        "pretokenize.samples_per_shard",
        pretokenize.samples_per_shard,
        "must hold the crops of at least one image",
        "Use at least 10",
    )


def _validate_scores(cfg: ExperimentConfig) -> None:
    evaluate = cfg.evaluate
    _positive(cfg, "evaluate.neighbour_reference_images")
    if evaluate.training is not None:
        _positive(cfg, "evaluate.training.every_images", "evaluate.training.num_images")
    _require(
        evaluate.bootstrap == 0 or evaluate.bootstrap >= 2,
        "evaluate.bootstrap",
        evaluate.bootstrap,
        "is neither 0 (none) nor at least 2 resamplings",
        "Use 100",
    )
    for mode in evaluate.neighbour_modes:
        _one_of("evaluate.neighbour_modes", mode, NEIGHBOUR_MODES)
    _require(bool(evaluate.neighbour_modes), "evaluate.neighbour_modes", [], "is empty", "Use [exact,adm_fp16]")
