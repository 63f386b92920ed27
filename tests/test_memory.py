from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import NUM_CLASSES, NUM_TOKENS, run_ranks, tiny_config
from test_parallel import QUIET, TWO_RANKS, build, run_steps
from torch import Tensor

from rear_scale.model import build_model
from rear_scale.model.memory import activation_bytes, memory_per_rank
from rear_scale.world import World

SMALL = ["model.width=192", "model.depth=4", "train.global_batch_size=2", "train.micro_batch_size=1"]
LARGE = ["model.width=768", "model.num_heads=12", "model.depth=10", *SMALL[2:]]


def live_bytes() -> int:
    """Of the storages of all tensors that this process holds, gradients and shards of DTensors among them."""
    found: dict[int, int] = {}

    def note(tensor: Any) -> None:
        tensor = getattr(tensor, "_local_tensor", tensor)
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at objects wakes the deprecations of some of them
        for item in gc.get_objects():
            if type(item) in (Tensor, torch.nn.Parameter) or hasattr(type(item), "_local_tensor"):
                note(item)
                if item.is_leaf and item.grad is not None:
                    note(item.grad)
    return sum(found.values())


def _measured(world: World, folder: Path, tokens: Path, names: list[str], sizes: list[str]) -> dict[str, dict]:
    found = {}
    for name in names:
        cfg = tiny_config(folder, tokens, *QUIET, *sizes, f"strategy={name}")
        gc.collect()
        before, resident = live_bytes(), psutil.Process().memory_info().rss
        strategy = build(world, cfg)
        values: dict[str, float] = {}
        measure = strategy.grad_norm

        def grad_norm(values=values, measure=measure, before=before):
            gc.collect()
            values["with_gradients"] = live_bytes() - before
            return measure()

        strategy.grad_norm = grad_norm
        run_steps(world, cfg, strategy, 1, 2)
        values["resident"] = psutil.Process().memory_info().rss - resident
        predicted = memory_per_rank(cfg, world.size, 1)
        values["predicted"] = predicted.states + predicted.gradients + predicted.buffers
        found[name] = values
        strategy.grad_norm = measure
        del strategy, grad_norm, measure
        gc.collect()
    return found


def _check(folder: Path, tokens: Path, sizes: list[str]) -> None:
    cfg = tiny_config(folder, tokens, *sizes)
    psi = sum(weight.numel() for weight in build_model(cfg).parameters())
    for name in TWO_RANKS:
        # A process of its own for each: engines leave something behind.
        values = run_ranks(2, _measured, folder, tokens, [name], sizes)[0][name]
        print(f"{name}: bytes per parameter of {psi:,}:", {key: round(value / psi, 2) for key, value in values.items()})
        assert values["with_gradients"] == pytest.approx(values["predicted"], rel=0.15), name


@pytest.mark.long
def test_states_and_gradients_of_a_large_model_are_as_predicted(tmp_path: Path, tokens: Path) -> None:
    _check(tmp_path, tokens, LARGE)


def test_states_and_gradients_are_as_predicted(tmp_path: Path, tokens: Path) -> None:
    for name, values in run_ranks(2, _measured, tmp_path, tokens, ["fsdp2", "zero2"], SMALL)[0].items():
        assert values["with_gradients"] == pytest.approx(values["predicted"], rel=0.15), name


def test_what_blocks_keep_is_as_predicted(tmp_path: Path, tokens: Path) -> None:
    cfg = tiny_config(
        tmp_path, tokens, *QUIET, "model.width=192", "model.depth=6", "objective=ar",
        "train.micro_batch_size=6",
    )  # fmt: skip
    model = build_model(cfg)
    model.init_weights(0)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    clean = torch.randint(0, 32, (6, NUM_TOKENS))
    classes = torch.arange(6) % NUM_CLASSES
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(clean, classes, None)  # as many rows of modulation as images: the most there can be
    assert output["logits"].requires_grad
    assert sum(kept.values()) == pytest.approx(activation_bytes(cfg), rel=0.15)
