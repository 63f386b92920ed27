from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import NUM_CLASSES, NUM_TOKENS, tiny_config
from torch import Tensor

from rear_scale.config import InputError
from rear_scale.model import build_model
from rear_scale.model.attention import KERNELS, Attention, choose_kernel, rotated, use_kernel

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def attention(dropout: float = 0.0) -> Attention:
    torch.manual_seed(0)
    return Attention(48, 3, dropout, 0.0, norm=torch.nn.LayerNorm)


def flash_attn(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str | None, capability: tuple[int, int]) -> None:
    """An installed flash-attn package of that text, or none, and a GPU of that compute capability."""
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    if text is not None:
        (folder / "flash_attn").mkdir()
        (folder / "flash_attn/__init__.py").write_text(text)
        monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_flash_is_chosen_where_it_can_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flash_attn(monkeypatch, tmp_path, "", (8, 0))
    lines: list[str] = []
    assert choose_kernel("auto", GPU, "bf16", lines.append) == choose_kernel("flash", GPU, "bf16") == "flash"
    assert choose_kernel("auto", GPU, "fp32", lines.append) == choose_kernel("sdpa", GPU, "bf16") == "sdpa"
    assert choose_kernel("auto", CPU, "bf16", lines.append) == "sdpa"
    assert lines == []
    with pytest.raises(
        InputError, match=r"model\.kernel=flash cannot run: it needs a CUDA device; it needs train\.precision=bf16"
    ):
        choose_kernel("flash", CPU, "fp32")


@pytest.mark.parametrize(
    ("text", "capability", "reason"),
    [
        (None, (9, 0), "the flash-attn package is not installed"),
        ("", (7, 5), "flash-attn needs a GPU of compute capability 8.0 or more, and this one has 7.5"),
        ("import flash_attn_2_cuda", (9, 0), "the flash-attn package cannot be imported (No module named"),
        ("raise ImportError('undefined symbol: _ZN3c10\\nmore')", (9, 0), "(undefined symbol: _ZN3c10)"),
        ("raise OSError('libcudart.so.12: cannot open shared object file')", (9, 0), "(libcudart.so.12: cannot open"),
        (
            "import torch; torch.ops.flash_attn.fwd_of_another_version",
            (10, 0),
            "the flash-attn package cannot be imported",
        ),
    ],
)
def test_flash_that_cannot_run_is_passed_over_with_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, capability: tuple[int, int], reason: str
) -> None:
    flash_attn(monkeypatch, tmp_path, text, capability)
    lines: list[str] = []
    assert choose_kernel("auto", GPU, "bf16", lines.append) == "sdpa"
    assert len(lines) == (text is not None)  # what nobody has installed needs no word
    assert all(line.startswith("model.kernel=auto: sdpa, because ") and reason in line for line in lines)
    assert "\n" not in "".join(lines)
    with pytest.raises(InputError) as refused:
        choose_kernel("flash", GPU, "bf16")
    assert reason in str(refused.value)


def test_every_attention_of_a_model_uses_the_chosen_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(query, key, value, dropout):
        calls.append((query.shape, dropout))
        return value

    monkeypatch.setitem(KERNELS, "counted", counted)
    model = torch.nn.Sequential(attention(0.1), attention(0.1))
    use_kernel(model, "counted")
    model(torch.randn(2, 5, 48))
    model.eval()(torch.randn(2, 5, 48))
    assert [dropout for _, dropout in calls] == [0.1, 0.1, 0.0, 0.0]
    assert all(shape == (2, 3, 5, 16) for shape, _ in calls)


def test_attention_is_the_formula() -> None:
    module, x = attention(), torch.randn(2, 7, 48)
    query, key, value = module.qkv(x).view(2, 7, 3, 3, 16).permute(2, 0, 3, 1, 4)
    scores = module.q_norm(query) @ module.k_norm(key).transpose(2, 3) / 4
    weights = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1)
    expected = module.proj((weights @ value).transpose(1, 2).reshape(2, 7, 48))
    assert torch.allclose(module(x), expected, atol=1e-5)


def test_rotation_turns_pairs_and_keeps_relative_positions() -> None:
    def turned(x: torch.Tensor, at: float) -> torch.Tensor:
        angles = at * torch.tensor([1.0, 0.1])
        return rotated(x[None, None, None], torch.stack((angles.cos(), angles.sin()), dim=-1)[None, None])[0, 0, 0]

    x, y = torch.randn(4), torch.randn(4)
    assert torch.allclose(turned(x, 3.0) @ turned(y, 5.0), turned(x, 10.0) @ turned(y, 12.0), atol=1e-5)
    assert torch.allclose(turned(torch.tensor([1.0, 0, 0, 0]), torch.pi / 2), torch.tensor([0, 1.0, 0, 0]), atol=1e-6)
    assert not rotated(x[None, None, None], torch.zeros(1, 1, 2, 2)).any()


@pytest.mark.gpu
def test_flash_equals_sdpa() -> None:
    pytest.importorskip("flash_attn", reason="the flash-attn package is not installed")
    inputs = [torch.randn(2, 4, 258, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    results = []
    for name in ("sdpa", "flash"):
        output = KERNELS[name](*inputs, 0.0)
        gradients = torch.autograd.grad(output.float().square().sum(), inputs)
        results.append([output, *gradients])
    for one, other in zip(*results, strict=True):
        assert (one - other).float().norm() < 0.01 * one.float().norm()


def logits_and_gradients(folder: Path, tokens: Path, device: str, kernel: str) -> dict[str, Tensor]:
    """Of a reAR model in bf16, by name."""
    cfg = tiny_config(folder, tokens, "model.width=128", "model.num_heads=2", "model.dropout=0", "model.attn_dropout=0")
    model = build_model(cfg)
    model.init_weights(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "adaLN" in name:  # zero at first, and a zero gate hides the attention
                weight.fill_(0.01)
    use_kernel(model.to(device), kernel)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 32, (6, NUM_TOKENS), generator=generator).to(device)
    with torch.autocast(device, torch.bfloat16):
        output = model(clean, torch.arange(6, device=device) % NUM_CLASSES, None)
    sum(value.float().square().mean() for value in output.values()).backward()
    # The gradient of k_norm.bias is zero but for rounding: it cancels in the softmax.
    gradients = {name: weight.grad for name, weight in model.named_parameters() if "k_norm.bias" not in name}
    return {**output, **{name: value for name, value in gradients.items() if value is not None}}


@pytest.mark.parametrize(
    ("device", "kernel"), [("cpu", "formula"), pytest.param("cuda", "flash", marks=pytest.mark.gpu)]
)
def test_kernels_give_the_same_logits_and_gradients(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, device: str, kernel: str
) -> None:
    """On a CPU against attention written out, so that the comparison itself is tried everywhere."""

    def formula(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        hidden = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
        return scores.float().masked_fill(hidden, -torch.inf).softmax(-1).to(value.dtype) @ value

    monkeypatch.setitem(KERNELS, "formula", formula)
    if kernel == "flash":
        pytest.importorskip("flash_attn", reason="the flash-attn package is not installed")
    expected, found = (logits_and_gradients(tmp_path, tokens, device, name) for name in ("sdpa", kernel))
    assert {"logits", "encode", "decode"} < expected.keys() == found.keys()
    for name, value in expected.items():
        assert (found[name] - value).float().norm() <= 0.02 * value.float().norm() + 1e-6, name
