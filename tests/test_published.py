"""The papers' tables in configs/published.yaml, and their rendering beside results of studies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rear_scale.config import CONFIG_DIR, InputError
from rear_scale.evaluate import published_tables
from rear_scale.evaluate.published import ROWS
from rear_scale.evaluate.published_tables import differences, printed, published_table
from rear_scale.scaling import table as page
from rear_scale.scaling.table import as_html, as_markdown, bpp_16, read_results

TABLES = published_tables.published_tables()
PLACES = [f"{key}/{name}" for key, table in TABLES.items() for name in table.rows]
WITH_CONFIG = [place for place in PLACES if printed(place).config is not None]
_HEAD = re.compile(r"FID ([\d.]+\d)(?:, IS ([\d.]+\d))?(?:, precision ([\d.]+\d), recall ([\d.]+\d))?")


def test_all_rows_of_all_tables_are_there() -> None:
    counts = {key: len(table.rows) for key, table in TABLES.items()}
    assert counts == {
        "rear_table1": 31, "rear_table2": 8, "rear_table3": 10, "rear_table4": 7, "rear_table5": 5,
        "rar_table2": 15, "rar_table3": 6, "rar_table4": 37, "rar_table5": 11,
    }  # fmt: skip
    for table in TABLES.values():
        assert table.baseline is None or table.baseline in table.rows
        assert len({row.label for row in table.rows.values()}) == len(table.rows)
        for row in table.rows.values():
            assert row.fid is not None
            assert row.same_as is None or printed(row.same_as).label


@pytest.mark.parametrize("place", [place for place in WITH_CONFIG if "ablation" in str(printed(place).config)])
def test_the_head_of_a_config_cites_the_same_numbers(place: str) -> None:
    row = printed(place)
    text = " ".join((CONFIG_DIR / str(row.config)).read_text().split("defaults:")[0].replace("#", "").split())
    cited = _HEAD.search(text)
    assert cited is not None, text
    numbers = [float(number) for number in cited.groups() if number is not None]
    assert numbers == [value for name, value in row.measures().items() if name != "images_per_s"]


def test_every_config_that_a_row_names_is_there() -> None:
    assert not [place for place in WITH_CONFIG if not (CONFIG_DIR / str(printed(place).config)).is_file()]


def test_where_the_papers_disagree_both_numbers_stand() -> None:
    theirs = {place: differences(printed(place)) for place in PLACES}
    assert {place: found for place, found in theirs.items() if found} == {
        "rear_table1/mar_l": ["FID 1.78 (RAR, Yu et al. 2024, Table 4)", "IS 296.0 (RAR, Yu et al. 2024, Table 4)"]
    }
    text = as_markdown(TABLES["rear_table1"], [])
    assert re.search(r"\| MAR-L \[\d+\] \|.* 1\.98 \| 290\.3 \|", text)
    assert "FID 1.78 (RAR, Yu et al. 2024, Table 4)" in text


def test_scored_models_have_the_numbers_of_the_tables() -> None:
    row = ROWS["rear_l"]
    assert (row.model, row.fid, row.inception_score) == ("reAR-L (cfg 10.0)", 1.86, 316.9)
    assert row.source == "reAR, He et al., Table 1"
    assert ROWS["rar_xxl"].recall == 0.63


def test_bits_per_pixel_of_our_tokenizers_are_the_printed_ones() -> None:
    for place in WITH_CONFIG:
        row = printed(place)
        if row.bpp_16 is not None:
            assert f"{bpp_16(str(row.config)):.3f}" == f"{row.bpp_16:.3f}", place
    # That of the TiTok of 64 tokens is printed beside a masked generator.
    assert f"{bpp_16('rear_titok_b64.yaml'):.3f}" == f"{printed('rear_table1/mask_titok_64').bpp_16:.3f}"


@pytest.mark.parametrize("key", TABLES)
def test_a_table_is_rendered_with_nothing_run(key: str) -> None:
    text, html = as_markdown(TABLES[key], []), as_html(TABLES[key], [])
    for row in TABLES[key].rows.values():
        assert row.label in text
        assert f"{row.fid:.2f}" in text
    trained = sum(row.config is not None for row in TABLES[key].rows.values())
    assert text.count("not run") == trained
    assert html.count("<tr>") == len(TABLES[key].rows) + 1
    assert "<script" not in html


_HEADER = "cell,row,run.seed,parameters,images,loss,ctr,frechet_distance,commit,run,state"


def _study(folder: Path, *lines: str) -> Path:
    path = folder / "runs/study/table4_digits/study.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([_HEADER, *lines]) + "\n")
    return path


def test_differences_inside_the_noise_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _study(
        tmp_path,
        *(f"a{seed},eps_0,{seed},300000,38400,1.9,0.4{seed},{18 + seed}.0,abc,runs/a{seed},done" for seed in range(3)),
        *(
            f"b{seed},rear_table4_linear,{seed},300000,38400,1.9,0.6{seed},{17 + seed}.5,abc,runs/b{seed},done"
            for seed in range(3)
        ),
        "c0,eps_0_25,0,300000,38400,1.9,0.5,12.0,abc,runs/c0,done",
        "d0,eps_0_5,0,300000,38400,,,,abc,runs/d0,failed",
    )
    page.main(["table4"])
    text = capsys.readouterr().out
    ours = text.split("run here, scale: digits")[1]
    assert "| epsilon = 0 (baseline) | 3 | 0.41 ± 0.01 |  | 19 ± 1 |  |" in ours
    assert "| epsilon ~ U(0, 1 - t) | 3 | 0.61 ± 0.01 | +0.2 * | 18.5 ± 1 | -0.5 ~ |" in ours
    assert "| epsilon = 0.25 | 1 | 0.5 | +0.09 ? | 12 | -7 ? |" in ours
    assert "| epsilon = 0.5 | failed | - | - | - | - |" in ours
    assert "| epsilon ~ U(0, 0.5) | not run |" in ours
    assert "300,000 parameters, 38,400 training images" in ours
    printed_part = text.split("run here, scale: digits")[0]
    assert "| epsilon = 0 | 2.12 | digits |" in printed_part
    assert "| epsilon = 0.25 | 2.08 | digits |" in printed_part  # 1.9% from the baseline
    assert "| epsilon = 0.5 | 3.15 | not run |" in printed_part
    assert (tmp_path / "runs/study/tables/rear_table4.md").read_text() == text
    assert "<td>epsilon = 0.25</td>" in (tmp_path / "runs/study/tables/rear_table4.html").read_text()


def test_cells_of_one_seed_and_cells_that_are_not_done_are_no_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A study that was gathered with another word has several cells of a row and seed; old scores stand beside other states."""
    monkeypatch.chdir(tmp_path)
    lines = [f"a{seed},eps_0,{seed},300000,38400,1.9,0.4,18.0,abc,runs/a{seed},done" for seed in range(2)]
    _study(tmp_path, *lines, "b,eps_0_25,0,300000,38400,1.9,0.9,1.0,abc,runs/b,started")
    page.main(["table4"])
    assert "| epsilon = 0.25 | started | - | - | - | - |" in capsys.readouterr().out
    _study(tmp_path, *lines, "a1-lr2,eps_0,1,300000,38400,1.9,0.9,1.0,abc,runs/b,done")
    with pytest.raises(InputError, match="the cells a1, a1-lr2 are all row eps_0 with run.seed=1"):
        page.main(["table4"])


def test_a_published_difference_that_a_seed_can_explain_is_marked() -> None:
    text = as_markdown(TABLES["rear_table3"], [])
    assert "| tied codebook embedding | 21.08 ~ | 57.2 |" in text  # 1.1% from vanilla AR
    assert "| EN@0 + DE@15 (final) | 19.72 | 61.3 |" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [("a,b\n1,2\n", "has not the columns cell"), (None, "not found"), ("cell\x00", "has not the columns|no table")],
)
def test_files_that_hold_no_results_are_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "study.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_results(path)


def test_an_unknown_table_is_named() -> None:
    assert published_table("table4") is TABLES["rear_table4"]
    with pytest.raises(InputError, match="table9 is not a table of published.yaml. Use one of rear_table1"):
        published_table("table9")


def test_a_field_of_the_file_that_is_not_known_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "published.yaml"
    path.write_text(published_tables.FILE.read_text().replace("{label: REPA, ", "{label: REPA, fidd: 1.0, ", 1))
    monkeypatch.setattr(published_tables, "FILE", path)
    with pytest.raises(InputError, match="tables.rear_table1.rows.repa has the unknown field fidd"):
        published_tables.published_tables.__wrapped__()
