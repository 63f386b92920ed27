from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NUM_CLASSES, NUM_TOKENS, run_ranks, tiny_config
from measure_memory import FILE, config_of, measure, measure_all
from test_parallel import QUIET
from torch import Tensor, nn

from rear_scale import config
from rear_scale.config import ExperimentConfig
from rear_scale.model import build_model
from rear_scale.model.activations import one_block_bytes
from rear_scale.model.attention import Attention
from rear_scale.parallel.memory import activation_bytes, memory_per_rank
from rear_scale.world import World

SMALL = ("model.width=192", "model.depth=4", "train.global_batch_size=16")
FIGURES = json.loads(FILE.read_text())


def cell_of(figure: dict[str, Any]) -> tuple[str, str, int]:
    return figure["strategy"], figure["precision"], figure["accumulation"]


def check(cfg: ExperimentConfig, accumulation: int, found: dict[str, int]) -> None:
    predicted = memory_per_rank(cfg, 2, accumulation)
    cell = (cfg.strategy.name, cfg.train.precision, accumulation)
    for name in ("weights", "optimizer"):
        assert getattr(predicted, name) == pytest.approx(found[name], rel=0.15), (*cell, name)
    # Deferred gradients are whole until the end of the last backward pass, which is when all are counted.
    deferred = cfg.strategy.name == "fsdp2" and accumulation > 1
    if not deferred:
        total = predicted.states + predicted.gradients + predicted.buffers
        assert total == pytest.approx(found["with_gradients"], rel=0.15), cell
    # Autocast keeps more than bf16 weights do.
    if (cfg.strategy.name, cfg.train.precision) != ("ddp", "bf16"):
        assert predicted.activations == pytest.approx(found["activations"], rel=0.15), cell


@pytest.mark.parametrize("figure", FIGURES["figures"], ids=lambda figure: "-".join(map(str, cell_of(figure))))
def test_a_large_model_takes_what_is_predicted(tmp_path: Path, tokens: Path, figure: dict[str, Any]) -> None:
    """The figures measured on a model of 100 million weights, without measuring them again."""
    assert FIGURES["parameters"] >= 100_000_000
    cfg = config_of(tmp_path, tokens, FIGURES["overrides"], *cell_of(figure))
    check(cfg, figure["accumulation"], figure["bytes"])


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_figures_of_a_large_model_are_still_measured(tmp_path: Path, tokens: Path) -> None:
    for found, known in zip(measure_all(tmp_path, tokens)["figures"], FIGURES["figures"], strict=True):
        assert cell_of(found) == cell_of(known)
        # The resident size is for the reader: it depends on the machine's allocator.
        for name in known["bytes"].keys() - {"resident"}:
            assert found["bytes"][name] == pytest.approx(known["bytes"][name], rel=0.02), (cell_of(found), name)


def _measured(world: World, folder: Path, tokens: Path, cells: list[tuple[str, str, int]]) -> list[dict[str, int]]:
    return [measure(world, config_of(folder, tokens, SMALL, *cell)) for cell in cells]


def test_a_small_model_takes_what_is_predicted(tmp_path: Path, tokens: Path) -> None:
    cells = [("fsdp2", "fp32", 1), ("zero2", "fp32", 1)]
    for cell, found in zip(cells, run_ranks(2, _measured, tmp_path, tokens, cells, fresh=True)[0], strict=True):
        check(config_of(tmp_path, tokens, SMALL, *cell), cell[2], found)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["rear_b.yaml", "ablation/rar_l_plain.yaml", "rear_alitok_b.yaml", "rear_titok_b64.yaml"]
)
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


class _GpuAttention(torch.autograd.Function):
    """Keeps what a GPU's kernel keeps, and writes its output where the projection reads it. Computes nothing."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.zeros_like(value.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        context.save_for_backward(query, key, value, output)
        return output


class _GpuNorm(torch.autograd.Function):
    """Keeps what a GPU's RMSNorm and LayerNorm keep: their input. Computes nothing."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.clone()


def _as_on_a_gpu(block: nn.Module, cast: bool) -> None:
    """As fake tensors of CUDA showed it with torch 2.14: under autocast (cast), norms take and give float32."""
    for module in block.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.forward = lambda x: _GpuNorm.apply(x.float() if cast else x)
        if isinstance(module, Attention):
            module.kernel = lambda query, key, value, dropout: _GpuAttention.apply(query, key, value)


@pytest.mark.parametrize(
    ("strategy", "precision"), [("single", "bf16"), ("ddp", "bf16"), ("fsdp2", "bf16"), ("single", "fp32")]
)
@pytest.mark.parametrize("name", ["rear_b.yaml", "ablation/rar_l_plain.yaml", "rear_alitok_b.yaml"])
def test_what_a_block_keeps_on_a_gpu_is_as_predicted(name: str, strategy: str, precision: str) -> None:
    overrides = ["model.width=192", "model.num_heads=4", "model.depth=1", "model.dropout=0", "train.micro_batch_size=2"]
    heads = "objective.heads={encode_tap: null, decode_tap: null}"
    cfg = config.load(name, [heads, *overrides, f"strategy={strategy}", f"train.precision={precision}"])
    cfg.model.mlp_width = None
    cast = precision == "bf16" and strategy != "fsdp2"
    dtype = torch.bfloat16 if precision == "bf16" and not cast else torch.float32
    block = build_model(cfg).blocks[0].to(dtype).train()
    _as_on_a_gpu(block, cast)
    positions = cfg.tokenizer.num_tokens + (cfg.model.architecture != "alitok")
    x, condition = (torch.zeros(2, positions, 192, dtype=dtype, requires_grad=True) for _ in range(2))
    rotation = torch.zeros(1, positions, 24, 2)
    inputs = {"alitok": (x, rotation)}.get(cfg.model.architecture, (x, condition, None))
    if cfg.model.conditioning == "in_context":
        inputs = (x,)
    shapes = {tuple(weight.shape) for weight in block.parameters() if weight.ndim == 2}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in (condition.data_ptr(), rotation.data_ptr())  # by all blocks
        if not shared and tuple(tensor.shape) not in shapes and tuple(tensor.shape)[::-1] not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    half = torch.autocast("cpu", torch.bfloat16, enabled=cast)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), half:
        output = block(*inputs)
    assert output.requires_grad
    found = one_block_bytes(cfg, "cuda")
    print(name, strategy, precision, f"{found / sum(kept.values()):.3f}", f"{found / one_block_bytes(cfg, 'cpu'):.2f}")
    assert found == pytest.approx(sum(kept.values()), rel=0.02)


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


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rear_b.yaml", "rear_alitok_b.yaml"])
def test_what_a_gpu_keeps_is_as_predicted(name: str) -> None:
    """The memory that is allocated between the forward pass and the backward pass, logits included."""
    cfg = config.load(name, ["objective=ar", "model.depth=8", "train.micro_batch_size=16", "strategy=single"])
    device = torch.device("cuda")
    model = build_model(cfg).to(device)
    model.init_weights(0)
    tokens = torch.randint(0, 32, (16, cfg.tokenizer.num_tokens), device=device)
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        output = model(tokens, torch.arange(16, device=device), None)
    casts = 2 * sum(weight.numel() for weight in model.parameters() if weight.ndim == 2)
    found = torch.cuda.memory_allocated() - before
    # The loss and the gradient of the logits come later; autocast's copies of weights are another part of the formula.
    later = 16 * cfg.tokenizer.num_tokens * cfg.tokenizer.codebook_size * (4 + 4)
    assert output["logits"].requires_grad
    assert activation_bytes(cfg, "cuda") - later == pytest.approx(found - casts, rel=0.05)
