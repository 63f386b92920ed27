"""The output of a plan: as JSON values and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rear_scale.config import ExperimentConfig
from rear_scale.model.flops import train_flops_per_image
from rear_scale.scaling import cost, strong_scaling
from rear_scale.scaling.cluster import Cluster
from rear_scale.scaling.planner import PARTS, USABLE, Choice, refused
from rear_scale.scaling.strong_scaling import ScalingRow
from rear_scale.text_table import aligned


@dataclass(frozen=True)
class Report:
    """All results of a plan."""

    config: str  # the value of --config
    cfg: ExperimentConfig
    cluster: Cluster
    parameters: dict[str, int]
    choices: list[Choice]
    best: Choice
    command: str
    scaling_rows: list[ScalingRow]
    measured: dict[str, Any] | None  # with --measure
    simulated: dict[str, Any] | None  # with --simulate


def as_dict(report: Report) -> dict[str, Any]:
    """The values that --json prints. memory_gib: GiB on the rank that needs most; times in seconds."""
    best, cluster = report.best, report.cluster
    return {
        "config": report.config,
        "gpu": cluster.gpu,
        "gpus": cluster.gpus,
        "nodes": cluster.nodes,
        "device": asdict(cluster.device),
        "usable_memory_gib": USABLE * cluster.device.memory_gib,
        "parameters": report.parameters,
        "train_flops_per_image": train_flops_per_image(report.cfg),
        "global_batch_size": report.cfg.train.global_batch_size,
        "steps": best.plan.last_step,
        "assumed": {
            "share_of_product_rate": cost.PRODUCTS,
            "share_of_memory_rate": cost.MEMORY,
            "share_of_nvlink_rate": cost.NVLINK,
            "share_of_network_rate": cost.NETWORK,
            "overlap": cost.OVERLAP,
        },
        "strategies": [_row(one) for one in report.choices],
        "refused": refused(report.cfg),
        "step_time_s": best.time.total_s,
        "days": best.run_s / 86_400,
        "gpu_hours": best.gpu_hours,
        "recommended": {**_row(best), "strategy": best.name, "command": report.command},
        "scaling": [_scaling_row(row) for row in report.scaling_rows],
        "last_gpus_that_pay": strong_scaling.last_that_pays(report.scaling_rows),
        "measured": report.measured,
        "simulated": report.simulated,
    }


def _row(choice: Choice) -> dict[str, Any]:
    """The values of one choice. If it does not fit: its memory at one image per GPU, and no times."""
    fits, time = choice.fits, choice.time
    return {
        "name": choice.name,
        "checkpointing": choice.checkpointing,
        "fits": fits,
        "memory_gib": choice.memory_gib,
        "micro_batch_size": choice.cfg.train.micro_batch_size if fits else 0,
        "accumulation": choice.plan.accumulation if fits else None,
        "step_time_s": time.total_s if fits else None,
        "compute_s": time.compute_s if fits else None,
        "communication_s": time.communication_s if fits else None,
        "exposed_communication_s": time.exposed_s if fits else None,
        "days": choice.run_s / 86_400 if fits else None,
        "gpu_hours": choice.gpu_hours if fits else None,
    }


def _scaling_row(row: ScalingRow) -> dict[str, Any]:
    choice = row.choice
    return {
        "gpus": row.gpus,
        "strategy": choice and choice.name,
        "checkpointing": choice and choice.checkpointing,
        "micro_batch_size": choice and choice.cfg.train.micro_batch_size,
        "step_time_s": choice and choice.time.total_s,
        "images_per_s": row.images_per_s,
        "efficiency": row.efficiency,
        "pays": row.pays,
        "paying_global_batch_size": row.paying_batch,
    }


def as_text(report: Report) -> str:
    """The report of a plan as text for a terminal."""
    parts = [_head(report), _recommendation(report), _table(report), _scaling(report), _assumptions(report)]
    return "\n\n".join([*parts, _simulation(report.simulated)] if report.simulated else parts)


def _head(report: Report) -> str:
    cluster, parameters, cfg = report.cluster, report.parameters, report.cfg
    machines = "1 machine" if cluster.nodes == 1 else f"{cluster.nodes} machines"
    return "\n".join(
        (
            f"{report.config} on {cluster.gpus} x {cluster.gpu} ({machines}), {cfg.train.precision}",
            f"parameters: {parameters['total']:,}, of which reAR heads {parameters['heads']:,}",
            f"training FLOPs per image: {train_flops_per_image(cfg):.4g}",
            f"run: {report.best.plan.last_step:,} steps of {cfg.train.global_batch_size:,} images",
            f"GPU memory: a plan uses up to {USABLE * cluster.device.memory_gib:.1f} of {cluster.device.memory_gib} GiB",
        )
    )


def _table(report: Report) -> str:
    head = ["strategy", "recompute", *PARTS, "peak GiB", "micro-batch", "step s", "hidden s", "days", "GPU-hours"]
    rows = [["", *head]]
    # The recommended one first; the others as they come.
    for one in sorted(report.choices, key=lambda one: not _is_best(one, report.best)):
        memory = [f"{one.memory_gib[part]:.1f}" for part in (*PARTS, "peak")]
        times = ["does not fit"]
        if one.fits:
            hidden = one.time.communication_s - one.time.exposed_s
            times = [str(one.cfg.train.micro_batch_size), f"{one.time.total_s:.3f}", f"{hidden:.3f}"]
            times += [f"{one.run_s / 86_400:.2f}", f"{one.gpu_hours:,.0f}"]
        rows.append([">" if _is_best(one, report.best) else "", one.name, one.checkpointing, *memory, *times])
    return (
        "memory per GPU in GiB, with the largest micro-batch that fits (peak: the most at one time, not the sum); > marks the "
        "recommended row\n" + aligned(rows, left=(0, 1, 2)) + _refusals(report.cfg)
    )


def _refusals(cfg: ExperimentConfig) -> str:
    """A line for each reason for which strategies are not in the table."""
    names: dict[str, list[str]] = {}
    for name, reason in refused(cfg).items():
        names.setdefault(reason, []).append(name)
    return "".join(
        f"\nnot offered with optim.name={cfg.optim.name}: {', '.join(those)} ({reason})"
        for reason, those in names.items()
    )


def _is_best(choice: Choice, best: Choice) -> bool:
    return (choice.name, choice.checkpointing) == (best.name, best.checkpointing)


def _recommendation(report: Report) -> str:
    best = report.best
    lines = [
        f"recommended: strategy={best.name}, {best.run_s / 86_400:.2f} days, {best.gpu_hours:,.0f} GPU-hours",
        f"    {report.command}",
    ]
    return "\n".join(lines)


def _assumptions(report: Report) -> str:
    """What the times are made of, and what is not in them."""
    lines = []
    if report.measured:
        rates = report.measured
        lines.append(
            f"rates: measured on {rates['device']}: {rates['measured_tflops']:.3g} TFLOP/s of a whole step, assumed for "
            f"{report.cluster.gpu}: {rates['assumed_tflops']:.3g}. Compute times use the measured rate"
        )
    else:
        lines.append(
            f"rates: assumed to be these fractions of the data sheet's: {cost.PRODUCTS:.0%} for products, {cost.MEMORY:.0%} for "
            f"memory, {cost.NVLINK:.0%} for NVLink and {cost.NETWORK:.0%} for the network; --measure measures the first two"
        )
    lines.append(f"overlap: assumed; {cost.OVERLAP}")
    lines.append("not included in the times: data loading, checkpoints, validation, waiting for slow ranks")
    return "\n".join(lines)


def _scaling(report: Report) -> str:
    batch = report.cfg.train.global_batch_size
    rows = [["GPUs", "images/GPU", "strategy", "recompute", "micro-batch", "step s", "images/s", "efficiency", "pays",
             f"batch for {strong_scaling.KEEPS:.0%}"]]  # fmt: skip
    for row in report.scaling_rows:
        one = row.choice
        if one is None:
            rows.append([str(row.gpus), f"{batch / row.gpus:g}", "none fits"])
            continue
        rows.append([
            str(row.gpus), f"{batch / row.gpus:g}", one.name, one.checkpointing, str(one.cfg.train.micro_batch_size),
            f"{one.time.total_s:.3f}", f"{row.images_per_s:,.0f}", f"{row.efficiency:.2f}", "yes" if row.pays else "no",
            f"{row.paying_batch:,}" if row.paying_batch else "-",
        ])  # fmt: skip
    last = strong_scaling.last_that_pays(report.scaling_rows)
    verdict = f"a global batch of {batch:,} pays up to {last} GPUs" if last else "nothing fits"
    rule = f"pays: twice the GPUs are at least {strong_scaling.PAYS} times as fast"
    return f"on more GPUs: {verdict} ({rule})\n" + aligned(rows, left=())


def _simulation(simulated: dict[str, Any]) -> str:
    head = (
        f"simulated: strategy={simulated['strategy']} train.activation_checkpointing={simulated['checkpointing']} on rank 0 of "
        f"{simulated['world_size']}, {simulated['micro_steps']} micro-step(s) of {simulated['micro_batch_size']} images"
    )
    rows = [["per rank", "run", "formula"]]
    for part, size in simulated["memory_gib"].items():
        rows.append([f"{part} GiB", f"{size:.3f}", f"{simulated['formula_memory_gib'][part]:.3f}"])
    for collective, sent in simulated["collectives"].items():
        rows.append([f"{collective} calls", str(sent["calls"]), str(sent["formula_calls"])])
        rows.append([f"{collective} GiB", f"{sent['gib']:.3f}", f"{sent['formula_gib']:.3f}"])
    return f"{head}\n{aligned(rows)}"
