"""A model of the time of an update: matrix products from FLOPs, other operations from bytes of memory traffic, and communication.

Its constants are the fractions of the data sheet's rates that are reached. They are assumptions; `plan.py --measure` replaces
the compute time by that of a measured step. Not included: data loading, logging, checkpoints, validation, and waiting for slow
ranks.
"""

# W ranks, G ranks of a collective, g of them on each machine

from __future__ import annotations

from dataclasses import dataclass, replace

from rear_scale.config import ExperimentConfig, wants_compile
from rear_scale.model.activations import block_activation_bytes, compute_itemsize
from rear_scale.model.flops import distinct_classes_per_image, recomputed_flops_per_image, train_flops_per_image
from rear_scale.model.generator import Generator
from rear_scale.optim.groups import states_per_weight
from rear_scale.parallel import facts
from rear_scale.parallel.communication import Traffic, traffic_per_update
from rear_scale.parallel.memory import elements
from rear_scale.parallel.whole_matrices import update_flops
from rear_scale.scaling.cluster import Cluster

# Fractions of the data sheet's rates: large bf16 products, reads and writes of memory, rings over NVLink and network.
PRODUCTS, MEMORY, NVLINK, NETWORK = 0.80, 0.85, 0.78, 0.85
# Memory traffic in bytes per saved byte of activations: written and read once in the forward pass, three times as much in the
# backward pass. A compiled block has a third of that traffic.
_PASSES_FORWARD, _PASSES_BACKWARD, _COMPILED = 2, 6, 1 / 3
# Memory traffic of an optimizer update in bytes, per weight and per optimizer state: float32 weight, states and gradient are
# read, all but the gradient are written, and the weight is also written in bf16.
_UPDATE_BYTES_PER_PARAMETER, _UPDATE_BYTES_PER_STATE = 18, 8
# strategy.cpu_offload, in GB/s per GPU: the link to its host, and its part of the host's memory bandwidth. Assumed.
_LINK_GB_PER_S, _HOST_GB_PER_S = 25, 25
# About 60 kernels per block, forward and backward, each of which takes 4.5 microseconds of the CPU to launch.
_LAUNCH_S_PER_BLOCK = 60 * 4.5e-6
# Latency of a collective: on one machine, and in addition per rank.
_LATENCY_S, _LATENCY_S_PER_RANK = 20e-6, 0.5e-6
# Fractions of the compute time that communication can overlap with: gradients with the backward pass that computes them,
# gathers of weights with both passes.
HIDDEN_GRADIENTS, HIDDEN_WEIGHTS = 0.5, 0.75

OVERLAP = (
    f"reductions of gradients overlap with {HIDDEN_GRADIENTS:.0%} of the compute time of the micro-steps that send them, all "
    f"communication with {HIDDEN_WEIGHTS:.0%}; the gathers of ZeRO-1 and 2 after the update, and ZeRO-1's gradients in bf16, do "
    "not overlap"
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update."""

    compute_s: float
    update_s: float  # time of the optimizer
    communication_s: float  # time of all communication, overlapped or not
    exposed_s: float  # the part of the communication that does not overlap with computation

    @property
    def total_s(self) -> float:
        return self.compute_s + self.update_s + self.exposed_s


def step_time(
    cfg: ExperimentConfig, cluster: Cluster, accumulation: int, model: Generator, slowness: float = 1.0
) -> StepTime:
    """The predicted time of one update of a strategy on a cluster. slowness: measured time of a step over its modelled time."""
    psi = elements(model)
    compute = accumulation * slowness * compute_time(cfg, cluster, psi)
    row = facts.of(cfg.strategy)
    sharded = _shard_ranks(cfg, cluster) if "optimizer" in row.shards else 1
    passed = _UPDATE_BYTES_PER_PARAMETER + _UPDATE_BYTES_PER_STATE * states_per_weight(model, cfg)
    update = passed * psi / sharded / (MEMORY * cluster.device.memory_gb_per_s * 1e9)
    if cfg.strategy.cpu_offload:
        # Gradients of every micro-step are sent to the host, which updates the weights and sends them back.
        moved = (4 * accumulation + compute_itemsize(cfg)) / _LINK_GB_PER_S + passed / _HOST_GB_PER_S
        update = psi / sharded * moved / 1e9
    update += update_flops(cfg, model, cluster.gpus) / _product_rate(cfg, cluster)
    gradients, weights, late = _communication_times(
        cfg, cluster, traffic_per_update(cfg, cluster.gpus, accumulation, model)
    )
    repeated = row.defers and not cfg.strategy.defer_reduction
    sending = compute if repeated else compute / accumulation
    exposed = max(0.0, gradients - HIDDEN_GRADIENTS * sending, gradients + weights - HIDDEN_WEIGHTS * compute)
    return StepTime(compute, update, gradients + weights + late, exposed + late)


def compute_time(cfg: ExperimentConfig, cluster: Cluster, psi: int) -> float:
    """Predicted seconds of one micro-step on one GPU without communication. psi: the number of parameters of the whole model."""
    device, B, itemsize = cluster.device, cfg.train.micro_batch_size, compute_itemsize(cfg)
    distinct = distinct_classes_per_image(cfg)
    flops = B * (train_flops_per_image(cfg, distinct) + recomputed_flops_per_image(cfg, distinct))
    bandwidth = MEMORY * device.memory_gb_per_s * 1e9
    kept, again = _kept_bytes(cfg)
    passed: float = (_PASSES_FORWARD + _PASSES_BACKWARD) * kept + _PASSES_FORWARD * again
    if wants_compile(cfg, "cuda"):
        passed *= _COMPILED
    # Weights are read forward and backward; gradients are written, and added to those of earlier micro-steps.
    passed += psi * (3 * itemsize + 2 * 4)
    return max(flops / _product_rate(cfg, cluster) + passed / bandwidth, _LAUNCH_S_PER_BLOCK * cfg.model.depth)


def _product_rate(cfg: ExperimentConfig, cluster: Cluster) -> float:
    """Floating-point operations per second of matrix products on one GPU."""
    device = cluster.device
    # In float32 without tensor cores, products almost reach the data sheet's rate, so there is no factor.
    return (device.bf16_tflops * PRODUCTS if compute_itemsize(cfg) == 2 else device.fp32_tflops) * 1e12


def _kept_bytes(cfg: ExperimentConfig) -> tuple[int, int]:
    """Bytes of activations that all blocks would save without recomputation, and the bytes of these that are recomputed."""
    policy, depth = cfg.train.activation_checkpointing, cfg.model.depth
    kept = block_activation_bytes(replace(cfg, train=replace(cfg.train, activation_checkpointing="none")))
    fraction = {"none": 0.0, "every_n": -(-depth // cfg.train.recompute_every_n) / depth}.get(policy, 1.0)
    return kept, int(fraction * kept)


def _shard_ranks(cfg: ExperimentConfig, cluster: Cluster) -> int:
    return cluster.gpus // (cfg.strategy.replicas if facts.of(cfg.strategy).replicates else 1)


def _communication_times(cfg: ExperimentConfig, cluster: Cluster, traffic: Traffic) -> tuple[float, float, float]:
    """Seconds of gradient reductions, of weight gathers, and of communication that cannot overlap with computation."""
    payload, ranks = traffic.payload, _shard_ranks(cfg, cluster)
    gather = _ring(cluster, ranks, payload["all_gather"], traffic.calls["all_gather"])
    reduce = sum(
        _ring(cluster, ranks, payload[collective], traffic.calls[collective])
        for collective in ("reduce", "reduce_scatter")
    )
    if facts.of(cfg.strategy).replicates:
        reduce += _between_replicas(cfg, cluster, payload["all_reduce"], traffic.calls["all_reduce"])
    else:
        reduce += _ring(cluster, ranks, 2 * payload["all_reduce"], traffic.calls["all_reduce"])
    late = reduce * traffic.late_reductions + gather * traffic.late_gathers
    # Updates of whole matrices are exchanged after the backward pass.
    late += _ring(cluster, ranks, payload["all_to_all"], traffic.calls["all_to_all"])
    late += _sent_once(cfg, cluster, payload["broadcast"], traffic.calls["broadcast"])
    return reduce * (not traffic.late_reductions), gather * (not traffic.late_gathers), late


def _ring(cluster: Cluster, ranks: int, payload: int, calls: int) -> float:
    """Seconds of gathers or scatters over consecutive ranks: within each machine over NVLink, then between machines, where each
    GPU sends its shard over its own network card."""
    if ranks == 1 or not calls:
        return 0.0
    device, g = cluster.device, min(ranks, cluster.per_node)
    nodes = ranks / g
    inside = payload * (g - 1) / g / (NVLINK * device.nvlink_gb_per_s * 1e9)
    between = payload / g * (nodes - 1) / nodes / (NETWORK * device.network_gb_per_s * 1e9)
    return inside + between + calls * _latency(ranks)


def _between_replicas(cfg: ExperimentConfig, cluster: Cluster, payload: int, calls: int) -> float:
    """Seconds of all-reduces of a rank's shard with the ranks that hold the same shard in other replicas."""
    replicas = cfg.strategy.replicas
    return 2 * payload * (replicas - 1) / replicas / _farthest_rate(cluster) + calls * _latency(replicas)


def _sent_once(cfg: ExperimentConfig, cluster: Cluster, payload: int, calls: int) -> float:
    """Seconds of broadcasts from one rank to those that hold the same weights, passed on from rank to rank."""
    holders = cfg.strategy.replicas if facts.of(cfg.strategy).replicates else cluster.gpus
    return payload / _farthest_rate(cluster) + calls * _latency(holders)


def _farthest_rate(cluster: Cluster) -> float:
    """Bytes per second of a GPU to another machine, or to another GPU where there is only one machine."""
    device = cluster.device
    return (NETWORK * device.network_gb_per_s if cluster.nodes > 1 else NVLINK * device.nvlink_gb_per_s) * 1e9


def _latency(ranks: int) -> float:
    return _LATENCY_S + _LATENCY_S_PER_RANK * ranks
