"""The frame of launchers/analyze.py, and the experiments, on tiny models."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from analyze_runs import rows_of, subject, write_runs
from helpers import launch, run_alone, write_token_shards

from rear_scale.analysis import command
from rear_scale.analysis.csv_tables import csv_text, over_seeds, read_csv
from rear_scale.analysis.groups import check_data, check_runs
from rear_scale.analysis.job import analyse
from rear_scale.analysis.kinds import title_of
from rear_scale.analysis.plots import panels
from rear_scale.analysis.table import EXPERIMENTS
from rear_scale.analysis.token_prediction import score_tokens
from rear_scale.analysis.token_sets import evenly, of_each_class, spread_over_classes
from rear_scale.config import InputError
from rear_scale.figures import png
from rear_scale.intervals import difference_interval, mean_interval, t_quantile
from rear_scale.objective.prediction import perplexity_of
from rear_scale.report.reading import RunFiles
from rear_scale.report.run_page import sections_of
from rear_scale.sample.job import load_generator
from rear_scale.world import World


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> dict[str, Path]:
    return write_runs(tmp_path_factory.mktemp("runs"), tokens)


def test_images_are_spread_evenly_over_classes() -> None:
    labels = np.array([2, 0, 1, 0, 0, 2, 0, 0])
    ids, short = of_each_class(labels, 2, 4)
    assert ids.tolist() == [0, 1, 2, 4, 5]  # the first and the third of five of class 0
    assert short == 2  # class 1 has one alone, class 3 none
    assert spread_over_classes(labels, 4).tolist() == [0, 1, 4, 7]  # sorted by class: 1 3 4 6 7 2 0 5
    assert spread_over_classes(labels, 9).tolist() == list(range(8))
    assert evenly(10, 3).tolist() == [0, 3, 6]


def test_intervals_are_those_of_student_and_welch() -> None:
    # Quantiles of printed tables.
    for freedom, expected in ((1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)):
        assert t_quantile(freedom) == pytest.approx(expected, abs=1e-4)
    interval = mean_interval([1.0, 2.0, 4.0])
    assert interval.mean == pytest.approx(7 / 3)
    assert interval.high - interval.mean == pytest.approx(4.30265 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-5)
    assert mean_interval([3.0]).low is None
    difference = difference_interval([1.0, 2.0, 4.0], [0.0, 1.0, 3.0])  # equal variances: four degrees of freedom
    assert difference.mean == pytest.approx(1)
    assert difference.high - 1 == pytest.approx(2.77645 * math.sqrt(2 * 7 / 9), rel=1e-5)


def test_the_summary_has_means_over_seeds_and_the_difference_of_two_models() -> None:
    rows = [
        {"model": model, "run": f"{model}{seed}", "seed": seed, "step": 1, "data": "unseen", "ctr": ctr + seed / 10}
        for model, ctr in (("reAR", 0.5), ("AR", 0.25))
        for seed in (0, 1)
    ]
    summary = {row["model"]: row for row in over_seeds(rows, ("data",))}
    assert {name: row["seeds"] for name, row in summary.items()} == {"reAR": 2, "AR": 2, "reAR - AR": 2}
    assert summary["reAR - AR"]["mean"] == pytest.approx(0.25)
    assert summary["reAR"]["low"] < 0.55 < summary["reAR"]["high"]
    assert all(row["measure"] == "ctr" and row["data"] == "unseen" for row in summary.values())


def test_a_csv_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [
        {"model": "AR", "ctr": 0.1 + 0.2, "images": 7, "low": None},
        {"model": "reAR", "ctr": math.inf, "images": 0, "low": 1.5},
    ]
    (tmp_path / "a.csv").write_text(csv_text(rows))
    assert read_csv(tmp_path / "a.csv") == rows


def test_perplexity_beyond_all_floats_is_infinite() -> None:
    assert perplexity_of(2.0) == math.exp(2.0)
    assert perplexity_of(1e6) == math.inf
    assert math.isnan(perplexity_of(math.nan))


def test_a_run_named_by_digits_keeps_its_name(tmp_path: Path) -> None:
    rows = [{"model": "AR", "run": "007", "seed": 7}, {"model": "1e5", "run": "", "seed": 8}]
    (tmp_path / "a.csv").write_text(csv_text(rows))
    assert read_csv(tmp_path / "a.csv") == rows


def test_the_kinds_of_models_name_them(runs: dict[str, Path]) -> None:
    rear, ar = (subject(runs[name]) for name in ("rear", "ar"))
    titles = [title_of(one.cfg) for one in (rear, ar)]
    assert titles == ["reAR", "AR"]
    same = command._named([rear], [rear])
    assert [one.model for one in same] == ["reAR (--checkpoint)", "reAR (--versus)"]


def test_checkpoints_of_one_option_are_seeds_of_one_model(runs: dict[str, Path], tmp_path: Path) -> None:
    rear, ar = (subject(runs[name]) for name in ("rear", "ar"))
    assert check_runs([[rear], [ar]]) == []
    assert check_runs([[rear], [rear]]) == []  # two models may be one
    with pytest.raises(InputError, match="--versus names .*count as independent seeds"):
        check_runs([[rear], [ar, subject(runs["ar"] / "checkpoints/step_00000002")]])
    (note,) = check_runs([[rear, ar]])
    assert "differs from" in note
    assert "objective." in note
    twin = tmp_path / "twin"
    shutil.copytree(runs["ar"], twin)
    (note,) = check_runs([[ar, subject(twin)]])
    assert "several runs have run.seed=1" in note
    checkpoint = subject(twin).checkpoint
    later = dataclasses.replace(ar, checkpoint=dataclasses.replace(checkpoint, meta={**checkpoint.meta, "step": 9}))
    notes = check_runs([[ar, later]])
    assert any("at step 9" in line for line in notes)


def test_seeds_of_one_model_are_measured_on_the_same_tokens(runs: dict[str, Path], tmp_path: Path) -> None:
    rear, ar = (subject(runs[name]) for name in ("rear", "ar"))
    copy = tmp_path / "copy"
    shutil.copytree(rear.cfg.data.val, copy)
    same = subject(runs["ar"], f"data.val={copy}")
    other = subject(runs["ar"], f"data.val={write_token_shards(tmp_path / 'other', 23, seed=6)}")
    assert check_data([[rear], [ar]]) == check_data([[rear, same]]) == []
    assert "measured on other tokens" in check_data([[rear], [other]])[0]
    with pytest.raises(InputError, match=r"--checkpoint: .*has data\.val=.*whose content is not that of"):
        check_data([[rear, other]])


def _generalization_and_evaluation(world: World, run: Path, out: Path) -> tuple[list[dict], dict]:
    one = subject(run)
    rows = rows_of(world, "generalization", run, out, "analyze.images_per_class=1000")[""]
    return rows, score_tokens(one.cfg, load_generator(one.cfg, one.checkpoint, world.device), world)


def test_generalization_is_what_evaluation_computes_where_it_takes_all_images(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    rows, scores = run_alone(_generalization_and_evaluation, runs["rear"], tmp_path)
    found = {(row["data"], row["context"]): row for row in rows}
    for key, place in {
        "val_clean": ("unseen", "clean"),
        "val_noisy": ("unseen", "noisy"),
        "train_clean": ("trained", "clean"),
    }.items():
        assert found[place]["ctr"] == pytest.approx(scores[key]["ctr"], rel=1e-12)
        assert found[place]["perplexity"] == pytest.approx(scores[key]["perplexity"], rel=1e-6)
        assert found[place]["images"] == scores[key]["sequences"]
        assert found[place]["short_classes"] == 5


def _killed(world: World, run: Path, out: Path) -> list[str]:
    """The blocks that are computed after a first attempt ended in its third block."""
    experiment = EXPERIMENTS["generalization"]
    computed: list[int] = []

    class Counted(experiment.work):
        def compute(self, number: int):
            if number == 2 and not computed.count(-1):
                computed.append(-1)
                raise KeyboardInterrupt
            computed.append(number)
            return super().compute(number)

    counted = dataclasses.replace(experiment, work=Counted)
    subjects = [subject(run, "analyze.images_per_class=3", "evaluate.batch_size=6", "evaluate.replace_draws=1")]
    with pytest.raises(KeyboardInterrupt):
        analyse(counted, subjects, world, out)
    again = analyse(counted, subjects, world, out)
    assert [path.name for path in out.iterdir()] == ["results"]
    before = len(computed)
    once_more = analyse(counted, subjects, world, out)
    assert len(computed) == before  # nothing is computed anew
    for name, values in again[0].arrays.items():
        assert np.array_equal(values, once_more[0].arrays[name])
    whole = analyse(experiment, subjects, world, out.with_name("whole"))
    for name, values in again[0].arrays.items():
        assert np.array_equal(values, whole[0].arrays[name])
    return computed


def test_a_job_that_was_killed_computes_only_the_missing_blocks(runs: dict[str, Path], tmp_path: Path) -> None:
    assert run_alone(_killed, runs["ar"], tmp_path / "out") == [0, 1, -1, 2, 3, 4, 5]


def _analyze(*words: str | Path, ranks: int = 1):
    program = ("python",) if ranks == 1 else ("torchrun", "--nproc-per-node", str(ranks))
    return launch(*program, "launchers/analyze.py", *words)


def test_the_launcher_writes_the_same_tables_on_one_and_two_ranks_and_continues(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    words = ["generalization", "--checkpoint", runs["rear"], "--versus", runs["ar"], "evaluate.batch_size=10",
             "evaluate.replace_draws=2", "analyze.images_per_class=5"]  # fmt: skip
    dry = _analyze(*words, "--dry-run", "data.val=nowhere")
    assert dry.returncode == 0, dry.stderr
    assert "not found: data.val=nowhere" in dry.stdout
    one, two = tmp_path / "one", tmp_path / "two"
    first = _analyze(*words, f"run.dir={one}")
    assert first.returncode == 0, first.stderr
    assert "reAR - AR" in first.stdout
    second = _analyze(*words, f"run.dir={two}", ranks=2)
    assert second.returncode == 0, second.stderr
    for name in ("generalization.csv", "generalization_summary.csv", "generalization.png"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    wrong = _analyze("generalisation", "--checkpoint", runs["rear"])
    assert wrong.returncode == 2
    assert "is not an experiment; did you mean generalization?" in wrong.stderr


def test_the_report_of_a_run_shows_its_figures(tmp_path: Path) -> None:
    folder = tmp_path / "analysis/cka"
    folder.mkdir(parents=True)
    figure, _ = panels(1)
    (folder / "cka.png").write_bytes(png(figure))
    (tmp_path / "analysis/errors").mkdir()  # without a figure yet
    (found,) = [section for section in sections_of(RunFiles(tmp_path), []) if section.title == "Analyses"]
    assert [(title, [picture.caption for picture in pictures]) for title, pictures in found.rows_of_pictures] == [
        ("cka", ["cka.png"])
    ]
