"""How long an update takes: products from FLOPs, everything else from bytes through memory, and what travels.

A model, not a measurement. Its constants say how much of the data sheet's rates is reached; they are assumptions until
`plan.py --measure` puts a measured step in the place of the first three. What it leaves out: data, logging, checkpoints,
validation, and waiting for slow ranks.
"""

# W ranks, G ranks that share a collective, g of them on each machine

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from rear_scale.config import ExperimentConfig, wants_compile
from rear_scale.model.activations import block_activation_bytes, compute_itemsize
from rear_scale.model.flops import distinct_classes_per_image, recomputed_flops_per_image, train_flops_per_image
from rear_scale.optim.groups import states_per_weight
from rear_scale.parallel import facts
from rear_scale.parallel.communication import Traffic, traffic_per_update
from rear_scale.parallel.memory import elements
from rear_scale.scaling.devices import Cluster

# Shares of the data sheet's rates: large bf16 products, reads and writes of memory, rings over NVLink and network.
PRODUCTS, MEMORY, NVLINK, NETWORK = 0.80, 0.85, 0.78, 0.85
# Bytes that pass through memory for each byte that is kept: written and read once in the forward pass, three times as much
# in the backward pass. A compiled block passes a third of it.
_PASSES_FORWARD, _PASSES_BACKWARD, _COMPILED = 2, 6, 1 / 3
# Of an update, per weight and per state of the optimizer: float32 weight, states and gradient read, all but the gradient
# written, and the weight in bf16.
_UPDATE_BYTES_PER_PARAMETER, _UPDATE_BYTES_PER_STATE = 18, 8
# strategy.cpu_offload, for each GPU: the link to its host, and its share of the host's memory, in GB/s. Assumed.
_LINK_GB_PER_S, _HOST_GB_PER_S = 25, 25
# About 60 kernels of a block forth and back, each 4.5 microseconds on the CPU that starts them.
_LAUNCH_S_PER_BLOCK = 60 * 4.5e-6
# A collective of no bytes: on one machine, and per rank that takes part.
_LATENCY_S, _LATENCY_S_PER_RANK = 20e-6, 0.5e-6
# Shares of the compute time under which traffic disappears: gradients during the backward pass that makes them, gathers of
# weights during both.
HIDDEN_GRADIENTS, HIDDEN_WEIGHTS = 0.5, 0.75

OVERLAP = (
    f"reductions of gradients hide under {HIDDEN_GRADIENTS:.0%} of the compute time of the micro-steps that send them, all "
    f"traffic under {HIDDEN_WEIGHTS:.0%}; what ZeRO-1 and 2 gather after the update, and ZeRO-1's gradients in bf16, hide under "
    "nothing"
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update."""

    compute_s: float
    update_s: float  # of the optimizer
    communication_s: float  # of all traffic, hidden or not
    exposed_s: float  # the part that nothing hides

    @property
    def total_s(self) -> float:
        return self.compute_s + self.update_s + self.exposed_s


def step_time(
    cfg: ExperimentConfig, cluster: Cluster, accumulation: int, model: nn.Module, slowness: float = 1.0
) -> StepTime:
    """Of a strategy on a cluster. slowness: measured time of a step over compute_time of the same step."""
    psi = elements(model)
    compute = accumulation * slowness * compute_time(cfg, cluster, psi)
    row = facts.of(cfg.strategy)
    sharded = _shard_ranks(cfg, cluster) if "optimizer" in row.shards else 1
    passed = _UPDATE_BYTES_PER_PARAMETER + _UPDATE_BYTES_PER_STATE * states_per_weight(model, cfg)
    update = passed * psi / sharded / (MEMORY * cluster.device.memory_gb_per_s * 1e9)
    if cfg.strategy.cpu_offload:
        # Gradients of every micro-step go to the host, which updates, and weights come back.
        moved = (4 * accumulation + compute_itemsize(cfg)) / _LINK_GB_PER_S + passed / _HOST_GB_PER_S
        update = psi / sharded * moved / 1e9
    gradients, weights, late = _travel_times(cfg, cluster, traffic_per_update(cfg, cluster.gpus, accumulation, model))
    repeated = row.defers and not cfg.strategy.defer_reduction
    sending = compute if repeated else compute / accumulation
    exposed = max(0.0, gradients - HIDDEN_GRADIENTS * sending, gradients + weights - HIDDEN_WEIGHTS * compute)
    return StepTime(compute, update, gradients + weights + late, exposed + late)


def compute_time(cfg: ExperimentConfig, cluster: Cluster, psi: int) -> float:
    """Seconds of one micro-step on one GPU that sends nothing. psi: parameters, whole."""
    device, B, width = cluster.device, cfg.train.micro_batch_size, compute_itemsize(cfg)
    # Without tensor cores there is little between the data sheet and what products reach.
    rate = (device.bf16_tflops * PRODUCTS if width == 2 else device.fp32_tflops) * 1e12
    distinct = distinct_classes_per_image(cfg)
    flops = B * (train_flops_per_image(cfg, distinct) + recomputed_flops_per_image(cfg, distinct))
    bandwidth = MEMORY * device.memory_gb_per_s * 1e9
    kept, again = _kept_bytes(cfg)
    passed = (_PASSES_FORWARD + _PASSES_BACKWARD) * kept + _PASSES_FORWARD * again
    if wants_compile(cfg, "cuda"):
        passed *= _COMPILED
    # Read forth and back, written as gradients and added to those of the micro-steps before.
    passed += psi * (3 * width + 2 * 4)
    return max(flops / rate + passed / bandwidth, _LAUNCH_S_PER_BLOCK * cfg.model.depth)


def _kept_bytes(cfg: ExperimentConfig) -> tuple[int, int]:
    """What all blocks would keep without recomputation, and how much of that is computed again."""
    policy, depth = cfg.train.activation_checkpointing, cfg.model.depth
    kept = block_activation_bytes(replace(cfg, train=replace(cfg.train, activation_checkpointing="none")))
    share = {"none": 0.0, "every_n": -(-depth // cfg.train.recompute_every_n) / depth}.get(policy, 1.0)
    return kept, int(share * kept)


def _shard_ranks(cfg: ExperimentConfig, cluster: Cluster) -> int:
    return cluster.gpus // (cfg.strategy.replicas if facts.of(cfg.strategy).replicates else 1)


def _travel_times(cfg: ExperimentConfig, cluster: Cluster, traffic: Traffic) -> tuple[float, float, float]:
    """Seconds of reductions of gradients, of gathers of weights, and of what is sent when there is nothing left to do."""
    payload, ranks = traffic.payload, _shard_ranks(cfg, cluster)
    gather = _ring(cluster, ranks, payload["all_gather"], traffic.calls["all_gather"])
    reduce = sum(_ring(cluster, ranks, payload[kind], traffic.calls[kind]) for kind in ("reduce", "reduce_scatter"))
    if facts.of(cfg.strategy).replicates:
        reduce += _between_replicas(cfg, cluster, payload["all_reduce"], traffic.calls["all_reduce"])
    else:
        reduce += _ring(cluster, ranks, 2 * payload["all_reduce"], traffic.calls["all_reduce"])
    late = reduce * traffic.late_reductions + gather * traffic.late_gathers
    return reduce * (not traffic.late_reductions), gather * (not traffic.late_gathers), late


def _ring(cluster: Cluster, ranks: int, payload: int, calls: int) -> float:
    """Gathers or scatters over neighbouring ranks: inside each machine over NVLink, then each GPU its share over its own
    network card."""
    if ranks == 1 or not calls:
        return 0.0
    device, g = cluster.device, min(ranks, cluster.per_node)
    nodes = ranks / g
    inside = payload * (g - 1) / g / (NVLINK * device.nvlink_gb_per_s * 1e9)
    between = payload / g * (nodes - 1) / nodes / (NETWORK * device.network_gb_per_s * 1e9)
    return inside + between + calls * _latency(ranks)


def _between_replicas(cfg: ExperimentConfig, cluster: Cluster, payload: int, calls: int) -> float:
    """All-reduces of a rank's own shard with those of the same place in the other groups."""
    replicas, device = cfg.strategy.replicas, cluster.device
    far = cluster.nodes > 1
    rate = NETWORK * device.network_gb_per_s if far else NVLINK * device.nvlink_gb_per_s
    return 2 * payload * (replicas - 1) / replicas / (rate * 1e9) + calls * _latency(replicas)


def _latency(ranks: int) -> float:
    return _LATENCY_S + _LATENCY_S_PER_RANK * ranks
