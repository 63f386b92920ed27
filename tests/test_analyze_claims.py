"""The ledger of claims, and the throughput plot, on tables written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import launch

from rear_scale.analysis import claims, throughput
from rear_scale.analysis.claims import FAILS, HOLDS, NOT_RUN, RESULTS, UNCLEAR, Claim, judge, read_claims
from rear_scale.analysis.csv_tables import csv_text
from rear_scale.analysis.table import EXPERIMENTS
from rear_scale.config import InputError

ABOUT = {"data_set": "tokens", "scale": "4 x 128, 600 steps", "size": 65536}


def claim(**changes: Any) -> Claim:
    values = {"name": "a", "paper": "rear", "where": "Table 1", "says": "so", "source": "exposure", "measure": ("psnr",),
              "plus": ({"protocol": "perfect"},), "minus": ({"protocol": "imperfect"},), "direction": "above",
              "command": "x"}  # fmt: skip
    return Claim(**{**values, **changes})


def rows(perfect: list[float], imperfect: list[float], model: str = "AR", **more: Any) -> list[dict[str, Any]]:
    """Rows of seeds 0, 1 ... of one model, of both protocols."""
    return [
        {"model": model, "run": f"{model}{seed}", "seed": seed, "protocol": protocol, "psnr": value, **ABOUT, **more}
        for protocol, values in (("perfect", perfect), ("imperfect", imperfect))
        for seed, value in enumerate(values)
    ]


def test_a_claim_holds_where_its_interval_over_seeds_lies_on_its_side() -> None:
    clear, unclear = rows([20.0, 21.0, 22.0], [19.0, 20.1, 20.9]), rows([20.0, 21.0, 22.0], [21.0, 20.0, 22.5])
    (found,) = judge(claim(), clear)  # each seed with itself, although seeds differ by more
    assert (found.verdict, found.interval.seeds) == (HOLDS, 3)
    assert found.interval.mean == pytest.approx(1)
    assert judge(claim(direction="below"), clear)[0].verdict == FAILS
    assert judge(claim(), unclear)[0].verdict == UNCLEAR
    assert judge(claim(), rows([20.0], [10.0]))[0].verdict == UNCLEAR  # one seed has no interval
    assert judge(claim(), [])[0].verdict == NOT_RUN
    assert judge(claim(), [row for row in clear if row["protocol"] == "perfect"])[0].verdict == NOT_RUN


def test_models_are_compared_over_their_seeds_and_within_one_scale() -> None:
    compared = claim(plus=({"model": "reAR"},), minus=({"model": "AR"},), direction="below", measure=("fid", "psnr"))
    both = rows([1.0, 1.1], [1.0, 1.1], "reAR") + rows([2.0, 2.1], [2.0, 2.1], "AR")
    (found,) = judge(compared, both)
    assert (found.verdict, found.measure) == (HOLDS, "psnr")  # no row has fid
    other = {"scale": "24 x 768, 250,000 steps", "size": 14_155_776}
    larger = rows([9.0, 9.1], [9.0, 9.1], "reAR", **other)
    assert judge(compared, both + larger)[0].scale == ABOUT["scale"]  # the larger one has no partner
    apart = judge(compared, both + rows([1.0], [1.0], "reAR", data_set="others"))
    assert [one.data for one in apart] == ["tokens"]


def test_a_difference_of_differences_is_taken_over_the_seeds_of_each_model() -> None:
    """The gap between protocols is 3 for reAR and 1 for AR."""
    four = claim(
        plus=({"model": "reAR", "protocol": "perfect"}, {"model": "AR", "protocol": "imperfect"}),
        minus=({"model": "reAR", "protocol": "imperfect"}, {"model": "AR", "protocol": "perfect"}),
    )
    table = rows([23.0, 24.1, 25.0], [20.0, 21.0, 22.0], "reAR") + rows([11.0, 12.0, 13.1], [10.0, 11.0, 12.0], "AR")
    (found,) = judge(four, table)
    assert (found.verdict, found.interval.seeds) == (HOLDS, 3)
    # The gap of reAR less that of AR, and not a half of it.
    assert found.interval.mean == pytest.approx((23.0 + 24.1 + 25.0) / 3 - 21 - ((11.0 + 12.0 + 13.1) / 3 - 11))
    within = claim(
        plus=({"protocol": "perfect", "ratio": 0.2}, {"protocol": "imperfect", "ratio": 0.8}),
        minus=({"protocol": "imperfect", "ratio": 0.2}, {"protocol": "perfect", "ratio": 0.8}),
    )
    of_one_model = rows([9.0, 9.1], [5.0, 5.0], ratio=0.2) + rows([8.0, 8.0], [7.0, 7.0], ratio=0.8)
    assert judge(within, of_one_model)[0].interval.mean == pytest.approx(4.05 - 1)
    # A half that is missing leaves nothing to judge.
    without = [row for row in of_one_model if (row["protocol"], row["ratio"]) != ("imperfect", 0.8)]
    assert judge(within, without)[0].verdict == NOT_RUN


def test_runs_of_other_recipes_are_no_seeds_of_a_model() -> None:
    compared = claim(plus=({"model": "reAR"},), minus=({"model": "AR"},), direction="below", measure=("psnr",))
    ar = rows([2.0, 2.1], [], "AR", recipe="c")
    own, ablation = rows([1.0, 1.1], [], "reAR", recipe="a"), rows([9.0], [], "reAR", recipe="b")
    for one in ablation:
        one["run"] = "with_other_noise"
    (found,) = judge(compared, ar + own + ablation)
    assert (found.verdict, found.interval.seeds, found.left_out) == (HOLDS, 2, ["with_other_noise"])
    assert claims.csv_rows([found])[0]["left_out"] == "with_other_noise"
    # A selection that names several values of a field of the config means several recipes.
    weights = claim(plus=({"objective.heads.weight": [0.5, 1.5]},), minus=({"model": "AR"},), direction="below")
    both = [{**row, "objective.heads.weight": weight} for row, weight in zip(own, (0.5, 1.5), strict=True)]
    both[1]["recipe"] = "b"
    (found,) = judge(weights, ar + both)
    assert (found.interval.seeds, found.left_out) == (2, [])


def test_sizes_are_compared_at_one_length_and_lengths_at_one_size() -> None:
    def of(scale: str, size: int, steps: int, values: list[float]) -> list[dict[str, Any]]:
        return rows(values, [], "reAR", scale=scale, size=size, steps=steps)

    table = [
        *of("4 x 128, 600 steps", 65536, 600, [5.0, 5.1]),
        *of("4 x 128, 1,200 steps", 65536, 1200, [4.0, 4.1]),
        *of("8 x 128, 1,200 steps", 131072, 1200, [4.5, 4.6]),
    ]
    sizes = claim(plus=({"size": "max"},), minus=({"size": "min"},), direction="below", match="length")
    (found,) = judge(sizes, table)  # 4.5 against 4.0, and not against the mean of 5.0 and 4.0
    assert (found.verdict, found.interval.mean) == (FAILS, pytest.approx(0.5))
    lengths = claim(plus=({"steps": "max"},), minus=({"steps": "min"},), direction="below", match="size")
    (found,) = judge(lengths, table)
    assert (found.verdict, found.interval.mean) == (HOLDS, pytest.approx(-1.0))
    other = [
        {**row, "model.conditioning": "in_context"} for row in of("16 x 128, 1,200 steps", 262144, 1200, [1.0, 1.1])
    ]
    assert judge(sizes, table + other)[0].interval.mean == pytest.approx(0.5)


def analysed(folder: Path, run: str, step: int, psnr: float, images: int = 10) -> None:
    folder.mkdir(parents=True)
    row = {"model": "AR", "run": run, "seed": 0, "step": step, "protocol": "perfect", "psnr": psnr}
    (folder / "exposure.csv").write_text(csv_text([row]))
    record = [{"model": "AR", "run": run, "seed": 0, "step": step, "kind": "AR", **ABOUT, "recipe": "a"}]
    (folder / "exposure.json").write_text(json.dumps({"checkpoints": record, "analyze": {"images": images}}))


def test_of_several_analyses_of_a_run_one_counts(tmp_path: Path) -> None:
    analysed(tmp_path / "a", "007", 300, 1.0)
    analysed(tmp_path / "b", "007", 600, 2.0, images=100)
    analysed(tmp_path / "c", "007", 600, 3.0)  # a quick look of later
    analysed(tmp_path / "d", "1e5", 600, 4.0)
    (tmp_path / "e").mkdir()
    (tmp_path / "e/exposure.json").write_text('{"checkpoints": [3], "analyze": 4}')  # of another program
    found = claims.find_tables([tmp_path, tmp_path / "a"])["exposure"]
    assert [(row["run"], row["step"], row["psnr"]) for row in found] == [("007", 600, 2.0), ("1e5", 600, 4.0)]


def test_the_speed_of_a_run_stands_beside_its_scores(tmp_path: Path) -> None:
    assert claims._speed(tmp_path) == {}
    (tmp_path / "bench.json").write_text(json.dumps({"mode": "sample", "images_per_s": 8.5}))
    assert claims._speed(tmp_path) == {"images_per_s": 8.5}


def test_equality_bounds_and_numbers_without_a_partner() -> None:
    near = claim(minus=(), at=20.0, direction="equal", within=0.5)
    assert judge(near, rows([20.0, 20.1, 20.05], []))[0].verdict == HOLDS
    assert judge(near, rows([22.0, 22.1, 22.05], []))[0].verdict == FAILS
    assert judge(near, rows([18.0, 22.0, 20.0], []))[0].verdict == UNCLEAR


def test_selections_take_bounds_lists_and_extremes() -> None:
    table = [{"ratio": ratio, "model": "AR"} for ratio in (0.0, 0.5, 1.0)]

    def chosen(selection: dict[str, Any]) -> list[float]:
        return [row["ratio"] for row in table if claims._matches(row, selection, table)]

    assert chosen({"ratio": {"above": 0}}) == [0.5, 1.0]
    assert chosen({"ratio": [0, 1]}) == [0.0, 1.0]
    assert chosen({"ratio": "max", "model": "AR"}) == [1.0]
    assert chosen({"ratio": "min", "model": "reAR"}) == []
    assert [row for row in table[:1] if claims._matches(row, {"ratio": "max"}, table[:1])] == []


def test_every_claim_of_the_file_can_be_read_and_names_columns_that_exist(tmp_path: Path) -> None:
    known = read_claims()
    assert len(known) >= 70
    assert {one.paper for one in known} == {"rear", "rar"}
    assert {one.source.partition("_")[0] for one in known} <= {RESULTS, *EXPERIMENTS}
    assert all(one.direction == "equal" or one.within == 0 for one in known)
    (tmp_path / "wrong.yaml").write_text(
        "claims: {a: {paper: rear, where: x, says: y, from: cka, plus: {}, claim: above}}"
    )
    with pytest.raises(InputError, match=r"claims.a lacks or has an unknown 'measure'"):
        read_claims(tmp_path / "wrong.yaml")


def test_the_launcher_fills_the_ledger_from_tables_that_are_there(tmp_path: Path) -> None:
    run = tmp_path / "runs/rear_0/analysis/exposure"
    run.mkdir(parents=True)
    table = [
        {"model": "AR", "run": f"r{seed}", "seed": seed, "step": 9, "protocol": protocol, "ratio": 0.2,
         "psnr_decoded": 20.0 + seed + (protocol == "perfect") + 0.01 * seed * (protocol == "perfect")}
        for seed in range(3) for protocol in ("perfect", "imperfect")
    ]  # fmt: skip
    (run / "exposure.csv").write_text(csv_text(table))
    record = [{"model": "AR", "run": f"r{seed}", "seed": seed, "step": 9, "kind": "AR", **ABOUT} for seed in range(3)]
    (run / "exposure.json").write_text(json.dumps({"checkpoints": record}))
    out = tmp_path / "out"
    found = launch("python", "launchers/analyze.py", "claims", tmp_path / "runs", f"run.dir={out}")
    assert found.returncode == 0, found.stderr
    assert "exposure_psnr" in found.stdout
    text = (out / "claims.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| exposure_psnr |"))
    assert "| holds |" in line
    assert text.count("| not run |") >= 35
    assert "exposure_psnr" in (out / "claims.html").read_text()
    assert "exposure_psnr" in (out / "claims.csv").read_text()


def test_own_points_stand_beside_the_published_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs/rar_b"
    run.mkdir(parents=True)
    (run / "bench.json").write_text(
        json.dumps({"mode": "sample", "images_per_s": 30.5, "device": "H200", "command": "x"})
    )
    rows, lines = throughput.own_rows([tmp_path / "runs"])
    assert rows == []
    assert lines == [f"{run} has a speed and no FID: launchers/evaluate.py --checkpoint {run} with Inception's weights"]
    monkeypatch.setattr(throughput, "_best_fid", lambda run: (2.0, 1000))
    rows, lines = throughput.own_rows([tmp_path / "runs", run])
    assert lines == [f"{run}: its FID is of 1,000 images, published ones are of 50,000"]
    assert [(row["method"], row["fid"], row["images_per_s"]) for row in rows] == [("rar_b", 2.0, 30.5)]
    assert throughput.figure([*throughput.published_rows(), *rows]).startswith(b"\x89PNG")
    assert len(throughput.published_rows()) == 11
