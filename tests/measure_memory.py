"""Bytes of one of two ranks while it trains a model of 100 million weights: tests/measured/memory_per_rank.json.

PYTHONPATH=. python tests/measure_memory.py
"""

from __future__ import annotations

import gc
import itertools
import json
import platform
import tempfile
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from helpers import run_ranks, tiny_config, write_token_shards
from test_parallel import QUIET, TWO_RANKS, build, run_steps
from torch import Tensor

from rear_scale.config import ExperimentConfig
from rear_scale.model import build_model
from rear_scale.world import World

FILE = Path(__file__).parent / "measured/memory_per_rank.json"
LARGE = ("model.width=768", "model.num_heads=12", "model.depth=10", "train.global_batch_size=16")
# strategy, precision, micro-steps per update; accumulating changes what the sharding strategies hold
CELLS = [*itertools.product(TWO_RANKS, ("fp32", "bf16"), (1,)), *itertools.product(TWO_RANKS[1:], ("bf16",), (2,))]


def config_of(
    folder: Path, tokens: Path, sizes: Iterable[str], strategy: str, precision: str, accumulation: int
) -> ExperimentConfig:
    """The config of a run on two ranks; `sizes` sets the model and a global batch of 16."""
    return tiny_config(
        folder, tokens, *QUIET, *sizes, f"strategy={strategy}", f"train.precision={precision}",
        f"train.micro_batch_size={8 // accumulation}",
    )  # fmt: skip


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Address and bytes of the storage of each tensor; for a DTensor, of this rank's shard."""
    found: dict[int, int] = {}
    for tensor in tensors:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def live() -> dict[int, int]:
    """The storages of all tensors that this process holds outside of graphs, gradients and shards among them."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at objects wakes the deprecations of some of them
        tensors = [
            item
            for item in gc.get_objects()
            if type(item) in (Tensor, torch.nn.Parameter) or hasattr(type(item), "_local_tensor")
        ]
        gradients = [item.grad for item in tensors if item.is_leaf and item.grad is not None]
    return storages([*tensors, *gradients])


def measure(world: World, cfg: ExperimentConfig) -> dict[str, int]:
    """Bytes by part in the second update of a strategy.

    states: between two updates, of which weights (those of the model), masters (other weights that the optimizer updates)
    and optimizer (moments); with_gradients: at the end of the last backward pass; activations: what the graph of a
    micro-batch keeps at the end of its forward pass, weights and their casts apart; resident: the process at the end of
    the backward pass, above the same process before it had a model.
    """
    before, empty = sum(live().values()), psutil.Process().memory_info().rss
    strategy = build(world, cfg)
    shapes = {tuple(weight.shape) for weight in build_model_shapes(cfg) if weight.ndim == 2}
    found: dict[str, int] = {}
    passes, norm = strategy.forward_backward, strategy.grad_norm

    def forward_backward(compute: Any, micro_step: int) -> Tensor:
        def watched(forward: Any) -> Any:
            saved: list[Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
                result = compute(forward)
            kept = [t for t in saved if tuple(t.shape) not in shapes and tuple(t.shape)[::-1] not in shapes]
            weights = storages(item for item in gc.get_objects() if type(item) is torch.nn.Parameter)
            found["activations"] = sum(size for place, size in storages(kept).items() if place not in weights)
            return result

        return passes(watched, micro_step)

    def grad_norm() -> Tensor:
        found["with_gradients"] = sum(live().values()) - before
        found["resident"] = psutil.Process().memory_info().rss - empty
        return norm()

    strategy.forward_backward, strategy.grad_norm = forward_backward, grad_norm
    run_steps(world, cfg, strategy, 1, 2)
    found["states"] = sum(live().values()) - before
    on_engine = hasattr(strategy, "zero")
    optimizer = strategy.zero.optimizer if on_engine else strategy.optimizer
    named = list(strategy.model.parameters())
    weights = storages([*named, *(weight.ds_tensor for weight in named if hasattr(weight, "ds_tensor"))])
    updated = storages(strategy._master_partitions() if on_engine else named)
    moments = storages(
        state[kind] for state in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq") if kind in state
    )
    found["weights"] = sum(weights.values())
    found["masters"] = sum(size for place, size in updated.items() if place not in weights)
    found["optimizer"] = sum(moments.values())
    return found


def build_model_shapes(cfg: ExperimentConfig) -> list[Tensor]:
    with torch.device("meta"):
        return list(build_model(cfg).parameters())


def _measure(world: World, folder: Path, tokens: Path, cell: tuple[str, str, int]) -> dict[str, int]:
    return measure(world, config_of(folder, tokens, LARGE, *cell))


def measure_all(folder: Path, tokens: Path) -> dict[str, Any]:
    """All measurements of the file. Each runs in its own process, because engines keep state."""
    cfg = config_of(folder, tokens, LARGE, *CELLS[0])
    figures = []
    for strategy, precision, accumulation in CELLS:
        values = run_ranks(2, _measure, folder, tokens, (strategy, precision, accumulation), fresh=True)[0]
        names = {"strategy": strategy, "precision": precision, "accumulation": accumulation}
        figures.append({**names, "bytes": {name: int(values[name]) for name in sorted(values)}})
        print(json.dumps(figures[-1]), flush=True)
    return {
        "description": "Bytes of rank 0 of 2 (CPU, gloo) in the second update, counted as storages of live tensors; "
        "tests/measure_memory.py says what each part is and measures again.",
        "parameters": sum(weight.numel() for weight in build_model_shapes(cfg)),
        "overrides": list(LARGE),
        "micro_batch_size": "8 / accumulation",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": version("deepspeed"),
        },
        "figures": figures,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        measured = measure_all(Path(name), write_token_shards(Path(name) / "shards", 100))
    FILE.write_text(json.dumps(measured, indent=1) + "\n")
