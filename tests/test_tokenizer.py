from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from rear_scale.config import InputError, TokenizerConfig, TokenizerTrainingConfig, load
from rear_scale.tokenizer import compact_training, open_tokenizer
from rear_scale.tokenizer.compact import CodeTracker, CompactTokenizer
from rear_scale.tokenizer.maskgit_vqgan import MaskgitVqgan

CPU = torch.device("cpu")


def config(path: Path, **training_fields: float) -> TokenizerConfig:
    fields = {"images": "x", "steps": 12, "batch_size": 16, "channels": 16, "continuous_steps": 4, **training_fields}
    return TokenizerConfig("compact", str(path), 16, 16, 32, 8, TokenizerTrainingConfig(**fields), grid=[4, 4])


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """64 grey images of 16 pixels: mosaics of 4 x 4 patches."""
    coarse = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 1), dtype=np.uint8)
    return coarse.repeat(4, 1).repeat(4, 2).repeat(3, 3)


def test_training_lowers_the_error_and_uses_the_codes(tmp_path: Path, images: np.ndarray) -> None:
    cfg = config(tmp_path / "weights", steps=150, continuous_steps=50)
    tokenizer = compact_training.train_compact(cfg, images, CPU)
    pixels = compact_training.to_unit_range(torch.from_numpy(images))
    with torch.no_grad():
        ids = tokenizer.encode(pixels)
        error = (tokenizer.decode(ids) - pixels).square().mean()
    assert error < 0.5 * pixels.var()
    assert len(ids.unique()) > 20


def test_shapes_and_ranges(images: np.ndarray) -> None:
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(16, 32, 8, 16)
    tokenizer.codes.normal_()
    pixels = compact_training.to_unit_range(torch.from_numpy(images[:3]))
    ids = tokenizer.encode(pixels)
    assert (ids.shape, ids.dtype) == ((3, 16), torch.int64)
    assert tokenizer.codebook.shape == (32, 8)
    decoded = tokenizer.decode(ids)
    assert decoded.shape == (3, 3, 16, 16)
    assert 0 <= decoded.min() <= decoded.max() <= 1
    latents = tokenizer.latents(pixels)
    assert torch.equal(tokenizer.nearest(latents), torch.cdist(latents, tokenizer.codes).argmin(1))


def test_a_token_does_not_see_far_away_pixels() -> None:
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(24, 32, 8, 16)
    one, other = torch.zeros(2, 1, 3, 24, 24)
    other[..., 20:, 20:] = 1
    same = (tokenizer.latents(one) == tokenizer.latents(other)).all(1).view(6, 6)
    assert same[:4, :4].all()
    assert not same[5, 5]


def test_training_continues_after_a_kill_as_if_unbroken(
    tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact_training, "_SAVE_EVERY", 3)
    compact_training.train_compact(config(tmp_path / "unbroken"), images, CPU)
    step = compact_training._TrainingRun.train_step

    def killed(self, pixels):
        if self.step == 8:
            raise KeyboardInterrupt
        return step(self, pixels)

    cfg = config(tmp_path / "broken")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(compact_training._TrainingRun, "train_step", killed)
        compact_training.train_compact(cfg, images, CPU)
    steps = []
    monkeypatch.setattr(
        compact_training._TrainingRun, "train_step", lambda self, pixels: steps.append(self.step) or step(self, pixels)
    )
    compact_training.train_compact(cfg, images, CPU)
    assert steps[0] == 6
    assert (tmp_path / "broken").read_bytes() == (tmp_path / "unbroken").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "unbroken"]


def test_progress_of_other_settings_is_not_continued(tmp_path: Path, images: np.ndarray) -> None:
    cfg = config(tmp_path / "weights")
    run = compact_training._TrainingRun(cfg, cfg.training, CPU, compact_training.training_settings(cfg, images))
    run.train_step(torch.from_numpy(images))
    run.save(tmp_path / "progress")
    same, other = (config(tmp_path / "weights", lr=lr) for lr in (1e-3, 2e-3))
    for cfg, expected in ((same, 1), (other, 0)):
        resumed = compact_training._TrainingRun(cfg, cfg.training, CPU, compact_training.training_settings(cfg, images))
        resumed.resume(tmp_path / "progress")
        assert resumed.step == expected


def test_a_diverged_training_writes_nothing(
    tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact_training, "_SAVE_EVERY", 1)
    with pytest.raises(
        FloatingPointError, match=r"tokenizer training, step \d+: .* Lower tokenizer.training.lr=1e\+30"
    ):
        compact_training.train_compact(config(tmp_path / "weights", lr=1e30), images, CPU)
    assert not list(tmp_path.glob("weights"))
    # The last update alone: its loss was computed before it.
    step = compact_training._TrainingRun.train_step

    def ruined(self, pixels):
        loss = step(self, pixels)
        if self.step == 12:
            self.tokenizer.codes[0] = torch.nan
        return loss

    monkeypatch.setattr(compact_training._TrainingRun, "train_step", ruined)
    with pytest.raises(FloatingPointError, match="step 12: a weight is not finite"):
        compact_training.train_compact(config(tmp_path / "weights"), images, CPU)
    assert not list(tmp_path.glob("weights"))


def test_finished_weights_belong_to_their_settings_and_images(tmp_path: Path, images: np.ndarray) -> None:
    cfg = config(tmp_path / "weights")
    compact_training.train_compact(cfg, images, CPU)
    compact_training.check_same_training(cfg, images)
    cfg.weights = str((tmp_path / "weights").rename(tmp_path / "moved"))
    cfg.training.images = "moved too"
    compact_training.check_same_training(cfg, images)
    other = config(tmp_path / "moved", lr=2e-3)
    with pytest.raises(InputError, match=r"tokenizer.training.lr=0.002, but .*moved was trained with .*lr=0.001"):
        compact_training.check_same_training(other, images)
    with pytest.raises(InputError, match=r"was trained with images of tokenizer.training.images="):
        compact_training.check_same_training(cfg, images[1:])
    CompactTokenizer(16, 32, 8, 16).save(tmp_path / "unknown")
    compact_training.check_same_training(config(tmp_path / "unknown"), images)


def test_a_training_without_codes_is_refused() -> None:
    for value in (-1, 400, 500):
        with pytest.raises(
            InputError, match=f"tokenizer.training.continuous_steps={value} must lie between 0 and .*=400"
        ):
            load("demo.yaml", [f"tokenizer.training.continuous_steps={value}"])
    load("demo.yaml", ["tokenizer.training.continuous_steps=0"])


def test_k_means_finds_clusters_and_dead_codes_move() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 4, generator=generator) * 10
    latents = centres.repeat(50, 1) + 0.01 * torch.randn(400, 4, generator=generator)
    tokenizer = CompactTokenizer(16, 8, 4, 16)
    tracker = CodeTracker(tokenizer, decay=0.5, restart_below=0.1)
    tracker.initialize(latents, generator)
    assert torch.cdist(latents, tokenizer.codes).min(1).values.mean() < 3
    tokenizer.codes[3] = 1e3
    tracker.sums[3] = 1e3
    for _ in range(6):
        tracker.update(latents, tokenizer.nearest(latents), generator)
    assert tokenizer.codes[3].abs().max() < 100


def test_fewer_latents_than_codes_are_refused() -> None:
    tracker = CodeTracker(CompactTokenizer(16, 32, 8, 16), 0.99, 0.5)
    with pytest.raises(InputError, match="tokenizer.codebook_size=32, but the training images give only 31 latents"):
        tracker.initialize(torch.randn(31, 8), torch.Generator())


def test_wrong_sizes_and_files_are_named(tmp_path: Path, images: np.ndarray) -> None:
    cfg = config(tmp_path / "weights")
    compact_training.train_compact(cfg, images, CPU)
    assert open_tokenizer(cfg, CPU).num_tokens == 16
    sizes = {"image_size": 24, "num_tokens": 9, "codebook_size": 64, "codebook_dim": 4}
    for field, value in {**sizes, "grid": [2, 8], "prefix_tokens": 4}.items():
        with pytest.raises(InputError, match=re.escape(f"tokenizer.{field}={value}, but".replace(", 8", ",8"))):
            open_tokenizer(TokenizerConfig(**{**vars(cfg), field: value}), CPU)
    with pytest.raises(InputError, match="not found: tokenizer.weights"):
        open_tokenizer(TokenizerConfig(**{**vars(cfg), "weights": str(tmp_path / "none")}), CPU)
    with pytest.raises(InputError, match="tokenizer.weights is not set"):
        open_tokenizer(TokenizerConfig(**{**vars(cfg), "weights": None}), CPU)
    data = (tmp_path / "weights").read_bytes()
    for name, content in (("short", data[:200]), ("text", b"hello"), ("cut", data[:-10])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            open_tokenizer(TokenizerConfig(**{**vars(cfg), "weights": str(tmp_path / name)}), CPU)
    with pytest.raises(InputError, match="tokenizer.num_tokens=9"):
        compact_training.train_compact(TokenizerConfig(**{**vars(cfg), "num_tokens": 9}), images, CPU)
    with pytest.raises(InputError, match=r"tokenizer.grid=\[2, 8\] .*Set tokenizer.grid=\[4,4\]"):
        compact_training.train_compact(TokenizerConfig(**{**vars(cfg), "grid": [2, 8]}), images, CPU)
    with pytest.raises(InputError, match="the images are 16x16"):
        compact_training.train_compact(TokenizerConfig(**{**vars(cfg), "image_size": 24}), images, CPU)


def test_published_files_are_named_when_they_are_missing_or_wrong(tmp_path: Path) -> None:
    def opened(name: str, content) -> None:
        file = tmp_path / name
        content(file)
        open_tokenizer(TokenizerConfig("maskgit_vqgan", str(file)), CPU)

    for name, published in (
        ("maskgit_vqgan", "maskgit-vqgan-imagenet-f16-256.bin"),
        ("titok_b64", "tokenizer_titok_b64.bin"),
        ("alitok", "AliTok.pth"),
    ):
        with pytest.raises(InputError, match=f"not found: tokenizer.weights=.*{published}"):
            open_tokenizer(TokenizerConfig(name, str(tmp_path / "none")), CPU)
        with pytest.raises(InputError, match=f"tokenizer.weights is not set.*{published}"):
            open_tokenizer(TokenizerConfig(name), CPU)
    with pytest.raises(InputError, match="not one of compact, maskgit_vqgan, titok_b64, alitok"):
        open_tokenizer(TokenizerConfig("vqgan", "x"), CPU)
    with pytest.raises(InputError, match="weights are missing, decoder.conv_in.bias among them"):
        opened("other.bin", lambda file: torch.save({"layer.weight": torch.zeros(2)}, file))
    with pytest.raises(InputError, match="does not hold tensors by name"):
        opened("list.bin", lambda file: torch.save([1, 2], file))
    with pytest.raises(InputError, match=r"code.bin (is a pickle that holds more than tensors|cannot be read)"):
        opened("code.bin", lambda file: torch.save({"run": print}, file))
    for name in ("cut.bin", "cut.safetensors"):
        with pytest.raises(InputError, match=f"{name} (cannot be read|is not a plain file)"):
            opened(name, lambda file: file.write_bytes(b"PK\x03\x04 and no more"))
    shapes = {name: value.shape for name, value in MaskgitVqgan().state_dict().items()}
    shapes["quantize.embedding.weight"] = torch.Size((2048, 256))
    with pytest.raises(InputError, match=r"quantize.embedding.weight is \[2048, 256\] in the file and \[1024, 256\]"):
        opened("big.bin", lambda file: torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, file))


def test_a_published_folder_stands_for_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = MaskgitVqgan().state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    opened = open_tokenizer(TokenizerConfig("maskgit_vqgan", str(tmp_path)), CPU)
    assert torch.equal(opened.codebook, weights["quantize.embedding.weight"])
