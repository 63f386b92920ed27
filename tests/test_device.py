"""Which device a process computes on, with torch.cuda replaced: nothing here needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rear_scale import device, world
from rear_scale.bench.model import use_device
from rear_scale.config import InputError
from rear_scale.world import Ranks, discover, joined


def machine(monkeypatch: pytest.MonkeyPatch, folder: Path, *, driver: int = 0, files: int = 0) -> None:
    """A machine whose driver lists some GPUs and which has some device files, where torch finds no GPU."""
    for name, count in (("gpus", driver), ("dev", files)):
        (folder / name).mkdir()
        for number in range(count):
            (folder / name / f"nvidia{number}").touch()
    (folder / "dev/nvidiactl").touch()
    monkeypatch.setattr(device, "_TRACES", ((folder / "gpus", "*"), (folder / "dev", "nvidia[0-9]*")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)


def old_driver() -> None:
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")


def no_driver() -> None:
    raise AssertionError("Found no NVIDIA driver on your system.")


def no_libraries() -> None:
    raise RuntimeError("No CUDA GPUs are available")


@pytest.mark.parametrize(
    ("driver", "files", "init", "reason"),
    [
        (8, 8, old_driver, "shows 8 GPUs, but torch cannot use them: The NVIDIA driver on your system is too old"),
        (8, 0, no_libraries, "shows 8 GPUs, but torch cannot use them: No CUDA GPUs are available. "),
        (0, 4, no_driver, "shows 4 GPUs, but torch cannot use them: Found no NVIDIA driver on your system. "),
        (2, 2, lambda: None, "none is visible with CUDA_VISIBLE_DEVICES=9. "),
    ],
)
def test_gpus_that_cannot_be_used_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: int, files: int, init: object, reason: str
) -> None:
    machine(monkeypatch, tmp_path, driver=driver, files=files)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    for use in (device.uses_cuda, use_device, lambda: joined(discover({})).__enter__()):
        with pytest.raises(InputError) as refused:
            use()
        assert reason in str(refused.value)
        assert "set CUDA_VISIBLE_DEVICES= (to nothing) to compute on the CPU" in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_torch_without_cuda_is_refused_beside_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, tmp_path, driver=1)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InputError, match=r"shows 1 GPUs.* is built without CUDA"):
        device.uses_cuda()


@pytest.mark.parametrize(
    "asked",
    [
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"CUDA_VISIBLE_DEVICES": " "},
        {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
        {"CUDA_VISIBLE_DEVICES": "0,1", "DS_ACCELERATOR": "cpu"},
    ],
)
@pytest.mark.parametrize("usable", [True, False])
def test_the_cpu_may_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: dict[str, str], usable: bool
) -> None:
    machine(monkeypatch, tmp_path, driver=8, files=8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    assert not device.uses_cuda()
    assert "asked for" in device.describe(torch.device("cpu"))


def test_a_machine_without_gpus_computes_on_the_cpu_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, tmp_path)
    with joined(discover({})) as here:
        assert here.device == torch.device("cpu")
    assert capsys.readouterr().err == "device: CPU (no GPU found); ranks: 1\n"


@pytest.mark.parametrize("failing", ["set_device", "ones"])
def test_a_gpu_that_does_not_compute_is_refused(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda if failing == "set_device" else torch, failing, fails)
    with pytest.raises(InputError, match=r"GPU 3 cannot be used: CUDA error: no kernel image .* on the device\. "):
        world._device(Ranks(3, 3, 8, 8, "a", 1, "environment"))


@pytest.mark.parametrize(
    ("given", "allocator", "recorder"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, {"TORCH_FR_BUFFER_SIZE": "2000"}),
        ({"PYTORCH_ALLOC_CONF": "x:1"}, {"PYTORCH_ALLOC_CONF": "x:1"}, {"TORCH_FR_BUFFER_SIZE": "2000"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"TORCH_FR_BUFFER_SIZE": "2000"}),
        (
            {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0"},
            {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
            {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0"},
        ),
    ],
)
def test_cuda_is_prepared_and_the_users_settings_stay(
    given: dict[str, str], allocator: dict[str, str], recorder: dict[str, str]
) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    env = dict(given)
    device.prepare(env)
    assert env == {**allocator, **recorder}
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    # What the choice falls on instead.
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.parametrize("enter", [use_device, lambda: joined(discover({})).__enter__()])
def test_every_way_to_a_device_prepares_it(monkeypatch: pytest.MonkeyPatch, enter: object) -> None:
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda **options: None)
    torch.backends.cuda.enable_cudnn_sdp(True)
    enter()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("size", "bound"), [(1, None), (2, torch.device("cuda", 0)), (64, torch.device("cuda", 0))])
def test_a_device_is_bound_in_larger_worlds_alone(
    monkeypatch: pytest.MonkeyPatch, size: int, bound: torch.device | None
) -> None:
    """A bound device makes later groups NCCL splits, on which DeepSpeed fails in a world of one (its issue 8248)."""
    found: dict[str, object] = {}
    monkeypatch.setattr(world, "_device", lambda ranks: torch.device("cuda", 0))
    monkeypatch.setattr(device, "describe", lambda place: "a GPU")
    monkeypatch.setattr(dist, "init_process_group", lambda **options: found.update(options))
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda **options: None)
    monkeypatch.setattr("os.environ", {})
    monkeypatch.setattr(world, "_meet", lambda ranks, timeout_s: dist.HashStore())
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", dist.HashStore)
    monkeypatch.setattr(world, "Peers", lambda *who: None)
    address = (None, None) if size == 1 else ("localhost", 29500)
    with joined(Ranks(0, 0, size, 1, *address, "environment")):
        assert found["backend"] == "cpu:gloo,cuda:nccl"
        assert found["device_id"] == bound


@pytest.mark.gpu
def test_attention_of_a_gpu_is_not_cudnns_and_drops_what_it_is_told() -> None:
    device.prepare()
    query, ones = torch.zeros(8, 16, 257, 48, device="cuda", dtype=torch.bfloat16), torch.ones(1).cuda()
    value = ones.to(query.dtype).expand_as(query).contiguous()
    out = torch.nn.functional.scaled_dot_product_attention(query, query, value, dropout_p=0.1).float()
    # Each output is the kept share of 257 equal probabilities over 0.9: its spread tells the share that is dropped.
    assert 1 - 1 / (1 + 257 * out.var().item()) == pytest.approx(0.1, abs=0.01)


@pytest.mark.gpu
def test_a_world_of_one_on_a_gpu_makes_groups() -> None:
    with joined(discover({})) as here:
        assert here.device.type == "cuda"
        total = torch.ones(3, device=here.device)
        dist.all_reduce(total, group=dist.new_group([0]))
        assert total.tolist() == [1, 1, 1]
