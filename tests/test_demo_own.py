"""The demo on photographs of clothes and on a folder of one's own."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, launch
from PIL import Image

from rear_scale.config import InputError, load, to_dict
from rear_scale.demo import own
from rear_scale.demo.commands import open_folder, stages
from rear_scale.demo.own import SIZES, Folder, look_at, plan
from rear_scale.demo.recipe import MODELS, fashion
from rear_scale.demo.summary import scores_of, table

CPU = torch.device("cpu")
SHORT = [
    "train.total_steps=6",
    "checkpoint.every_steps=2",
    "sample.num_images=40",
    "evaluate.classifier.steps=30",
    "tokenizer.training.steps=150",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own, "product_flops_per_s", lambda device, dtype: 1e11)
    return tmp_path


def pictures(folder: Path, counts: dict[str, int], mode: str = "RGB", side: int = 40) -> Path:
    rng = np.random.default_rng(0)
    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        for number in range(count):
            size = (side + int(rng.integers(0, 9)), side)
            noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            noise.resize(size).convert(mode).save(folder / label / f"{number}.{'jpg' if number % 2 else 'png'}")
    return folder


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"a": 60}, "holds one class, a. The models learn classes"),
        ({"a": 30, "b": 30, "rare": 9}, r"classes of fewer than 10 images: rare \(9\)"),
        ({"a": 20, "b": 20}, "holds 40 images, but 50 are the fewest"),
    ],
)
def test_too_little_to_learn_from_is_refused(tmp_path: Path, counts: dict[str, int], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        look_at(pictures(tmp_path / "photos", counts))


def test_what_is_no_folder_of_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither digits nor fashion nor a folder"):
        look_at(tmp_path / "missing")
    Image.new("RGB", (9, 9)).save(tmp_path / "loose.png")
    with pytest.raises(InputError, match="Give each class a folder"):
        look_at(tmp_path)
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(30):
            (tmp_path / label / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="none of 60 images .* can be read"):
        look_at(tmp_path)


def test_a_folder_is_described_and_planned(here: Path) -> None:
    pictures(here / "my photos", {"ant": 40, "bee": 25}, "L")
    (here / "my photos/ant/broken.png").write_bytes(b"no image")
    folder = look_at(here / "my photos")
    assert (folder.counts, folder.side, folder.is_grey) == ({"ant": 41, "bee": 25}, 40, True)
    found = plan(folder, None, CPU)
    assert found.size == "s"
    assert found.recipe.folder == Path("runs/demo_my_photos")
    text = "\n".join(found.lines(folder))
    assert "66 grey images of 2 classes, 25 to 41 each" in text
    assert "size s: 32 x 32 pixels" in text
    for model in MODELS:
        cfg = found.recipe.load(model)
        assert (cfg.model.num_classes, cfg.tokenizer.num_tokens, cfg.data.assumed_images) == (2, 64, 53)
        assert cfg.sample.num_images % 2 == 0
        assert cfg.evaluate.efficientnet_weights == "package"
        assert (cfg.objective.heads.encode_tap is None) == (model == "ar")
    commands = [stage.line for stage in stages(found.recipe, [0], [])]
    assert f"--images '{here / 'my photos'}'" in commands[0]
    assert len(commands) == len({*commands}) == 14


@pytest.mark.parametrize(
    ("device", "side", "size"),
    [("cpu", 200, "s"), ("cuda", 200, "l"), ("cuda", 50, "m"), ("cuda", 30, "s")],
)
def test_the_size_follows_the_machine_and_the_images(here: Path, device: str, side: int, size: str) -> None:
    folder = Folder(here, {"a": 500, "b": 700}, side, is_grey=False)
    found = plan(folder, None, torch.device(device))
    assert found.size == size
    assert found.recipe.settings["tokenizer.image_size"] == SIZES[size].pixels
    assert plan(folder, "m", torch.device(device)).size == "m"


def test_updates_and_time_grow_with_the_images(here: Path) -> None:
    plans = [plan(Folder(here, {"a": n, "b": n}, 64, is_grey=False), None, CPU) for n in (100, 20_000, 500_000)]
    steps = [found.recipe.settings["train.total_steps"] for found in plans]
    assert steps == [400, 1125, 2000]
    times = [sum(found.seconds.values()) for found in plans]
    assert times == sorted(times)


def test_configs_are_written_where_the_commands_read_them(here: Path) -> None:
    recipe = fashion(quick=True)
    open_folder(recipe, [])
    for model in MODELS:
        written = to_dict(load(recipe.config(model)))
        assert written == to_dict(recipe.load(model))
        assert written["evaluate"]["reference"] == {"validation": "runs/demo_fashion_quick/images/val"}
    full = to_dict(fashion(quick=False).load("rear"))
    assert full["train"]["total_steps"] > written["train"]["total_steps"]
    assert {name for name, value in full["model"].items() if value != written["model"][name]} == set()


def test_a_dry_run_writes_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(here / "photos", {"a": 30, "b": 30})
    monkeypatch.setattr("sys.argv", ["demo.py", "--data", "photos", "--dry-run", "optim.lr=1e-4"])
    runpy.run_path(str(ROOT / "launchers/demo.py"))["main"]()
    out, err = capsys.readouterr()
    assert "deepspeed --num_gpus 2 launchers/train.py --config runs/demo_photos/rear.yaml" in out
    assert out.count("optim.lr=1e-4") == 7
    assert "as estimated for this machine" in err
    assert not (here / "runs").exists()
    for words in (["--quick"], ["--data", "fashion", "--size", "s"], ["--data", "photos", "--quick"]):
        monkeypatch.setattr("sys.argv", ["demo.py", *words])
        with pytest.raises(InputError, match="Leave it out"):
            runpy.run_path(str(ROOT / "launchers/demo.py"))["main"]()


def test_the_table_sets_models_beside_reconstructions_and_real_images() -> None:
    recipe = fashion(quick=True)
    names = scores_of(recipe)
    assert {"class_accuracy", "fd_efficientnet", "kd_efficientnet", "coverage", "ctr_noisy"} <= names.keys()
    summary = {"seeds": [0], "replace_rate": 0.1, "ar": dict.fromkeys(names, 0.5), "rear": dict.fromkeys(names, 0.25),
               "tokenizer": {"fd_efficientnet": 3.0, "psnr": 21.0}, "real": {"class_accuracy": 0.9}}  # fmt: skip
    header, rows = table(recipe, summary)
    assert header == ["", "vanilla AR (1 seed)", "reAR (1 seed)", "reconstructions", "real images"]
    by_title = {row[0]: row[1:] for row in rows}
    assert by_title["class accuracy of the samples"] == ["0.500", "0.250", "-", "0.900"]
    assert by_title["PSNR of the tokenizer's reconstructions, dB"] == ["-", "-", "21.00", "-"]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_folder_goes_from_images_to_a_report(tmp_path: Path) -> None:
    """Colour images of mixed sizes with broken files among them, at 48 pixels; the same command again runs nothing."""
    pictures(tmp_path / "photos", {"ant": 40, "bee": 30})
    (tmp_path / "photos/bee/broken.jpg").write_bytes(b"no image")
    command = ["python", "launchers/demo.py", "--data", "photos", "--size", "m", *SHORT]
    result = launch(*command, cwd=tmp_path, timeout=1500)
    assert result.returncode == 0, result.stderr
    place = tmp_path / "runs/demo_photos"
    summary = json.loads((place / "summary.json").read_text())
    assert summary["num_samples"] == 40
    for column in ("ar", "rear", "tokenizer", "real"):
        assert summary[column]["fd_efficientnet"] > 0
    report = (place / "report.html").read_text()
    assert "the same through the tokenizer" in report
    again = launch(*command, cwd=tmp_path, timeout=300)
    assert again.stderr.count("finished before") == 14
    assert json.loads((place / "summary.json").read_text()) == summary
