"""Short training runs with each engine and setting, whose losses are compared with those of one run, and memory with the formula.

They run launchers/train.py on random token shards without dropout, so that they differ only by rounding.
"""

# N tokens of an image, K codes, D width of a code

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rear_scale import config
from rear_scale.config import ExperimentConfig
from rear_scale.files import file_sha256
from rear_scale.parallel import facts
from rear_scale.parallel.memory import memory_per_rank
from rear_scale.shards import writer
from rear_scale.shards.record import Manifest, write_manifest

REFERENCE = "single"
_SAME_BITS = 0.0
_MEMORY_ALLOWED = 0.05  # relative difference of the peak from the formula
_COMPARED = ("loss", "grad_norm")  # metrics that must be equal bit by bit


@dataclass(frozen=True)
class Sizes:
    """The model, the batches and the number of updates of all runs."""

    config: str
    overrides: tuple[str, ...]
    samples: int  # number of sequences in the token shards
    global_batch: int
    micro_batch: int
    steps: int


LARGE = Sizes("rear_s.yaml", (), 8192, 128, 64, 20)
TINY = (
    "model.depth=1",
    "model.width=32",
    "objective.heads.hidden=32",
    "tokenizer.name=compact",
    "tokenizer.image_size=16",
    "tokenizer.num_tokens=16",
    "tokenizer.codebook_size=32",
    "tokenizer.codebook_dim=8",
)
SMALL = Sizes("bench_cpu.yaml", TINY, 64, 4, 2, 4)


@dataclass(frozen=True)
class Run:
    """One run, and the allowed difference of its losses from those of the reference."""

    name: str
    overrides: tuple[str, ...]
    allowed: float = 0.01  # largest relative difference of a loss at any step
    needs: str | None = None  # a package
    half: bool = False  # whether it stops after half of the steps
    goes_on: str | None = None  # the run whose checkpoint it resumes from
    formula: bool = True  # whether its memory is compared with the formula


RUNS = (
    Run(REFERENCE, ("strategy=single",)),
    Run("again", ("strategy=single",), _SAME_BITS, formula=False),
    Run("fp32", ("strategy=single", "train.precision=fp32"), 0.02),
    *(
        Run(name, (f"strategy={name}",), needs=facts.named(name).needs)
        for name in ("fsdp2", "zero1", "zero2", "zero3", "ddp")
    ),
    Run("compiled", ("strategy=single", "train.compile=true")),
    Run("profiled", ("strategy=single", "profile.steps=[2,3]"), formula=False),
    Run("selective", ("strategy=single", "train.activation_checkpointing=selective")),
    Run("half", ("strategy=single",), 1e-3, half=True, formula=False),
    Run("resumed", ("strategy=fsdp2",), 1e-3, goes_on="half", formula=False),
)


def tokens_folder(out: Path) -> Path:
    return out / "inputs" / "tokens"


def run_folder(out: Path, name: str) -> Path:
    return out / "runs" / name


def steps_of(run: Run, sizes: Sizes) -> int:
    return sizes.steps // 2 if run.half else sizes.steps


def overrides_of(run: Run, out: Path, sizes: Sizes) -> list[str]:
    """The overrides on the command line of the run."""
    return [
        *sizes.overrides,
        f"data.train={tokens_folder(out)}",
        "data.val=null",
        f"data.cache_dir={out / 'inputs' / 'cache'}",
        f"train.global_batch_size={sizes.global_batch}",
        f"train.micro_batch_size={sizes.micro_batch}",
        "train.total_steps=400",
        f"train.stop_at_step={steps_of(run, sizes)}",
        "train.log_every=1",
        "train.precision=bf16",
        "train.compile=false",
        "optim.warmup_steps=5",
        "model.dropout=0",
        "model.attn_dropout=0",
        f"run.name={run.name}",
        f"run.dir={run_folder(out, run.name)}",
        *run.overrides,
    ]


def command(run: Run, out: Path, sizes: Sizes) -> list[str]:
    return [sys.executable, "launchers/train.py", "--config", sizes.config, *overrides_of(run, out, sizes)]


def prepare(run: Run, out: Path) -> None:
    """Removes an earlier attempt, which launchers/train.py would resume, and copies the run that this run resumes."""
    folder = run_folder(out, run.name)
    shutil.rmtree(folder, ignore_errors=True)
    if run.goes_on is not None:
        shutil.copytree(run_folder(out, run.goes_on), folder)


def write_tokens(out: Path, sizes: Sizes) -> str:
    """A description of the token shards, which are written here from a seed. Sequences depend on their class, so that a model
    can learn them."""
    cfg = config.load(sizes.config, list(sizes.overrides))
    folder, tokenizer, classes = tokens_folder(out), cfg.tokenizer, cfg.model.num_classes
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, sizes.samples)
    steps = generator.integers(0, 3, (sizes.samples, tokenizer.num_tokens)).cumsum(1)
    tokens = (labels[:, None] + steps) % tokenizer.codebook_size
    shards = [
        writer.write_shard(folder, index, tokens[start:end], labels[start:end], source="drawn")
        for index, start, end in writer.shard_ranges(sizes.samples)
    ]
    codebook = generator.standard_normal((tokenizer.codebook_size, tokenizer.codebook_dim)).astype(np.float32)
    np.save(folder / "codebook.npy", codebook)
    manifest = Manifest(
        tokenizer=tokenizer.name,
        tokenizer_sha256="0" * 64,
        codebook_size=tokenizer.codebook_size,
        codebook_dim=tokenizer.codebook_dim,
        num_tokens=tokenizer.num_tokens,
        num_samples=sizes.samples,
        crops_per_image=1,
        label_counts=np.bincount(labels, minlength=classes).tolist(),
        class_names=[str(label) for label in range(classes)],
        codebook_sha256=file_sha256(folder / "codebook.npy"),
        shards=shards,
    )
    write_manifest(folder, manifest)
    writer.remove_records(folder)
    return f"{sizes.samples} sequences of {tokenizer.num_tokens} tokens, {classes} classes"


def keep_metrics(run: Run, out: Path) -> None:
    """Copies the metrics of a finished run, and its trace if it was profiled, to the answers, and removes its folder, which holds
    gigabytes of checkpoints, unless another run resumes it."""
    shutil.copyfile(run_folder(out, run.name) / "metrics.jsonl", _metrics_file(run.name, out))
    for trace in run_folder(out, run.name).glob("profile/*.json"):
        shutil.copyfile(trace, out / "parts" / f"{run.name}.trace.json")
    if not run.half:
        shutil.rmtree(run_folder(out, run.name), ignore_errors=True)


def trajectory(run: Run, out: Path, sizes: Sizes) -> str:
    """A line on the difference of a finished run's losses from the reference's, beginning with ok or not ok. Raises ValueError
    where a step was not logged."""
    ours, reference = (_metrics(name, out, steps_of(run, sizes)) for name in (run.name, REFERENCE))
    rate = statistics.median(line["images_per_s"] for line in ours[len(ours) // 2 :])
    figures = f"loss {_shown(ours[0]['loss'])} -> {_shown(ours[-1]['loss'])}, {rate:.1f} images/s"
    if run.name == REFERENCE:
        finite = all(line["loss"] is not None for line in ours)
        return f"{'ok: the others are compared with it' if finite else 'not ok: a loss is not finite'}; {figures}"
    if run.allowed == _SAME_BITS:
        return f"{_same_bits(ours, reference)}; {figures}"
    off, step = deviation(ours, reference)
    verdict = "ok" if off <= run.allowed else "not ok"
    return f"{verdict}: losses within {off:.1e} of {REFERENCE}'s (step {step}; {run.allowed:g} allowed); {figures}"


def deviation(ours: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """The largest relative difference of a loss, and its step; infinite where a loss is not finite."""
    differences = [
        (float("inf") if None in (a["loss"], b["loss"]) else abs(a["loss"] - b["loss"]) / b["loss"], a["step"])
        for a, b in zip(ours, reference, strict=True)
    ]
    return max(differences, key=lambda difference: difference[0])


def _same_bits(ours: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> str:
    for a, b in zip(ours, reference, strict=True):
        for name in _COMPARED:
            if a[name] != b[name]:
                return f"not ok: {name} of step {a['step']} is {a[name]} and was {b[name]} in {REFERENCE}"
    return f"ok: the same bits as {REFERENCE} at every step"


def memory(run: Run, out: Path, sizes: Sizes, device: str) -> str:
    """A line on the peak memory of a finished run and that of the formula ("cpu" or "cuda"), beginning with ok or not ok."""
    peak = max(line["peak_mem_gib"] for line in _metrics(run.name, out, steps_of(run, sizes)))
    cfg: ExperimentConfig = config.load(sizes.config, overrides_of(run, out, sizes))
    formula = memory_per_rank(cfg, 1, sizes.global_batch // sizes.micro_batch, device=device).peak / 2**30
    if device != "cuda":
        return f"not compared on a CPU, whose peak counts the whole process: {peak:.3f} GiB, formula {formula:.3f} GiB"
    off = peak / formula - 1
    verdict = "ok" if abs(off) <= _MEMORY_ALLOWED else "not ok"
    return f"{verdict}: peak {peak:.2f} GiB, formula {formula:.2f} GiB ({off:+.1%}; {_MEMORY_ALLOWED:.0%} allowed)"


def _metrics_file(name: str, out: Path) -> Path:
    return out / "parts" / f"trajectory_{name}.metrics.jsonl"


def _metrics(name: str, out: Path, steps: int) -> list[dict[str, Any]]:
    """The metrics of the first steps of a run. Raises ValueError where a step is missing."""
    lines = [json.loads(line) for line in _metrics_file(name, out).read_text().splitlines()][:steps]
    logged = [line["step"] for line in lines]
    if logged != list(range(1, steps + 1)):
        raise ValueError(f"{name} logged {len(logged)} of the steps 1 to {steps}")
    return lines


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
