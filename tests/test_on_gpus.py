"""What only kernels and memory of a GPU can confirm. Each test runs on a CPU too, so that the test itself is tried everywhere.

python -m pytest -m gpu tests/test_on_gpus.py
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_alone, tiny_config
from test_parallel import QUIET, build, everything
from torch import Tensor

from rear_scale import config
from rear_scale.bench.model import random_model, synchronize
from rear_scale.config import ExperimentConfig, GuidanceConfig, SampleConfig
from rear_scale.evaluate.images.image_set import Generation, ImageSet
from rear_scale.evaluate.networks.feature_cache import extract
from rear_scale.model.modulation import rows_of, sums_by_product
from rear_scale.objective import MicroBatch, Objective, shared_classes
from rear_scale.sample.decode import Decoder
from rear_scale.tokenizer import base
from rear_scale.tokenizer.compact import CompactTokenizer
from rear_scale.tokenizer.maskgit_vqgan import MaskgitVqgan
from rear_scale.world import World

DEVICES = pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
ALITOK = (
    "model.architecture=alitok",
    "tokenizer.num_tokens=21",
    "tokenizer.grid=[4,4]",
    "tokenizer.prefix_tokens=5",
    "objective=ar",
)


def compact() -> CompactTokenizer:
    tokenizer = CompactTokenizer(16, 32, 8, 16)
    tokenizer.codes.normal_()  # zero at first
    return tokenizer


def one_step(world: World, cfg: ExperimentConfig) -> tuple[Objective, MicroBatch]:
    """The objective of a config and a micro-batch of random tokens on the device."""
    tokenizer, B = cfg.tokenizer, cfg.train.micro_batch_size
    draws = torch.Generator().manual_seed(0)
    codebook = torch.randn(tokenizer.codebook_size, tokenizer.codebook_dim, generator=draws)
    objective = Objective(cfg, config.derive(cfg, world.size, 100), codebook, world.device)
    tokens = torch.randint(tokenizer.codebook_size, (B, tokenizer.num_tokens), generator=draws)
    classes, rows = shared_classes(torch.arange(B) % 3, cfg.model.modulation)
    return objective, MicroBatch(tokens, torch.arange(B), torch.zeros(B, dtype=torch.int64), classes, rows).to(
        world.device
    )


def _validated_and_saved(world: World, cfgs: list[ExperimentConfig]) -> list[tuple[float, set[str]]]:
    """The validation loss after one update, and the names of the states that a checkpoint would hold right after it."""
    found = []
    for cfg in cfgs:
        strategy = build(world, cfg)
        objective, batch = one_step(world, cfg)
        task = objective.task(batch, 1)

        def compute(forward, batch=batch, task=task, objective=objective):
            return objective.loss(forward(task.context, batch.classes, batch.class_index, task.order), task)

        strategy.forward_backward(compute, 0)
        strategy.grad_norm()
        strategy.step(1e-3)
        loss = objective.statistic(strategy.evaluate(compute), "loss").item()
        found.append((loss, {name.split("/")[0] for name in everything(strategy)}))
    assert world.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    return found


@DEVICES
def test_fsdp2_validates_and_saves_at_one_step_as_single_does(kind: str, tmp_path: Path, tokens: Path) -> None:
    """Weights are sharded again after the forward pass; AliTok's rotary table stays in float32."""
    settings = [*QUIET, *ALITOK, "train.precision=bf16", "train.global_batch_size=6"]
    cfgs = [tiny_config(tmp_path, tokens, *settings, f"strategy={name}") for name in ("single", "fsdp2")]
    (single, states), (fsdp2, others) = run_alone(_validated_and_saved, cfgs)
    assert states == others == {"param", "exp_avg", "exp_avg_sq"}
    assert fsdp2 == pytest.approx(single, rel=5e-3)


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_modulation_have_the_same_bits_every_time(kind: str, dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(0)
    rows = torch.randint(9, (64,), generator=draws)
    table, arriving = (torch.randn(size, 17, 96, generator=draws).to(dtype) for size in (9, 64))
    exact = sums_by_product(arriving.double(), rows, 9)
    table, arriving, rows = table.to(kind).requires_grad_(), arriving.to(kind), rows.to(kind)
    found = [torch.autograd.grad(rows_of(table, rows), table, arriving)[0] for _ in range(5)]
    assert all(torch.equal(one, found[0]) for one in found)
    # A GPU accumulates in float32 and rounds to bfloat16 once; a CPU adds image by image.
    allowed = (1 if (kind, dtype) == ("cuda", torch.bfloat16) else 16) * torch.finfo(dtype).eps
    assert (found[0].double().cpu() - exact).abs().max() <= allowed * exact.abs().max()


@DEVICES
@torch.inference_mode()
def test_256_images_are_decoded_in_parts_that_take_a_tenth_of_the_memory(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    device = torch.device(kind)
    tokenizer = (MaskgitVqgan() if kind == "cuda" else compact()).to(device).eval()
    if kind == "cpu":
        monkeypatch.setattr(base, "images_at_once", lambda largest, device: 64)
    ids = torch.randint(tokenizer.codebook_size, (256, tokenizer.num_tokens), device=device)
    some = tokenizer.decode(ids[64:128])
    if kind == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    images = tokenizer.decode(ids)
    assert images.isfinite().all()
    assert (images[64:128] - some).abs().max() < 1e-3
    if kind == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        assert torch.cuda.max_memory_allocated() - before <= 0.1 * total + 2 * images.nbytes


def _steps_without_waiting(world: World, cfg: ExperimentConfig, strict: bool) -> list[float]:
    """The losses of two updates; strict: an operation of the second one that waits for the GPU is an error."""
    strategy = build(world, cfg)
    objective, batch = one_step(world, cfg)
    losses = []
    for step in (1, 2):
        synchronize(world.device)
        with _no_waiting() if strict and step == 2 else contextlib.nullcontext():
            task = objective.task(batch, step)

            def compute(forward, batch=batch, task=task):
                return objective.loss(forward(task.context, batch.classes, batch.class_index, task.order), task)

            statistics = [strategy.forward_backward(compute, micro_step) for micro_step in range(2)]
            strategy.grad_norm()
            strategy.step(1e-3)
        losses.append(sum(objective.statistic(one, "loss").item() for one in statistics))
    return losses


@contextlib.contextmanager
def _no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@DEVICES
def test_no_operation_of_a_training_step_waits_for_the_gpu(kind: str, tmp_path: Path, tokens: Path) -> None:
    """Noise, loss with both terms of reAR, two micro-steps, norm, clipping and update."""
    cfg = tiny_config(tmp_path, tokens, "strategy=single", "train.global_batch_size=12", "train.compile=false")
    first, second = run_alone(_steps_without_waiting, cfg, kind == "cuda")
    assert second < first


class _Pixels:
    name = identity = "pixels"

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {"pool": images.reshape(len(images), -1).astype(np.float32)}


def _features(world: World, cfg: ExperimentConfig, folder: Path) -> list[np.ndarray]:
    """Of three generated blocks: in series, and overlapped as an evaluation does it."""
    torch.manual_seed(0)
    tokenizer = compact().to(world.device).eval()
    model = random_model(cfg, world.device, with_heads=False).eval()
    decoder = Decoder(model, SampleConfig(batch_size=4, guidance=GuidanceConfig("constant", 2.0)))

    def draw(numbers: np.ndarray) -> Tensor:
        ids = torch.from_numpy(numbers).to(world.device)
        return decoder.generate(ids % 3, ids)

    def decode(tokens: Tensor, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            pixels = 255 * tokenizer.decode(tokens).clamp(0, 1).permute(0, 2, 3, 1)
        return pixels.to(torch.uint8).cpu().numpy(), numbers % 3

    blocks = [np.arange(start, start + 4) for start in (0, 4, 8)]
    found = []
    for name, generation in (("series", None), ("overlapped", Generation(draw, decode))):
        images = ImageSet(
            name, name, 16, 16, blocks, lambda numbers: decode(draw(numbers), numbers), generation=generation
        )
        (features,) = extract(images, [_Pixels()], folder / name, 4, world)
        found.append(features.rows("pool")[:])
    return found


@DEVICES
def test_an_overlapped_evaluation_sees_the_images_of_one_in_series(kind: str, tmp_path: Path, tokens: Path) -> None:
    series, overlapped = run_alone(_features, tiny_config(tmp_path, tokens), tmp_path)
    assert np.array_equal(series, overlapped)
    assert len(np.unique(series, axis=0)) > 6
