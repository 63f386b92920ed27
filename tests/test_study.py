"""Studies: grids become cells, cells become commands that continue after a kill, and results become one table."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
import yaml
from helpers import ROOT, launch, start, tiny_config_file, write_checkpoint, write_token_shards
from PIL import Image

from rear_scale.config import CONFIG_DIR, InputError, load, to_yaml
from rear_scale.evaluate.result import ClassifierScores, ImageScores, Result, SamplesRecord, SetScores
from rear_scale.locks import locked
from rear_scale.run.side_by_side import devices_of
from rear_scale.run.stages import Stage, StageFolder
from rear_scale.scaling import study, study_run, study_summary
from rear_scale.scaling.guidance import Point, Search, Space, around
from rear_scale.scaling.study_collect import collect
from rear_scale.scaling.study_figures import Curve, Gap, loss_at
from rear_scale.scaling.study_file import read_study
from rear_scale.scaling.study_grid import Cell, expand, identity, varied
from rear_scale.scaling.study_plan import dry_run
from rear_scale.scaling.study_run import Runner
from rear_scale.scaling.study_series import places
from rear_scale.scaling.study_summary import write_summary

NAMES = sorted(path.stem for path in (CONFIG_DIR / "study").glob("*.yaml"))
SCALES = [
    (name, scale)
    for name in NAMES
    for scale in yaml.safe_load((CONFIG_DIR / f"study/{name}.yaml").read_text()).get("scales", {})
]

# Stands before `launchers/NAME.py`: notes the command, makes what it would make, and fails or kills where the folder says so.
FAKE = """
import json, os, shutil, signal, sys
from pathlib import Path

here, words = Path(__file__).parent, sys.argv[1:]
values = dict(word.split("=", 1) for word in words if "=" in word)
name = Path(words[0]).stem
run = Path(values["run.dir"] if name == "train" else words[words.index("--checkpoint") + 1])
with open(here / "ran", "a") as file:
    file.write(f"{name} {run.name}\\n")
if (here / f"fail-{run.name}").exists():
    sys.exit(2)
if (here / f"kill-{run.name}").exists():
    (here / f"kill-{run.name}").unlink()
    os.kill(os.getppid(), signal.SIGKILL)
def write_distance(out, scale, power):
    scores = json.loads((here / "result.json").read_text())
    scores["images"]["samples"]["frechet_distance"]["validation"] = (scale - 5) ** 2 + (power - 1.5) ** 2
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(scores))


if "--sweep" in words:
    scales, powers = (words[at + 1].partition("=")[2].split(",") for at, word in enumerate(words) if word == "--sweep")
    for scale in scales:
        for power in powers:
            write_distance(run / f"result_guidance.scale={scale}_guidance.power={power}.json", float(scale), float(power))
elif "sample.guidance.power" in values:
    scale, power = (float(values[f"sample.guidance.{key}"]) for key in ("scale", "power"))
    write_distance(Path(words[words.index("--out") + 1]), scale, power)
elif name == "train":
    (run / "checkpoints/latest").mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({"state": "done", "step": 12, "reason": ""}))
    lines = [{"step": step, "images_seen": 12 * step, "loss_ar": 3 / step, "step_time_s": 0.1, "images_per_s": 120.0,
              "images_per_s_per_gpu": 120.0} for step in (4, 8, 12)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    (run / "starts.jsonl").write_text(json.dumps({"commit": "abc", "world_size": 1, "device": "cpu", "host": "here"}) + "\\n")
else:
    out = Path(words[words.index("--out") + 1]) if "--out" in words else run / "result.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(here / ("unguided.json" if "sample.guidance.scale=1.0" in words else "result.json"), out)
"""


def write_result(path: Path, perplexity: float, distance: float, scale: float) -> None:
    """A result of validation tokens and a classifier's distance, of samples with a scale of guidance."""
    scores = SetScores(
        10, {"class_accuracy": 0.9}, {"frechet_distance": {"validation": distance, "training": distance / 2}}
    )
    tokens = {
        "val_clean": {"ctr": 0.4, "perplexity": perplexity},
        "val_noisy": {"ctr": 0.3, "perplexity": 2 * perplexity},
    }
    result = Result(
        images=ImageScores(classifier=ClassifierScores("a layer", scores, {})),
        tokens=tokens,
        checkpoint=None,
        samples=SamplesRecord("generated", "", 10, [16, 16], "", "truncate"),
        sample={"guidance": {"schedule": "constant", "scale": scale, "power": 1.0}},
        dtype="fp32",
        evaluate={"reference": {"validation": "a", "training": "b"}},
        config=None,
        seconds=1.0,
        provenance={},
    )
    path.write_text(json.dumps(result.to_json()))


def study_file(folder: Path, tokens: Path, **fields: Any) -> Path:
    """A study of the tiny config, whose commands the fake program stands for."""
    base = tiny_config_file(folder, tokens)
    (folder / "fake.py").write_text(FAKE)
    write_result(folder / "result.json", 5.0, 20.0, scale=2.0)
    write_result(folder / "unguided.json", 5.0, 30.0, scale=1.0)
    values = {
        "title": "a study",
        "base": str(base),
        "start": f"python {folder / 'fake.py'}",
        "overrides": ["strategy=single"],
        "grids": {"main": ["objective=ar,rear", "run.seed=range(2)"]},
        "commands": ["train", "evaluate"],
        **fields,
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runner_of(path: Path, *more: str, scale: str | None = None) -> Runner:
    found = read_study(str(path), scale)
    return Runner(found, expand(found, more), tuple(found.start.split()))


def names(cells: list[Cell]) -> list[str]:
    return [cell.name for cell in cells]


def ran(folder: Path) -> list[str]:
    """The commands since the last call."""
    log = folder / "ran"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_grids_become_cells_in_hydras_sweep_syntax(here: Path, tokens: Path) -> None:
    choices = {
        "size": {"small": ["model.width=32"], "large": ["model.width=64", "model.depth=3"]},
        "row": {"a": [], "b": {"config": "demo.yaml", "overrides": ["strategy=single"]}, "c": None},
    }
    grids = {
        "main": ["objective=ar,rear", "size=glob(*)", "run.seed=range(2)"],
        "length": ["objective=rear", "size=small", "run.seed=0", "train.total_steps=choice(6,12)"],
        "rows": ["row=glob(*)"],
    }
    path = study_file(here, tokens, choices=choices, grids=grids)
    cells = expand(read_study(str(path)))
    by_name = {cell.name: cell for cell in cells}
    assert names(cells) == [
        *(
            f"{objective}-{size}-seed{seed}"
            for objective in ("ar", "rear")
            for size in ("small", "large")
            for seed in (0, 1)
        ),
        "rear-small-seed0-total_steps6",
        "b",
    ]  # 12 steps and row a are cells of the main grid
    assert by_name["rear-small-seed0"].grids == ("main", "length", "rows")
    large = by_name["rear-large-seed1"]
    assert (large.cfg.model.width, large.cfg.model.depth, large.cfg.run.seed) == (64, 3, 1)
    assert large.overrides == ("strategy=single", "objective=rear", "model.width=64", "model.depth=3", "run.seed=1")
    assert by_name["ar-small-seed0"].cfg.objective.heads.encode_tap is None
    assert by_name["b"].cfg.model.depth == 4
    columns = varied(cells)
    assert columns["train.total_steps"][8:] == [6, 600]
    assert [*columns][:3] == ["objective", "size", "row"]
    # The user's words replace those of a grid, and are added to the others.
    more = expand(read_study(str(path)), ["run.seed=5", "optim.lr=1e-3,2e-3"])
    assert {cell.cfg.run.seed for cell in more} == {5}
    assert len({identity(cell.cfg) for cell in more}) == len(more) == 2 * (4 + 1 + 1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"grids": {"main": ["run.seed=interval(0,1)"]}}, "Write the values out: run.seed=A,B,C"),
        ({"grids": {"main": ["run.seed"]}}, "is not a word of a grid"),
        ({"grids": {"main": ["run.seed=0,1", "run.seed=2"]}}, "has run.seed twice"),
        ({"grids": {"main": ["model.depht=1,2"]}}, r"model.depht.*did you mean model.depth"),
        ({"grids": {"main": ["size=big"]}, "choices": {"size": {"small": []}}}, "size=big is not one of small"),
        ({"grids": {"main": ["run.seed=glob(*)"]}}, r"glob\(\) is for choices and groups"),
        ({"grids": {}}, "has no cells"),
        ({"grid": {}}, "grid is not a field of a study; did you mean grids?"),
        ({"commands": ["trian"]}, "trian, which is not one of .*did you mean train?"),
        ({"overrides": "a=b"}, "overrides is not a list of texts"),
        ({"base": "{size}.yaml"}, "needs the word size="),
        ({"jobs": 0}, "jobs=0 must be at least 1"),
        ({"jobs": "two"}, "jobs is not a whole number"),
        ({"jobs": 2, "commands": ["throughput"]}, "would slow each other down while they are timed"),
        ({"machine": {"name": "x"}}, "machine has the fields name, not name, gflops_per_s"),
    ],
)
def test_a_study_that_cannot_be_read_is_one_line(
    here: Path, tokens: Path, fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError, match=expected) as error:
        expand(read_study(str(study_file(here, tokens, **fields))))
    assert "\n" not in str(error.value)


def test_a_scale_stands_in_the_place_of_the_full_study(here: Path, tokens: Path) -> None:
    scales = {"tiny": {"grids": {"main": ["size=a"]}, "choices": {"size": {"a": ["run.seed=3"]}}, "overrides": []}}
    path = study_file(here, tokens, scales=scales, overrides=["strategy=ddp"], choices={"size": {"b": []}})
    found = read_study(str(path), "tiny")
    assert (found.name, found.folder) == ("mine", Path("runs/study/mine_tiny"))
    (cell,) = expand(found)
    assert cell.overrides == ("run.seed=3",)
    with pytest.raises(InputError, match="--scale tinny is not a scale of .*; did you mean tiny?"):
        read_study(str(path), "tinny")


def test_a_study_of_64_cells_is_planned_in_seconds(here: Path, tokens: Path) -> None:
    """The limit is 20 seconds of a quiet machine; process time, because other tests run beside this one."""
    grids = {"main": ["objective=ar,rear", "model.depth=1,2,3,4", "train.total_steps=6,12", "run.seed=range(4)"]}
    runner = runner_of(study_file(here, tokens, grids=grids))
    started = time.process_time()
    text = dry_run(runner.study, runner.cells, [cell.name == "ar-depth1-total_steps6-seed0" for cell in runner.cells])
    assert time.process_time() - started < 10
    assert len(runner.cells) == 64
    lines = text.splitlines()
    assert "64 cells, each: train, evaluate" in lines[1]
    assert lines[4].endswith("done")
    assert sum(line.endswith("done") for line in lines) == 1
    images = 32 * 12 * 6 + 32 * 12 * 12
    assert f"training in all: {images:,} images" in text
    assert "law of parameters, images, different images (repeated_data): condition number" in text


def test_a_grid_that_tells_no_law_apart_is_warned_of(here: Path, tokens: Path) -> None:
    runner = runner_of(study_file(here, tokens, grids={"main": ["model.depth=1,2"]}))
    assert "warning: this grid does not tell the constants of the law apart" in dry_run(
        runner.study, runner.cells, [False] * 2
    )


def test_a_grid_of_sizes_is_judged_by_the_law_of_sizes(here: Path, tokens: Path) -> None:
    """Which is fitted to it, as to the runs of rear_scaling.yaml at the scale of a CPU."""
    runner = runner_of(study_file(here, tokens, grids={"main": ["model.width=16,32,64,128"]}))
    text = dry_run(runner.study, runner.cells, [False] * 4)
    number = re.search(r"law of parameters \(power\): condition number ([\d.]+)$", text, re.MULTILINE)
    assert number is not None
    assert float(number[1]) < 1000
    assert "warning" not in text


def test_the_time_is_that_of_the_job_which_ends_last(here: Path, tokens: Path) -> None:
    machine = {
        "name": "a machine",
        "gflops_per_s": 1.0,
        "step_s": 1.0,
        "start_s": 24.0,
        "evaluate_s": 60.0,
        "evaluate_s_per_gflop": 0.0,
    }
    # Each cell: 24 s of start and 12 updates with hardly any FLOPs; of three cells in two jobs, one job has two.
    path = study_file(here, tokens, machine=machine, commands=["train"], grids={"main": ["run.seed=range(3)"]})
    runner = runner_of(path)
    for jobs, seconds in ((1, 108), (2, 72), (3, 36)):
        text = dry_run(runner.study, runner.cells, [False] * 3, jobs)
        assert f"a machine: {seconds / 60:.0f} minutes for the 3 cells that are left, {jobs} at a time" in text


def test_finished_cells_are_not_run_again_and_a_failed_one_stops_no_other(here: Path, tokens: Path) -> None:
    path = study_file(here, tokens)
    (here / "fail-ar-seed1").touch()
    runner = runner_of(path)
    cells = ["ar-seed0", "ar-seed1", "rear-seed0", "rear-seed1"]
    failed = runner.run()
    assert [*failed] == ["ar-seed1"]
    assert "'train ar-seed1' failed with exit code 2" in failed["ar-seed1"]
    assert ran(here) == [
        f"{command} {name}"
        for name in cells
        for command in ("train", "evaluate")
        if (command, name) != ("evaluate", "ar-seed1")
    ]
    states = {row["cell"]: row["state"] for row in collect(runner).rows}
    assert states["ar-seed1"].startswith("failed: ")
    assert [states[name] for name in cells if name != "ar-seed1"] == ["done"] * 3
    (here / "fail-ar-seed1").unlink()
    assert runner.run() == {}
    assert ran(here) == ["train ar-seed1", "evaluate ar-seed1"]
    assert runner.run() == {}
    assert ran(here) == []
    # The words in front of a command are not a part of what was done.
    assert Runner(runner.study, runner.cells, ("torchrun",)).run() == {}
    assert ran(here) == []
    # A result that is lost is made again, and nothing else.
    (runner.run_folder(runner.cells[0]) / "result.json").unlink()
    assert runner.run() == {}
    assert ran(here) == ["evaluate ar-seed0"]


@pytest.mark.long  # two starts; the test before shows the same in one process
def test_a_killed_study_continues_with_the_same_command(here: Path, tokens: Path) -> None:
    """As a process of its own, whose third cell kills it; and a failing cell gives exit code 1."""
    words = ("python", ROOT / "launchers/study.py", "--config", study_file(here, tokens))
    (here / "kill-rear-seed0").touch()
    with start(*words, cwd=here, stderr=subprocess.PIPE, text=True) as process:
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert ran(here) == [
        "train ar-seed0",
        "evaluate ar-seed0",
        "train ar-seed1",
        "evaluate ar-seed1",
        "train rear-seed0",
    ]
    (here / "fail-rear-seed1").touch()
    shutil.rmtree(here / "runs/study/mine/rear-seed0", ignore_errors=True)  # the fake does not resume
    with start(*words, cwd=here, stderr=subprocess.PIPE, text=True) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert ran(here) == ["train rear-seed0", "evaluate rear-seed0", "train rear-seed1"]
    assert "failed: rear-seed1: the stage 'train rear-seed1' failed with exit code 2" in err
    assert "[1/4] train ar-seed0: finished before" in err
    with open(here / "runs/study/mine/study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"].partition(":")[0] for row in rows] == ["done", "done", "done", "failed"]


def test_rows_have_what_the_runs_have(here: Path, tokens: Path) -> None:
    path = study_file(here, tokens, commands=["train", "evaluate", "unguided"])
    runner = runner_of(path)
    assert runner.run() == {}
    collected = collect(runner)
    rows = list(csv.DictReader(collected.text().splitlines()))
    assert [*rows[0]] == [
        "cell", "objective", "run.seed", "parameters", "images", "unique_images", "flops", "gpu_hours",
        "loss", "loss_noisy", "ctr", "ctr_noisy", "perplexity", "perplexity_noisy", "fid", "fid_guided",
        "class_accuracy_guided", "classifier_frechet_distance_guided", "classifier_frechet_distance_guided/training",
        "class_accuracy", "classifier_frechet_distance", "classifier_frechet_distance/training",
        "commit", "config_sha256", "run", "state",
    ]  # fmt: skip
    row = rows[3]
    assert (row["cell"], row["objective"], row["run.seed"], row["state"]) == ("rear-seed1", "rear", "1", "done")
    assert float(row["loss"]) == pytest.approx(math.log(5))
    assert float(row["loss_noisy"]) == pytest.approx(math.log(10))
    assert (row["classifier_frechet_distance"], row["classifier_frechet_distance_guided"], row["fid"]) == (
        "30.0",
        "20.0",
        "",
    )
    assert (row["images"], row["unique_images"], row["gpu_hours"]) == ("144", "100", "")
    assert row["config_sha256"] == identity(runner.cells[3].cfg)


def test_runs_of_others_are_found_by_their_config(here: Path, tokens: Path) -> None:
    runner = runner_of(study_file(here, tokens))
    other = here / "elsewhere/deep/rear_of_somebody"
    other.mkdir(parents=True)
    # Another name, place and micro-batch, and a copy of the data; the same training.
    copy = shutil.copytree(tokens, here / "copy")
    given = [
        *runner.cells[2].overrides,
        "run.name=x",
        f"run.dir={other}",
        f"data.train={copy}",
        "train.micro_batch_size=3",
    ]
    (other / "config.yaml").write_text(to_yaml(load(runner.cells[2].config, given)))
    (other / "starts.jsonl").write_text(json.dumps({"commit": "abc"}) + "\n")
    (other / "status.json").write_text(json.dumps({"state": "done", "step": 12, "reason": ""}))
    write_result(other / "result.json", 4.0, 10.0, scale=1.0)
    rows = {row["cell"]: row for row in collect(runner, [here / "elsewhere"]).rows}
    assert (rows["rear-seed0"]["run"], rows["rear-seed0"]["commit"]) == (
        "elsewhere/deep/rear_of_somebody" and str(other),
        "abc",
    )
    assert (rows["rear-seed0"]["state"], rows["rear-seed0"]["perplexity"]) == ("done", 4.0)
    assert [rows[name]["state"] for name in ("ar-seed0", "ar-seed1", "rear-seed1")] == ["missing"] * 3
    # Another learning rate, or other data, is another run.
    for text in ("optim.lr=1e-4", f"data.train={write_token_shards(here / 'others', 50)}"):
        (other / "config.yaml").write_text(to_yaml(load(runner.cells[2].config, [*given, text])))
        assert {row["state"] for row in collect(runner, [here / "elsewhere"]).rows} == {"missing"}
    with pytest.raises(InputError, match="--runs nowhere is not a folder"):
        collect(runner, [Path("nowhere")])


def test_cells_that_differ_in_sampling_alone_are_trained_once(here: Path, tokens: Path) -> None:
    runner = runner_of(study_file(here, tokens, grids={"main": ["sample.guidance.scale=1.5,2.5"]}))
    # A task of a job array that needs the weights of another one's cell makes them, if nobody has.
    assert replace(runner, only="scale2.5").run() == {}
    assert ran(here) == ["train scale1.5", "evaluate scale1.5"]
    assert runner.run() == {}
    assert ran(here) == ["evaluate scale1.5"]
    line = runner.stages_of(runner.cells[1])[0].line
    assert line.endswith("--out runs/study/mine/scale2.5/result.json sample.guidance.scale=2.5")
    assert [row["state"] for row in collect(runner).rows] == ["done", "done"]


def test_the_summary_has_gaps_laws_and_figures(here: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs whose losses follow a known law, with a gap of 0.1 between AR and reAR in each seed."""
    monkeypatch.setattr(study_summary, "_DRAWS", 5)
    words = ["objective=ar,rear", "model.depth=1,2,3,4,5", "run.seed=range(2)"]
    runner = runner_of(study_file(here, tokens, grids={"main": words}))
    collected = collect(runner)
    for row in collected.rows:
        loss = 1 + 50 / math.sqrt(row["parameters"]) + 0.1 * (row["objective"] == "ar") + 0.001 * row["run.seed"]
        row |= {"state": "done", "loss": loss, "images": 144, "unique_images": 100, "flops": 1e6 * row["parameters"]}
        row |= {"class_accuracy": 1 / loss, "commit": "abc"}
        run = Path(row["run"])
        run.mkdir(parents=True)
        lines = [{"step": step, "images_seen": 12 * step, "loss_ar": loss + 1 / step} for step in range(1, 13)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "starts.jsonl").write_text(json.dumps({"world_size": 2, "device": "a CPU", "host": "here"}) + "\n")
    text = write_summary(runner, collected, "python launchers/study.py --config mine.yaml").read_text()
    assert "- command: `python launchers/study.py --config mine.yaml`" in text
    assert "- commit: abc\n- ranks and machine: 2 x a CPU (here)" in text
    gaps = re.findall(r"^\| loss \| (\d) \| [\d,]+ \| 2 \| 0\.1 \| 0\.1 to 0\.1 \|$", text, re.MULTILINE)
    assert gaps == list("12345")
    laws = re.findall(
        r"^\| (ar|rear) \| loss \| E = ([\d.]+), A = ([\d.]+), a = ([\d.]+) \|.*: 2 of 2 inside \|$", text, re.MULTILINE
    )
    assert [objective for objective, *_ in laws] == ["ar", "rear"]
    assert [float(value) for value in laws[1][1:]] == pytest.approx([1, 50, 0.5], rel=0.1)
    for name in ("loss_curves", "scores_by_size", "gap", "isoflop"):
        assert f"({name}.png)" in text
        assert Image.open(here / f"runs/study/mine/{name}.png").size[0] > 500


@pytest.mark.parametrize("lengths", [(), pytest.param((6, 24), marks=pytest.mark.long)])
def test_gaps_and_laws_compare_like_with_like(
    here: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    """A study that also varies a field of the objective at one size, and the length: none of them counts as the method itself."""
    monkeypatch.setattr(study_summary, "_DRAWS", 3)
    sizes = "model.width=16,32,64"
    grids = {
        "gap": ["objective=ar,rear", sizes, "run.seed=0"],
        "seeds": ["objective=ar,rear", sizes, "run.seed=1"],
        "weight": ["objective=rear", "model.width=16", "run.seed=0", "objective.heads.weight=0.5,0.25"],
        **{f"length{one}": ["objective=ar,rear", sizes, "run.seed=0", f"train.total_steps={one}"] for one in lengths},
    }
    runner = runner_of(study_file(here, tokens, grids=grids))
    collected = collect(runner)
    for row in collected.rows:
        images = 12 * row.get("train.total_steps", 12)
        gain = 0.0 if row["objective"] == "ar" else 0.1 - (1 - row["objective.heads.weight"])
        loss = 2 + 50 / math.sqrt(row["parameters"]) + 2 / math.sqrt(images) - gain
        row |= {"state": "done", "loss": loss, "images": images, "unique_images": images, "flops": 1e6}
    found = places(runner.study, collected)
    gaps = study_summary._gaps(found)["loss"]
    # Of each size and length one, and two variants of the smallest size against the same AR run.
    assert len(gaps) == 3 + 2 + 3 * len(lengths)
    by_series: dict[str, list[tuple[int, float]]] = {}
    for gap in gaps:
        by_series.setdefault(gap.series, []).append((len(gap.differences), round(gap.mean, 6)))
    assert by_series == {
        "": [(2, 0.1)] * 3,
        "heads.weight=0.5": [(1, -0.4)],
        "heads.weight=0.25": [(1, -0.65)],
        **{f"train.total_steps={one}": [(1, 0.1)] * 3 for one in lengths},
    }
    (text,) = study_summary._law_sections(found)
    # Variants have no part in the law of reAR. The greatest length has a single seed, too few cells for a law of three sizes.
    laws = re.findall(r"^\| (\S+.*?) \| loss \| E = [\d.]+, A = ([\d.]+), a = ([\d.]+) \|", text, re.MULTILINE)
    assert [name for name, *_ in laws] == ([] if lengths else ["ar", "rear"])
    for _, *values in laws:
        assert [float(value) for value in values] == pytest.approx([50, 0.5], rel=0.1)
    of_data = re.findall(r"^\| (ar|rear) \| loss \| three_term \| .*b = ([\d.]+) \|", text, re.MULTILINE)
    assert [name for name, _ in of_data] == (["ar", "rear"] if lengths else [])
    assert [float(value) for _, value in of_data] == pytest.approx([0.5] * len(of_data), rel=0.2)


def test_cells_side_by_side_end_as_one_after_another(
    here: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two at a time: one cell fails, the process of another is killed, and the same command runs what is left."""
    runner = replace(runner_of(study_file(here, tokens)), jobs=2)
    assert {stage.processes for stage in runner.stages_of(runner.cells[0])} == {2}
    (here / "fail-ar-seed1").touch()
    (here / "kill-rear-seed0").touch()
    failed = runner.run()
    assert [*failed] == ["ar-seed1", "rear-seed0"]
    assert "'train ar-seed1' failed with exit code 2" in failed["ar-seed1"]
    assert failed["rear-seed0"] == "a job that runs cells was ended by SIGKILL"
    commands = ran(here)
    assert sorted(commands) == sorted(
        [
            "train ar-seed0",
            "evaluate ar-seed0",
            "train ar-seed1",
            "train rear-seed0",
            "train rear-seed1",
            "evaluate rear-seed1",
        ]
    )
    (here / "fail-ar-seed1").unlink()
    shutil.rmtree(here / "runs/study/mine/rear-seed0", ignore_errors=True)  # the fake does not resume
    assert runner.run() == {}
    assert {*ran(here)} == {
        f"{command} {name}" for command in ("train", "evaluate") for name in ("ar-seed1", "rear-seed0")
    }
    assert [row["state"] for row in collect(runner).rows] == ["done"] * 4
    # Another number of cells at a time runs nothing again.
    assert replace(runner, jobs=3).run() == {}
    assert ran(here) == []


def test_gpus_are_divided_among_the_cells_that_run_at_a_time() -> None:
    assert [devices_of(job, 2, 8, None) for job in range(2)] == ["0,1,2,3", "4,5,6,7"]
    assert [devices_of(job, 3, 4, "4,5,6,7") for job in range(3)] == ["4", "5", "6,7"]
    assert [devices_of(job, 3, 2, "GPU-a,GPU-b") for job in range(3)] == ["GPU-a", "GPU-b", "GPU-a"]


def test_a_study_interrupted_side_by_side_says_what_is_left(
    here: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: StageFolder, stage: Stage, place: str = "") -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StageFolder, "run", interrupted)
    with pytest.raises(KeyboardInterrupt, match="4 of 4 cells are left; the same command continues"):
        replace(runner_of(study_file(here, tokens)), jobs=2).run()


def test_a_cell_of_another_process_is_left_to_it(here: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file system has no locks, whose message names the process."""
    runner = runner_of(study_file(here, tokens))

    def held(path: Path, refusal: str | None = None) -> object:
        if refusal is not None and "ar-seed0" in path.name and "rear" not in path.name:
            raise InputError(f"{refusal}. .ar-seed0.lock.holder is held by process 7 on elsewhere")
        return locked(path, refusal)

    monkeypatch.setattr(study_run, "locked", held)
    assert runner.run() == {}
    assert ran(here)[0] == "train ar-seed1"


def test_a_task_that_trains_for_another_keeps_no_cell_from_its_scores(
    here: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two tasks of a job array with the same weights, the second is first; meanwhile the first one starts."""
    runner = runner_of(study_file(here, tokens, grids={"main": ["sample.guidance.scale=1.5,2.5"]}))
    run, others = StageFolder.run, []

    def run_while_the_other_starts(self: StageFolder, stage: Stage, place: str = "") -> None:
        if stage.name == "scale1.5.train" and not others:
            others.append(threading.Thread(target=replace(runner, only="scale1.5").run))
            others[0].start()
            time.sleep(0.3)
        run(self, stage, place)

    monkeypatch.setattr(StageFolder, "run", run_while_the_other_starts)
    assert replace(runner, only="scale2.5").run() == {}
    others[0].join(60)
    assert {*ran(here)} == {"train scale1.5", "evaluate scale1.5"}  # the fake names the run of the weights
    assert [runner.is_done(cell) for cell in runner.cells] == [True, True]


def test_cells_that_differ_in_training_are_trained_apart(here: Path, tokens: Path) -> None:
    """Also in fields that a resumed run may change."""
    runner = runner_of(
        study_file(here, tokens, grids={"main": ["train.stop_at_step=4,8", "train.micro_batch_size=6,12"]})
    )
    assert [runner.trained_by(cell) is cell for cell in runner.cells] == [True] * 4


def test_names_of_cells_are_folders_of_their_own(here: Path, tokens: Path) -> None:
    values = ("logs", "..", "study.csv", "a" * 300, "\u00fc/b", "x b")
    choices = {"row": {value: [f"run.seed={number}"] for number, value in enumerate(values)}}
    path = study_file(here, tokens, choices=choices, grids={"main": ["row=glob(*)"]})
    found = names(expand(read_study(str(path))))
    assert len({*found}) == len(values)
    assert (found[0], found[1], found[2], found[4], found[5]) == ("logs-cell", "cell", "study.csv-cell", "b", "x_b")
    assert all(len(f".{name}.evaluate.json.part") < 255 and "/" not in name and name.strip(".") for name in found)


def test_scores_of_other_settings_are_no_scores_of_a_cell(
    here: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a change of the study the old results lie in the same folders; other people's runs may be shorter or scored in
    another way."""
    path = study_file(here, tokens, grids={"main": ["objective=rear"]})
    runner = runner_of(path)
    assert runner.run() == {}
    (row,) = collect(runner).rows
    assert (row["state"], row["perplexity"]) == ("done", 5.0)
    changed = runner_of(
        study_file(here, tokens, grids={"main": ["objective=rear"]}, overrides=["strategy=single", "optim.lr=1e-4"])
    )
    assert runner.run_folder(runner.cells[0]) == changed.run_folder(changed.cells[0])
    (row,) = collect(changed).rows
    assert (row["state"], row["loss"], row["perplexity"]) == ("started", None, None)
    assert "classifier_frechet_distance_guided" not in row
    other = here / "elsewhere/somebody"
    other.mkdir(parents=True)
    given = [*changed.cells[0].overrides, f"run.dir={other}"]
    (other / "config.yaml").write_text(to_yaml(load(changed.cells[0].config, given)))
    (other / "starts.jsonl").write_text(json.dumps({"commit": "abc"}) + "\n")
    write_result(other / "result.json", 4.0, 10.0, scale=8.0)
    for step, expected in ((4, "started"), (12, "done")):
        (other / "status.json").write_text(json.dumps({"state": "done", "step": step, "reason": ""}))
        (row,) = collect(changed, [here / "elsewhere"]).rows
        assert row["state"] == expected, step
    assert "classifier_frechet_distance_guided" not in row
    assert "made with sample.guidance={'schedule': 'constant', 'scale': 8.0" in capsys.readouterr().err
    write_result(other / "result.json", 4.0, 10.0, scale=1.0)
    (row,) = collect(changed, [here / "elsewhere"]).rows
    assert (row["perplexity"], row["classifier_frechet_distance"]) == (4.0, 10.0)


def test_the_number_of_processes_that_made_the_data_is_no_part_of_them(here: Path, tokens: Path) -> None:
    """A login node has no GPU, so that the same study would start its preparation there with another number of processes."""
    keys = set()
    for number in (1, 2):
        made = {
            "name": "x",
            "command": f"torchrun --nproc-per-node {number} launchers/pretokenize.py --config x.yaml",
            "makes": "x",
        }
        runner = runner_of(study_file(here, tokens, data="data", prepare=[made]))
        (stage,) = runner.preparation()
        assert stage.line == made["command"]
        keys.add(stage.key)
    assert len(keys) == 1


def test_a_study_is_gathered_before_it_has_begun(here: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study.main(["--config", str(study_file(here, tokens)), "--collect"])
    assert "0 of 4 cells are done" in "".join(capsys.readouterr())
    assert "- ar-seed0: missing" in (here / "runs/study/mine/study.md").read_text()


def test_values_that_are_no_numbers_are_no_scores(here: Path, tokens: Path) -> None:
    runner = runner_of(study_file(here, tokens, grids={"main": ["objective=rear"]}))
    assert runner.run() == {}
    path = runner.run_folder(runner.cells[0]) / "result.json"
    values = json.loads(path.read_text())
    values["tokens"]["val_clean"]["perplexity"] = None
    path.write_text(json.dumps(values))
    (row,) = collect(runner).rows
    assert (row["perplexity"], row["loss"], row["perplexity_noisy"]) == (None, None, 10.0)
    write_summary(runner, collect(runner), "x")


def test_a_profile_reads_the_curves_at_equal_compute() -> None:
    curve = Curve("a", 10, 2.0, [10, 100, 1000], [3.0, 2.0, 1.0])
    assert loss_at(curve, 2 * math.sqrt(10 * 100)) == pytest.approx(2.5)
    assert loss_at(curve, 19) is loss_at(curve, 2001) is None
    assert loss_at(curve, 20) == 3.0
    assert Gap("", 1, 1.0, [1.0]).half_width is None
    # Student's t of two degrees of freedom: 2.920 x 1 / sqrt(3)
    assert Gap("", 1, 1.0, [1.0, 2.0, 3.0]).half_width == pytest.approx(1.6859, abs=1e-4)


def test_a_search_for_guidance_refines_around_its_best_and_confirms_it(
    here: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {
        "scale": [2, 4, 8],
        "power": [1, 2],
        "images": 10,
        "rounds": 2,
        "confirm": 20,
        "score": "classifier_frechet_distance",
    }
    path = str(study_file(here, tokens, guidance=space))
    run = here / "somebody"
    study.main(["--config", path, "--checkpoint", str(run)])
    out = capsys.readouterr().out
    assert "sample.guidance.schedule=power_cosine sample.guidance.scale=5 sample.guidance.power=1.5" in out
    assert "classifier_frechet_distance on 20 samples: 0.0000" in out
    assert ran(here) == ["evaluate somebody"] * 4
    with open(run / "guidance/guidance.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["scale"], row["power"]) for row in rows[:6]} == {(s, p) for s in "248" for p in "12"}
    assert (rows[-1]["scale"], rows[-1]["power"], rows[-1]["images"], float(rows[-1]["score"])) == (
        "5",
        "1.5",
        "20",
        0.0,
    )
    study.main(["--config", path, "--checkpoint", str(run)])
    assert ran(here) == []
    # A run that was trained further is searched again.
    write_checkpoint(run, 3)
    study.main(["--config", path, "--checkpoint", str(run)])
    assert ran(here) == ["evaluate somebody"] * 4
    assert around(4.0, [4.0, 8.0]) == [2.0, 4.0, 6.0]
    assert around(8.0, [4.0, 8.0]) == [6.0, 8.0, 10.0]
    refused: tuple[tuple[dict[str, Any], list[str], str], ...] = (
        ({"guidance": space}, [], "Name it: --checkpoint RUN"),
        ({"guidance": {**space, "scale": [0]}}, ["--checkpoint", "x"], "guidance.scale="),
        ({"guidance": {**space, "score": "inception_score"}}, ["--checkpoint", "x"], "is better where it is larger"),
        (
            {"guidance": {**space, "images": 0}},
            ["--checkpoint", "x"],
            "guidance.images and guidance.confirm must be at least 1",
        ),
        ({"guidance": {"scale": [1]}}, ["--checkpoint", "x"], "guidance needs scale"),
        ({}, ["--checkpoint", "x"], "does not have. Leave it out"),
    )
    for fields, words, expected in refused:
        with pytest.raises(InputError, match=expected):
            study.main(["--config", str(study_file(here, tokens, **fields)), *words])


def test_scores_that_are_no_numbers_are_never_the_best(tmp_path: Path) -> None:
    space = Space.read({"scale": [1], "power": [1], "images": 1, "rounds": 0, "confirm": 1, "score": "fid"}, "a study")
    points = [Point(1.0, 1.0, 1, math.nan), Point(2.0, 1.0, 1, 7.0), Point(3.0, 1.0, 1, 9.0)]
    assert Search(space, tmp_path, tmp_path, (), points=points)._best().scale == 2.0
    with pytest.raises(InputError, match="fid is not finite with any guidance"):
        Search(space, tmp_path, tmp_path, (), points=points[:1])._best()


def test_unfinished_cells_are_submitted_as_one_job_array(
    here: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = study_file(here, tokens, grids={"main": ["run.seed=range(3)"]})
    program = here / "bin/sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {here}/submitted\necho Submitted batch job 7\n')
    program.chmod(0o755)
    words = ["--config", str(path), "run.seed=range(3)"]
    monkeypatch.setenv("PATH", str(here / "nowhere"))
    with pytest.raises(InputError, match="needs the program sbatch.*type: sbatch --array=0-2"):
        study.main([*words, "--slurm"])
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    study.main([*words, "--slurm", "--nodes", "2"])
    runner = runner_of(path)
    # A task of the array runs one cell, started in its own way, and a later submission has the others alone.
    study.main([*words, "--cell", "1", "--start", f"python {here / 'fake.py'}"])
    assert ran(here) == ["train seed1", "evaluate seed1"]
    study.main([*words, "--slurm"])
    assert runner.run() == {}
    with pytest.raises(InputError, match="all 3 cells are done"):
        study.main([*words, "--slurm"])
    end = f"launchers/slurm/study.sbatch --config {path} run.seed=range(3)"
    assert (here / "submitted").read_text().splitlines() == [
        f"--array=0-2 --nodes 2 {end}",
        f"--array=0,2 --nodes 1 {end}",
    ]


@pytest.mark.long
def test_two_real_cells_go_on_after_a_kill_and_end_as_undisturbed_ones(here: Path, tokens: Path) -> None:
    """The launchers themselves, on the tiny set: killed in the middle of the second cell's training."""
    fields: dict[str, Any] = {
        "start": "python",
        "commands": ["train"],
        "overrides": ["strategy=single", f"data.val={tokens}", "train.val_every=4", "train.total_steps=40"],
        "grids": {"main": ["objective=ar,rear"]},
    }
    rows = {}
    for name in ("undisturbed", "killed"):
        folder = here / name
        folder.mkdir()
        words = ("python", ROOT / "launchers/study.py", "--config", study_file(folder, tokens, **fields))
        if name == "killed":
            with start(*words, cwd=folder, fresh=True, stderr=subprocess.DEVNULL) as process:
                log, deadline = folder / "runs/study/mine/rear/metrics.jsonl", time.monotonic() + 200
                while not (log.exists() and len(log.read_text().splitlines()) >= 6):
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                process.kill()
        with start(*words, cwd=folder, fresh=True, stderr=subprocess.PIPE, text=True) as process:
            _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        with open(folder / "runs/study/mine/study.csv", newline="") as file:
            rows[name] = list(csv.DictReader(file))
        assert "Gap between AR and reAR" in (folder / "runs/study/mine/study.md").read_text()
        assert (folder / "runs/study/mine/loss_curves.png").is_file()
    assert [row["state"] for row in rows["killed"]] == ["done", "done"]
    assert all(float(row["loss"]) > 0 for row in rows["killed"])
    assert rows["killed"] == rows["undisturbed"]


@pytest.mark.long
@pytest.mark.skipif(slurm_cluster.missing() is not None, reason=str(slurm_cluster.missing()))
def test_a_job_array_gives_the_values_of_one_process(here: Path, tokens: Path) -> None:
    """The launchers themselves: as an array of jobs on a cluster of two nodes, and in this machine's own way."""
    fields: dict[str, Any] = {
        "start": "python",
        "commands": ["train"],
        "overrides": ["strategy=single", f"data.val={tokens}", "train.val_every=4"],
        "grids": {"main": ["objective=ar,rear", "run.seed=range(2)"]},
    }
    rows = {}
    for name in ("alone", "array"):
        folder = here / name
        folder.mkdir()
        words = ("launchers/study.py", "--config", str(study_file(folder, tokens, **fields)))
        for link in ("launchers", ".venv"):
            (folder / link).symlink_to(ROOT / link)
        if name == "alone":
            done = launch("python", *words, cwd=folder, timeout=300)
            assert done.returncode == 0, done.stderr
        else:
            with slurm_cluster.Cluster() as cluster:
                settings = {"SLURM_CONF": str(cluster.conf), "REAR_PROJECT": str(folder), "REAR_TASKS_PER_NODE": "1"}
                done = launch("python", *words, "--slurm", cwd=folder, timeout=120, **settings)
                assert done.returncode == 0, done.stderr
                deadline = time.monotonic() + 400
                while cluster.run("squeue", "-h"):
                    assert time.monotonic() < deadline, cluster.run("scontrol", "show", "job")
                    time.sleep(1)
            done = launch("python", *words, "--collect", cwd=folder, timeout=120)
            assert done.returncode == 0, done.stderr
        with open(folder / "runs/study/mine/study.csv", newline="") as file:
            rows[name] = list(csv.DictReader(file))
    logs = "".join(path.read_text() for path in (here / "array").glob("**/*.out"))
    assert [row["state"] for row in rows["array"]] == ["done"] * 4, logs
    assert rows["array"] == rows["alone"]
    assert len({row["loss"] for row in rows["array"]}) == 4


@pytest.mark.long
def test_rows_of_the_tables_are_those_of_the_papers(here: Path) -> None:
    """At the full scale, each row trains what its config in configs/ablation/ says."""
    for name, prefix in (
        ("table3", "rear_table3"),
        ("table4", "rear_table4"),
        ("table5", "rear_table5"),
        ("rar_table3", "rar_table3"),
    ):
        cells = expand(read_study(f"study/{name}.yaml"))
        own = {cell.words["row"]: cell for cell in cells}
        files = {path.stem.removeprefix(f"{prefix}_") for path in (CONFIG_DIR / "ablation").glob(f"{prefix}_*.yaml")}
        assert files == {row for row in own if not row.endswith("_noise")}
        for row in files:
            given = [text for text in own[row].overrides if not text.startswith("run.seed")]
            assert identity(own[row].cfg) == identity(load(f"ablation/{prefix}_{row}.yaml", given))
    assert len(expand(read_study("study/rar_table2.yaml"))) == 15
    shared = expand(read_study("study/table1.yaml"))
    runner = Runner(read_study("study/table1.yaml"), shared, ("python",))
    by_row = {cell.words["row"]: cell for cell in shared}
    assert runner.trained_by(by_row["rear_l_is"]) is by_row["rear_l"]


@pytest.mark.long  # some 300 configs; tests/test_study.py reads a few of them in other tests
@pytest.mark.parametrize(("name", "scale"), [*((name, None) for name in NAMES), *SCALES])
def test_every_study_of_the_project_expands(name: str, scale: str | None) -> None:
    found = read_study(f"study/{name}.yaml", scale)
    if found.guidance is None:
        cells = expand(found)
        assert len({*names(cells)}) == len(cells)
        assert all(cell.config and (CONFIG_DIR / cell.config).is_file() for cell in cells)


def test_bad_command_lines_are_refused(here: Path, tokens: Path) -> None:
    path = str(study_file(here, tokens))
    for words, expected in (
        ([], "--config is missing"),
        (["--config", path, "--cell", "9"], "--cell 9 is not a cell of .* Use 0 to 3"),
        (["--config", path, "--slurm", "--nodes", "0"], "--nodes=0 must be at least 1"),
        (["--config", path, "--jobs", "0"], "--jobs=0 must be at least 1"),
        (["--config", path, "--jobs", "2", "--slurm"], "Leave it out with --slurm and --cell"),
        (["--config", "study/nothing.yaml"], "no such file"),
    ):
        with pytest.raises(InputError, match=expected):
            study.main(words)
