from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import NUM_CLASSES, NUM_TOKENS, tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rear_scale.config import InputError
from rear_scale.model import build_model
from rear_scale.model.recompute import prepare_blocks

POLICIES = ("none", "full", "every_n", "selective")


def passed(folder: Path, tokens: Path, *overrides: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int], int]:
    """Outputs, gradients, forward passes of each block, and bytes saved for the backward pass."""
    cfg = tiny_config(folder, tokens, "model.depth=3", *overrides)
    model = build_model(cfg)
    model.init_weights(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "adaLN" in name:
                weight.fill_(0.01)
    passes = [0] * len(model.blocks)
    for number, block in enumerate(model.blocks):

        def count(*inputs, number=number, forward=block.forward):
            passes[number] += 1
            return forward(*inputs)

        if cfg.train.compile is not True:
            block.forward = count
    prepare_blocks(model, cfg)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    clean = torch.randint(0, 32, (6, NUM_TOKENS))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(clean, torch.arange(NUM_CLASSES), torch.arange(6) % NUM_CLASSES)
    torch.manual_seed(5)  # what the forward pass left behind must not matter
    sum(value.float().square().mean() for value in output.values()).backward()
    return output, {name: weight.grad for name, weight in model.named_parameters()}, passes, sum(saved.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_policy_gives_the_same_gradients_with_less_memory(tmp_path: Path, tokens: Path, dropout: float) -> None:
    drop = [f"model.dropout={dropout}", f"model.attn_dropout={dropout}"]
    found = {policy: passed(tmp_path, tokens, *drop, f"train.activation_checkpointing={policy}") for policy in POLICIES}
    plain_output, plain_gradients, *_ = found["none"]
    assert {"logits", "encode", "decode"} == set(plain_output)
    for policy, (output, gradients, *_) in found.items():
        for name, value in output.items():
            assert torch.equal(value, plain_output[name]), (policy, name)
        for name, value in gradients.items():
            assert torch.equal(value, plain_gradients[name]), (policy, name)
    # The features that the heads read cost no pass of their own.
    assert {policy: passes for policy, (_, _, passes, _) in found.items()} == {
        "none": [1, 1, 1],
        "full": [2, 2, 2],
        "every_n": [2, 1, 2],
        "selective": [2, 2, 2],
    }
    sizes = {policy: size for policy, (*_, size) in found.items()}
    assert sizes["full"] < sizes["every_n"] < sizes["none"]


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, inputs=(), named=None):
        self.count[operation.overloadpacket.__name__] += 1
        return operation(*inputs, **(named or {}))


def test_selective_repeats_no_product_and_no_attention(tmp_path: Path, tokens: Path) -> None:
    counts = {}
    for policy in POLICIES:
        with Operations() as operations:
            passed(tmp_path, tokens, f"train.activation_checkpointing={policy}", "model.attn_dropout=0")
        counts[policy] = operations.count
    products = [name for name in counts["none"] if name in ("mm", "addmm", "bmm") or name.startswith("_scaled_dot")]
    assert len(products) >= 3
    for name in products:
        assert counts["selective"][name] == counts["none"][name], name
    assert counts["selective"]["gelu"] == counts["none"]["gelu"] + 3
    assert counts["full"]["addmm"] == counts["none"]["addmm"] + 3 * 5


def test_nothing_is_recomputed_without_gradients(tmp_path: Path, tokens: Path) -> None:
    cfg = tiny_config(tmp_path, tokens, "train.activation_checkpointing=full")
    model = build_model(cfg)
    model.init_weights(0)
    prepare_blocks(model, cfg)
    with torch.no_grad():
        logits = model.eval()(torch.zeros(2, NUM_TOKENS, dtype=torch.long), torch.arange(2), None)["logits"]
    assert logits.shape == (2, NUM_TOKENS, 32)


# Graphs as they are captured, and with kernels, which take the compiler half a minute.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_blocks_give_the_same_gradients(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: compile_(forward, backend=backend))
    torch._dynamo.reset()
    drop = ["model.dropout=0", "model.attn_dropout=0"]
    output, gradients, *_ = passed(tmp_path, tokens, *drop)
    compiled, found, *_ = passed(
        tmp_path, tokens, *drop, "train.compile=true", "train.activation_checkpointing=every_n"
    )
    assert torch.allclose(compiled["logits"], output["logits"], rtol=1e-5, atol=1e-6)
    for name, value in gradients.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm() + 1e-7, name


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("strategy=zero3", "train.compile=True does not work with strategy=zero3, whose hooks"),
        (
            "train.activation_checkpointing=selective",
            "train.compile=True does not work with .*=selective, which selects",
        ),
    ],
)
def test_impossible_combinations_are_refused_with_the_reason(
    tmp_path: Path, tokens: Path, override: str, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        tiny_config(tmp_path, tokens, "train.compile=true", override)
