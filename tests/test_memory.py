from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import NUM_CLASSES, NUM_TOKENS, run_ranks, tiny_config
from test_parallel import QUIET, TWO_RANKS, build, run_steps
from torch import Tensor

from rear_scale import config
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["rear_b.yaml", "ablation/rar_l_plain.yaml", "rear_alitok_b.yaml", "rear_titok_b64.yaml"])
def test_what_every_family_keeps_is_as_predicted(name: str, precision: str) -> None:
    """Without logits and loss, and with the weights' casts of autocast left out."""
    cfg = config.load(
        name,
        [
            "objective=ar", "model.width=192", "model.num_heads=4", "model.depth=6", "model.dropout=0", "strategy=single",
            "model.attn_dropout=0", "model.embed_dropout=0", "train.micro_batch_size=6", f"train.precision={precision}",
        ],
    )  # fmt: skip
    cfg.model.mlp_width = None
    model = build_model(cfg)
    model.init_weights(0)
    shapes = {tuple(weight.shape) for weight in model.parameters() if weight.ndim == 2}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved: list[Tensor] = []
    tokens = torch.randint(0, 32, (6, cfg.tokenizer.num_tokens))
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t), half:
        model(tokens, torch.arange(6), None)
    kept = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in saved
        if tuple(tensor.shape) not in shapes and tuple(tensor.shape)[::-1] not in shapes
    }
    logits = 6 * cfg.tokenizer.num_tokens * cfg.tokenizer.codebook_size * (8 if precision == "fp32" else 10)
    found = sum(size for place, size in kept.items() if place not in weights)
    print(name, precision, f"{(activation_bytes(cfg) - logits) / found:.3f}")
    assert activation_bytes(cfg) - logits == pytest.approx(found, rel=0.05)


FIGURES = json.loads((Path(__file__).parent / "measured/memory_per_rank.json").read_text())


@pytest.mark.parametrize("figure", FIGURES["figures"], ids=lambda f: "-".join(map(str, list(f.values())[:3])))
def test_the_formula_is_near_what_was_measured(tmp_path: Path, tokens: Path, figure: dict[str, Any]) -> None:
    cfg = tiny_config(
        tmp_path, tokens, *QUIET, *FIGURES["overrides"], f"strategy={figure['strategy']}",
        f"train.precision={figure['precision']}", f"train.micro_batch_size={8 // figure['accumulation']}",
    )  # fmt: skip
    predicted, measured = memory_per_rank(cfg, 2, figure["accumulation"]), figure["bytes"]
    assert predicted.weights == pytest.approx(measured["weights"], rel=0.15)
    assert predicted.optimizer == pytest.approx(measured["optimizer"], rel=0.15)
    assert predicted.activations == pytest.approx(measured["activations"], rel=0.15)
    assert predicted.states + predicted.buffers == pytest.approx(measured["states"], rel=0.15)
    at_the_end = predicted.states + predicted.gradients + predicted.buffers
    assert at_the_end == pytest.approx(measured["with_gradients"], rel=0.15)


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
