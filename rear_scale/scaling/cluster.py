"""Clusters of GPUs that are listed in configs/devices/gpus.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from rear_scale.config import CONFIG_DIR, ExperimentConfig, InputError
from rear_scale.config.devices import TABLE, Device, devices
from rear_scale.config.fields import suggest


@dataclass(frozen=True)
class Cluster:
    """A number of GPUs of one model, on full machines or on part of one, with the data of that model."""

    gpus: int
    gpu: str
    device: Device

    @property
    def per_node(self) -> int:
        """The number of GPUs that are used on each machine."""
        return min(self.gpus, self.device.gpus_per_node)

    @property
    def nodes(self) -> int:
        return self.gpus // self.per_node


def open_cluster(cfg: ExperimentConfig) -> Cluster:
    """The cluster that a config describes; one full machine without cluster.gpus.

    Raises InputError for an unknown GPU, and for several machines of which one is only partly used.
    """
    known, wanted = devices(), cfg.cluster
    if wanted.gpu not in known:
        raise InputError(
            f"cluster.gpu={wanted.gpu} is not in {TABLE.relative_to(CONFIG_DIR.parent)}. Use one of {', '.join(known)}, "
            f"or add a row to the table{suggest(wanted.gpu, list(known))}"
        )
    device = known[wanted.gpu]
    gpus = wanted.gpus or device.gpus_per_node
    if not device.fills_machines(gpus):
        others = " or ".join(f"cluster.gpus={number}" for number in near(cfg.train.global_batch_size, gpus, device))
        raise InputError(
            f"cluster.gpus={gpus} is more than one machine of {device.gpus_per_node} GPUs and not a multiple of it. Use {others}"
        )
    return cluster_of(gpus, wanted.gpu, device)


def cluster_of(gpus: int, gpu: str, device: Device) -> Cluster:
    """A cluster of that many GPUs, which must satisfy `device.fills_machines`."""
    return Cluster(gpus, gpu, device)


def near(batch: int, gpus: int, device: Device) -> list[int]:
    """The nearest smaller and larger numbers of GPUs that divide the batch and fill their machines."""
    usable = [number for number in range(1, batch + 1) if batch % number == 0 and device.fills_machines(number)]
    return [number for number in usable if number < gpus][-1:] + [number for number in usable if number > gpus][:1]
