"""The demo on photographs of clothes and on a folder of one's own."""

from __future__ import annotations

import dataclasses
import json
import random
import runpy
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, launch
from PIL import Image
from test_demo import kill_when, start_demo

from rear_scale.config import InputError, derive, load, to_dict
from rear_scale.demo import estimate, summary
from rear_scale.demo.commands import check, open_folder, planned
from rear_scale.demo.own import SIZES, Folder, describe, look_at, recipe_of
from rear_scale.demo.recipe import MODELS, Recipe, fashion
from rear_scale.demo.summary import scores_of, table
from rear_scale.evaluate.result import ImageScores, NetworkScores

CPU = torch.device("cpu")
RATES = estimate.Rates(read=0.001, tokenizer=0.002, generator=0.01, classifier=0.0005, features=0.03)
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
    monkeypatch.setattr(estimate, "measure", lambda *_: RATES)
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
        ({f"{name}": 2 for name in range(40)}, r"10 images: 0 \(2\), 1 \(2\), 10 \(2\), .* and 35 more\. Add"),
        (
            {"Train": 60, "val": 12},
            r"holds Train, val, which are parts of a data set and no classes\. Use --data .*/Train,",
        ),
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
    with pytest.raises(InputError, match=r"none of 16 images .* can be read"):
        look_at(tmp_path)


def test_a_folder_is_described_and_planned(here: Path) -> None:
    pictures(here / "my photos", {"ant": 40, "bee": 25}, "L")
    (here / "my photos/ant/broken.png").write_bytes(b"no image")
    folder = look_at(here / "my photos")
    assert (folder.counts, folder.side, folder.is_grey) == ({"ant": 41, "bee": 25}, 40, True)
    recipe = recipe_of(folder, None, CPU)
    assert recipe.folder == Path("runs/demo_my_photos")
    cfg = recipe.load("rear", ["train.total_steps=53"])
    text = "\n".join(describe(folder, cfg, derive(cfg, 2, None)))
    assert "66 grey images of 2 classes, 25 to 41 each" in text
    assert "13 of them for validation" in text
    assert "32 x 32 pixels (centre crops), 64 tokens, models of 4 blocks of width 128" in text
    assert "each model sees 3,392 images, every training image 64 times" in text
    for model in MODELS:
        cfg = recipe.load(model)
        assert (cfg.model.num_classes, cfg.tokenizer.num_tokens, cfg.data.assumed_images) == (2, 64, 53)
        assert cfg.sample.num_images % 2 == 0
        assert cfg.evaluate.efficientnet_weights == "package"
        assert (cfg.objective.heads.encode_tap is None) == (model == "ar")
    commands = [stage.line for stage in planned(recipe, [0], []).stages]
    assert f"--images '{here / 'my photos'}'" in commands[0]
    assert len(commands) == len({*commands}) == 14
    # Where few images cannot be read, most of them may be in a small part.
    assert ["--max-bad-fraction 0.5" in command for command in commands[:3]] == [False, True, True]
    assert all("--exif apply" in command for command in commands[:3])


@pytest.mark.parametrize(
    ("device", "side", "size"),
    [("cpu", 200, "s"), ("cuda", 200, "l"), ("cuda", 50, "m"), ("cuda", 30, "s")],
)
def test_the_size_follows_the_machine_and_the_images(here: Path, device: str, side: int, size: str) -> None:
    folder = Folder(here, {"a": 500, "b": 700}, side, is_grey=False)
    found = recipe_of(folder, None, torch.device(device))
    assert found.settings["tokenizer.image_size"] == SIZES[size].pixels
    assert recipe_of(folder, "m", torch.device(device)).settings["model.width"] == SIZES["m"].width


def seconds(recipe: Recipe, overrides: Sequence[str] = (), seeds: int = 1, rates: estimate.Rates = RATES) -> float:
    cfg = recipe.load("rear", overrides)
    counts = estimate.Counts(cfg.data.assumed_images, recipe.val_images, recipe.passes)
    return sum(estimate.seconds(cfg, 2, rates, counts, seeds, jobs=2).values())


def test_updates_and_time_grow_with_the_images(here: Path) -> None:
    recipes = [recipe_of(Folder(here, {"a": n, "b": n}, 64, is_grey=False), None, CPU) for n in (100, 20_000, 500_000)]
    assert [found.settings["train.total_steps"] for found in recipes] == [400, 1125, 2000]
    assert [found.settings["evaluate.replace_draws"] for found in recipes] == [16, 2, 2]
    times = [seconds(found) for found in recipes]
    assert times == sorted(times)
    assert seconds(recipes[0], ["train.total_steps=800"]) - times[0] == pytest.approx(400 * 64 * 0.01 * 1.9 * 1.15 / 2)
    assert seconds(recipes[0], seeds=3) > 2 * times[0]
    busy = dataclasses.replace(RATES, load=3.0)
    assert seconds(recipes[0], rates=busy) - times[0] == pytest.approx(2 * (4 * 3 + 4 * 6 + 12 + 2 * 6))


def test_work_of_every_kind_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_TRAINED": 8, "_LOOKED_AT": 2, "_TOKENS": 512, "_TURNS": 1, "_COMPUTED": 0.01}.items():
        monkeypatch.setattr(estimate, name, value)
    cfg = fashion(quick=True).load("rear")
    before = torch.get_rng_state()
    rates = estimate.measure(cfg, 2, CPU, 0.001)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(0 < rate < 10 for rate in (rates.classifier, rates.tokenizer, rates.generator, rates.features))
    assert rates.load >= 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("evaluate.classifier=null", r"the demo needs evaluate\.classifier\."),
        ("~evaluate.reference.validation", r"evaluate\.reference\.validation"),
        ("evaluate.efficientnet_weights=null", r"evaluate\.efficientnet_weights"),
        ("evaluate.precision_recall_arithmetic=[adm_fp16]", "with exact"),
    ],
)
def test_overrides_that_take_scores_of_the_table_away_are_refused(override: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        check(fashion(quick=True), [override])


def test_other_images_of_the_same_number_are_another_demo(here: Path) -> None:
    pictures(here / "photos", {"a": 30, "b": 30})
    open_folder(recipe_of(look_at(here / "photos"), None, CPU), [])
    open_folder(recipe_of(look_at(here / "photos"), None, CPU), [])
    assert not (here / "runs/demo_photos.old1").exists()
    (here / "photos/a/1.jpg").write_bytes((here / "photos/b/1.jpg").read_bytes() + b" ")
    open_folder(recipe_of(look_at(here / "photos"), None, CPU), [])
    assert (here / "runs/demo_photos.old1/stages/fingerprint").exists()


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
    assert "deepspeed --num_gpus 1 launchers/train.py --config runs/demo_photos/rear.yaml" in out
    assert out.count("optim.lr=1e-4") == 7
    assert "in all, as estimated from the speed of this machine now" in err
    assert "all files go to runs/demo_photos" in err
    assert not (here / "runs").exists()
    for words in (["--quick"], ["--data", "fashion", "--size", "s"], ["--data", "photos", "--quick"]):
        monkeypatch.setattr("sys.argv", ["demo.py", *words])
        with pytest.raises(InputError, match="Leave it out"):
            runpy.run_path(str(ROOT / "launchers/demo.py"))["main"]()


def test_the_script_finds_a_folder_from_where_it_is_started(tmp_path: Path) -> None:
    (tmp_path / "root/launchers").mkdir(parents=True)
    (tmp_path / "root/.venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "launchers/demo.sh", tmp_path / "root/launchers")
    (tmp_path / "root/launchers/setup.sh").touch()
    python = tmp_path / "root/.venv/bin/python"
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    for name in ("my photos", "fashion"):
        (tmp_path / "here" / name).mkdir(parents=True)

    def typed(*words: str) -> list[str]:
        command = ["bash", "../root/launchers/demo.sh", *words]
        return subprocess.run(
            command, cwd=tmp_path / "here", capture_output=True, text=True, check=True
        ).stdout.splitlines()

    assert typed() == ["launchers/demo.py"]
    assert typed("--data", "my photos", "a=b c")[1:] == ["--data", str(tmp_path / "here/my photos"), "a=b c"]
    assert typed("--data", "fashion", "--quick")[1:] == ["--data", "fashion", "--quick"]
    assert typed("--data", "missing")[1:] == ["--data", "missing"]


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


def test_a_score_that_too_few_images_do_not_have_is_left_empty() -> None:
    values = {
        **dict.fromkeys(("precision", "recall", "density", "coverage", "kd_efficientnet")),
        "fd_efficientnet": 2.0,
    }
    scores = ImageScores(networks={"efficientnet": NetworkScores("", True, 3, {}, {"validation": values})})
    found = summary._network_scores(scores, "validation")
    assert (found["fd_efficientnet"], found["precision"], found["kd_efficientnet"]) == (2.0, None, None)
    assert summary._over_seeds([1.0, None]) is None
    assert summary._cell(None, 2) == "-"


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


TINY = [
    "train.total_steps=4",
    "checkpoint.every_steps=2",
    "sample.num_images=20",
    "evaluate.classifier.steps=20",
    "evaluate.replace_draws=2",
    "tokenizer.training.steps=110",  # its progress is saved after 100
    "tokenizer.training.continuous_steps=20",
]


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_kill_in_and_after_every_stage_changes_nothing(tmp_path: Path) -> None:
    """Each stage is killed once at a random moment and once when it has just ended; all figures and samples equal those of an
    unbroken demo."""
    for name in ("unbroken", "killed"):
        pictures(tmp_path / name / "photos", {"ant": 32, "bee": 30})
    arguments = ["--data", "photos", *TINY]
    whole, broken = (tmp_path / name / "runs/demo_photos" for name in ("unbroken", "killed"))

    def to_the_end(folder: Path) -> None:
        process = start_demo(folder, *arguments, fresh=True)
        _, err = process.communicate(timeout=1500)
        assert process.returncode == 0, err

    to_the_end(tmp_path / "unbroken")
    recipe = recipe_of(look_at(tmp_path / "unbroken/photos"), None, CPU)
    chance, inside = random.Random(0), 0
    for stage in planned(recipe, [0], TINY).stages:
        log, record = (broken / name for name in (f"logs/{stage.name}.log", f"stages/{stage.name}.json"))
        seconds = json.loads((whole / f"stages/{stage.name}.json").read_text())["seconds"]
        kill_when(start_demo(tmp_path / "killed", *arguments, fresh=True), log, delay=chance.uniform(0, 0.9 * seconds))
        inside += not record.exists()
        kill_when(start_demo(tmp_path / "killed", *arguments, fresh=True), record, delay=0)
    assert inside >= 7, "a kill that comes too late hits the next stage"
    to_the_end(tmp_path / "killed")
    assert json.loads((broken / "summary.json").read_text()) == json.loads((whole / "summary.json").read_text())
    for model in MODELS:
        first, second = (np.load(folder / f"{model}_seed0/samples.npz") for folder in (whole, broken))
        assert np.array_equal(first["arr_0"], second["arr_0"])
    for name in ("reconstruction.json", "held_in.json"):
        first, second = (json.loads((folder / name).read_text())["images"] for folder in (whole, broken))
        assert first == second
