"""Kinds of GPUs, from the table configs/devices/gpus.yaml."""

from __future__ import annotations

from dataclasses import dataclass, fields

import yaml

from rear_scale.config.errors import InputError
from rear_scale.config.load import CONFIG_DIR

TABLE = CONFIG_DIR / "devices" / "gpus.yaml"
_SAME_MEMORY = 0.1  # by how much of the table's the memory of a GPU may differ from it


@dataclass(frozen=True)
class Device:
    """One kind of GPU: the data sheet's figures."""

    memory_gib: float
    bf16_tflops: float  # dense
    fp32_tflops: float
    memory_gb_per_s: float
    nvlink_gb_per_s: float  # one direction of one GPU
    network_gb_per_s: float  # one direction of one GPU
    gpus_per_node: int
    least_node_gb_per_s: float  # bus bandwidth of all-reduce in a machine below which NVLink cannot be what is used
    least_network_gb_per_s: float  # the same between two machines, for their network cards

    def fills_machines(self, gpus: int) -> bool:
        """Whether so many are a part of one machine, or whole machines."""
        return gpus <= self.gpus_per_node or gpus % self.gpus_per_node == 0


def devices() -> dict[str, Device]:
    """The table by name. Raises InputError for a row with wrong or missing fields."""
    names = {field.name for field in fields(Device)}
    found = {}
    for gpu, row in yaml.safe_load(TABLE.read_text()).items():
        numbers = isinstance(row, dict) and all(isinstance(value, int | float) and value > 0 for value in row.values())
        if not numbers or row.keys() != names:
            raise InputError(f"{gpu} in {TABLE} needs positive numbers for exactly: {', '.join(sorted(names))}")
        found[gpu] = Device(**row)
    return found


def bf16_tflops(name: str) -> float | None:
    """Dense bf16 peak of a GPU by the name that torch reports, whatever its memory and its machine. None for one that is not in
    the table."""
    fitting = [device for gpu, device in devices().items() if _chip(gpu) in name.lower()]
    return fitting[0].bf16_tflops if fitting else None


def device_named(name: str, memory_gib: float) -> Device | None:
    """The row of a GPU by the name and memory that torch reports. None for one that is not in the table, and for cards with
    PCIe alone, whose machines are built in many ways."""
    name = name.lower()
    if "pcie" in name:
        return None
    fitting = [row for row in devices().items() if _chip(row[0]) in name]
    same = [row for _, row in fitting if abs(row.memory_gib - memory_gib) <= _SAME_MEMORY * row.memory_gib]
    return same[0] if same else None


def _chip(gpu: str) -> str:
    """h100 of h100-80g."""
    return gpu.split("-")[0]
