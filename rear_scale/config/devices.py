"""Data-sheet figures of GPU models, from the table configs/devices/gpus.yaml."""

from __future__ import annotations

from dataclasses import dataclass, fields

import yaml

from rear_scale.config.errors import InputError
from rear_scale.config.load import CONFIG_DIR

TABLE = CONFIG_DIR / "devices" / "gpus.yaml"
_SAME_MEMORY = 0.1  # largest relative difference between a GPU's memory and the table's


@dataclass(frozen=True)
class Device:
    """The data-sheet figures of one GPU model."""

    memory_gib: float
    bf16_tflops: float  # dense
    fp32_tflops: float
    memory_gb_per_s: float
    nvlink_gb_per_s: float  # one direction of one GPU
    network_gb_per_s: float  # one direction of one GPU
    gpus_per_node: int
    least_node_gb_per_s: float  # all-reduce bus bandwidth in a machine; below it NVLink is not in use
    least_network_gb_per_s: float  # the same between two machines; below it their network cards are not in use

    def fills_machines(self, gpus: int) -> bool:
        """Whether this number of GPUs fits into one machine, or fills several completely."""
        return gpus <= self.gpus_per_node or gpus % self.gpus_per_node == 0


def devices() -> dict[str, Device]:
    """The rows of the table by name. Raises InputError for a row with wrong or missing fields."""
    names = {field.name for field in fields(Device)}
    rows = {}
    for gpu, row in yaml.safe_load(TABLE.read_text()).items():
        numbers = isinstance(row, dict) and all(isinstance(value, int | float) and value > 0 for value in row.values())
        if not numbers or row.keys() != names:
            raise InputError(f"{gpu} in {TABLE} needs positive numbers for exactly: {', '.join(sorted(names))}")
        rows[gpu] = Device(**row)
    return rows


def bf16_tflops(name: str) -> float | None:
    """Dense bf16 peak in TFLOPS of a GPU by the name that torch reports. None for a GPU that is not in the table."""
    fitting = [device for gpu, device in devices().items() if _chip(gpu) in name.lower()]
    return fitting[0].bf16_tflops if fitting else None


def device_named(name: str, memory_gib: float) -> Device | None:
    """The row of a GPU by the name and memory that torch reports.

    None for a GPU that is not in the table, and for PCIe cards, whose machines differ too much for one row.
    """
    name = name.lower()
    if "pcie" in name:
        return None
    fitting = [row for row in devices().items() if _chip(row[0]) in name]
    same = [row for _, row in fitting if abs(row.memory_gib - memory_gib) <= _SAME_MEMORY * row.memory_gib]
    return same[0] if same else None


def _chip(gpu: str) -> str:
    """The name of the chip in the name of a row: h100 of h100-80g."""
    return gpu.split("-")[0]
