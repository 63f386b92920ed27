"""Products in fp8 against those in bf16: on a CPU emulated (cast as on a GPU, multiplied in float32), and on GPUs themselves."""

from __future__ import annotations

import importlib.util
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import NUM_CLASSES, NUM_TOKENS, run_alone, run_ranks, tiny_config
from test_parallel import QUIET, build, run_steps
from torch import Tensor

from rear_scale.config import InputError
from rear_scale.config.derived import check_resumable, to_dict
from rear_scale.model import build_model, fp8, meta_model, recompute
from rear_scale.model.recompute import prepare_blocks
from rear_scale.scaling.cluster import open_cluster
from rear_scale.scaling.planner import choices
from rear_scale.scaling.simulate import simulate
from rear_scale.train import setup
from rear_scale.world import Ranks, World

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FP8 = ("train.precision=bf16", "train.fp8=true", "strategy=single")
# Relative. Measured, emulated: 0.04, 0.11 and 2e-4.
OUTPUTS, GRADIENTS, LOSSES = 0.08, 0.2, 1e-3

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
# What is true of both: emulated anywhere, and the real kernels.
emulated_and_real = pytest.mark.parametrize("emulate", [True, pytest.param(False, marks=pytest.mark.gpu)])


def prepare(emulate: bool, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the products run. The emulation is for tests: no setting leads to it."""
    if emulate:
        monkeypatch.setattr(recompute, "use_fp8", partial(fp8.use_fp8, emulate=True))
        return CPU
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no products of fp8: its compute capability is below 8.9")
    return GPU


def logits_and_gradients(folder: Path, tokens: Path, device: torch.device, *overrides: str) -> dict[str, Tensor]:
    """Of a model whose blocks do as much as its embeddings; with gradients as small as those of a mean over a batch."""
    cfg = tiny_config(folder, tokens, *QUIET, "model.width=64", *overrides)
    model = build_model(cfg)
    model.init_weights(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "adaLN" in name:
                weight.fill_(0.5 if name.endswith("bias") else 0.01)
    prepare_blocks(model.to(device), cfg)
    clean = torch.randint(0, 32, (6, NUM_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        output = model(clean, torch.arange(6, device=device) % NUM_CLASSES, None)
    (1e-4 * sum(value.float().square().mean() for value in output.values())).backward()
    # The gradient of k_norm.bias is zero but for rounding: it cancels in the softmax.
    gradients = {name: weight.grad for name, weight in model.named_parameters() if "k_norm.bias" not in name}
    return {**output, **{name: value for name, value in gradients.items() if value is not None}}


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative distances by name."""
    assert {"logits", "encode", "decode"} < expected.keys() == found.keys()
    return {
        name: ((found[name].float() - value.float()).norm() / value.float().norm()).item()
        for name, value in expected.items()
    }


@needs_torchao
@emulated_and_real
def test_logits_and_gradients_are_near_those_of_bf16(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, emulate: bool
) -> None:
    device = prepare(emulate, monkeypatch)
    plain = logits_and_gradients(tmp_path, tokens, device, "train.precision=bf16")
    found = logits_and_gradients(tmp_path, tokens, device, *FP8)
    errors = apart(found, plain)
    print(sorted(errors.items(), key=lambda one: -one[1])[:8], errors["logits"])
    assert 0.001 < errors["logits"] < OUTPUTS  # cast at all, and well
    assert max(errors[name] for name in ("encode", "decode")) < OUTPUTS
    assert max(errors.values()) < GRADIENTS
    if emulate:
        # What these bounds are there for: casts without scales lose small gradients altogether.
        from torchao.float8 import float8_scaling_utils

        monkeypatch.setattr(float8_scaling_utils, "tensor_to_scale", lambda *_, **__: torch.ones(()))
        errors = apart(logits_and_gradients(tmp_path, tokens, device, *FP8), plain)
        print(sorted(errors.items(), key=lambda one: -one[1])[:8], errors["logits"])
        assert max(errors.values()) > 3 * GRADIENTS


@needs_torchao
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ((), {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}),
        (("model.mlp_width=40",), {"attn.qkv", "attn.proj"}),  # no multiple of 16
        (("model.architecture=alitok",), {"attn.qkv", "attn.proj", "mlp.w1", "mlp.w2", "mlp.w3"}),
    ],
)
def test_only_products_of_blocks_are_converted_and_names_stay(
    tmp_path: Path, tokens: Path, settings: tuple[str, ...], names: set[str]
) -> None:
    model = build_model(tiny_config(tmp_path, tokens, *FP8, *settings))
    before = dict(model.named_parameters())
    fp8.use_fp8(model, emulate=True)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is weight for name, weight in before.items())
    converted = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert converted == {f"blocks.{block}.{name}" for block in range(2) for name in names}


def losses_of(world: World, folder: Path, tokens: Path, emulate: bool, steps: int, *overrides: str) -> list[float]:
    """Of the first updates; `emulate` is said again because this runs in other processes too."""
    recompute.use_fp8 = partial(fp8.use_fp8, emulate=emulate)
    try:
        cfg = tiny_config(folder, tokens, *QUIET, f"train.micro_batch_size={12 // world.size}", *overrides)
        return [loss for loss, _ in run_steps(world, cfg, build(world, cfg), 1, steps, lr=2e-3)]
    finally:
        recompute.use_fp8 = fp8.use_fp8


@needs_torchao
@emulated_and_real
def test_twenty_updates_are_near_those_of_bf16_under_every_policy(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, emulate: bool
) -> None:
    prepare(emulate, monkeypatch)
    plain = run_alone(losses_of, tmp_path, tokens, emulate, 20, "strategy=single", "train.precision=bf16")
    found = run_alone(losses_of, tmp_path, tokens, emulate, 20, *FP8)
    print(max(abs(one / other - 1) for one, other in zip(found, plain, strict=True)))
    assert found == pytest.approx(plain, rel=LOSSES)
    assert found != plain
    for policy in ("full", "selective", "every_n"):
        again = run_alone(losses_of, tmp_path, tokens, emulate, 3, *FP8, f"train.activation_checkpointing={policy}")
        assert again == pytest.approx(found[:3], rel=1e-6), policy


@needs_torchao
@pytest.mark.long
def test_ranks_train_alike(tmp_path: Path, tokens: Path) -> None:
    """Scales are those of a rank's own micro-batch, so that the number of ranks changes the rounding."""
    alone = run_alone(losses_of, tmp_path, tokens, True, 4, *FP8)
    for name, size in (("ddp", 2), ("fsdp2", 2), ("hsdp", 4)):
        found = run_ranks(size, losses_of, tmp_path, tokens, True, 4, *FP8[:2], f"strategy={name}")
        assert all(losses == pytest.approx(alone, rel=LOSSES) for losses in found), name


@needs_torchao
@pytest.mark.long
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_blocks_train_alike(tmp_path: Path, tokens: Path) -> None:
    plain = run_alone(losses_of, tmp_path, tokens, True, 3, *FP8)
    found = run_alone(losses_of, tmp_path, tokens, True, 3, *FP8, "train.compile=true")
    assert found == pytest.approx(plain, rel=LOSSES)


def test_what_fp8_cannot_do_is_refused_with_the_reason(tmp_path: Path, tokens: Path) -> None:
    for rule, settings in {
        r"train\.fp8=True needs train\.precision=bf16 .*not fp32": ("strategy=single", "train.fp8=true"),
        r"train\.fp8=True is not offered with strategy=zero2: .*Use strategy=fsdp2": (*FP8, "strategy=zero2"),
        r"model\.width=24 is a side of every one\. Use model\.width=32": (*FP8, "model.width=24"),
    }.items():
        with pytest.raises(InputError, match=rule):
            tiny_config(tmp_path, tokens, *settings)


def test_fp8_is_refused_before_ranks_meet_where_it_cannot_run(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny_config(tmp_path, tokens, *FP8, "train.micro_batch_size=12")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"train\.fp8=true cannot run: .*it needs a CUDA device.*train\.fp8=false"):
        setup.check_data(cfg, Ranks(0, 0, 1, 1, None, None, "single"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(InputError, match=r"compute capability 8\.9 or more, and A100 has 8\.0\. Or use"):
        fp8.check_fp8(cfg, GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp8.check_fp8(cfg, GPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed \(pip install torchao\)\. Or use train\.fp8=false"):
        fp8.check_fp8(cfg, GPU)
    cfg.train.fp8 = False
    fp8.check_fp8(cfg, CPU)


def test_fp8_is_planned_with_the_strategies_that_offer_it_and_not_simulated(tmp_path: Path, tokens: Path) -> None:
    cfg = tiny_config(tmp_path, tokens, *FP8, "cluster.gpus=2")
    found = choices(cfg, open_cluster(cfg), meta_model(cfg))
    assert {one.cfg.strategy.name for one in found} <= {"ddp", "fsdp2", "hsdp"}
    assert found
    with pytest.raises(InputError, match=r"train\.fp8=true cannot be simulated"):
        simulate(cfg, 1)


def test_a_run_changes_to_fp8_only_where_that_is_allowed(tmp_path: Path, tokens: Path) -> None:
    before = to_dict(tiny_config(tmp_path, tokens, "strategy=single", "train.precision=bf16"))
    with pytest.raises(InputError, match=r"resume\.allow=\[train\.fp8\]"):
        check_resumable(tiny_config(tmp_path, tokens, *FP8), before, "step_4")
    check_resumable(tiny_config(tmp_path, tokens, *FP8, "resume.allow=[train.fp8]"), before, "step_4")
