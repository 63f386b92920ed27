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
    assert found.interval.mean == pytest.approx((3.1 / 3 + 2 - 3.1 / 3) / 2, abs=0.05)


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
    assert len(known) >= 40
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
    record = [{"run": f"r{seed}", "seed": seed, "step": 9, "kind": "AR", **ABOUT} for seed in range(3)]
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
    monkeypatch.setattr(throughput, "_best_fid", lambda run: 2.0)
    rows, lines = throughput.own_rows([tmp_path / "runs"])
    assert [(row["method"], row["fid"], row["images_per_s"]) for row in rows] == [("rar_b", 2.0, 30.5)]
    assert throughput.figure([*throughput.published_rows(), *rows]).startswith(b"\x89PNG")
    assert len(throughput.published_rows()) == 11
