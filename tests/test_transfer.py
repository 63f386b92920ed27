from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import tiny_config_file

from rear_scale.config import InputError, load
from rear_scale.scaling import transfer
from rear_scale.scaling.transfer import Result, as_csv, moved, read_csv, table
from rear_scale.shards.subset import images_of_share


def test_a_killed_study_continues_with_the_cells_that_are_missing(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["--config", str(tiny_config_file(tmp_path, tokens)), "--quick", "--out", str(out), f"data.val={tokens}"]
    transfer.main([*command, "--dry-run"])
    assert "8 runs of 8 updates: widths [32, 64], rates [0.001, 0.01], 1 seeds" in capsys.readouterr().out
    assert not out.exists()
    transfer.main([*command, "--jobs", "2"])
    whole = read_csv((out / "transfer.csv").read_text())
    assert len({(one.parametrization, one.width, one.rate) for one in whole}) == len(whole) == 8
    losses = {(one.parametrization, one.width, one.rate): (one.loss, one.val_loss) for one in whole}
    for rate in (0.001, 0.01):
        assert losses["standard", 32, rate] == losses["mup", 32, rate]
        assert losses["standard", 64, rate] != losses["mup", 64, rate]
    shown = capsys.readouterr().out
    assert "mup: from width 32 to 64 the best rate goes from" in shown
    assert (out / "transfer.txt").read_text() == shown
    assert (out / "transfer.png").read_bytes()[:4] == b"\x89PNG"

    missing = [one for one in whole if (one.parametrization, one.width, one.rate) != ("mup", 64, 0.01)]
    (out / "transfer.csv").write_text(as_csv(missing))
    trained = []
    train = transfer._Study._train
    monkeypatch.setattr(transfer._Study, "_train", lambda study, cell: trained.append(cell) or train(study, cell))
    transfer.main([*command, "--jobs", "1"])
    again = read_csv((out / "transfer.csv").read_text())
    assert [(cell.parametrization, cell.width, cell.rate) for cell in trained] == [("mup", 64, 0.01)]
    assert [replace(one, seconds=0) for one in again] == [replace(one, seconds=0) for one in whole]

    for text in ("optim.schedule=wsd", "optim.lr=1", "model.width=8"):
        with pytest.raises(InputError, match=f"{text.partition('=')[0]} is set for each run of the grid"):
            transfer.main([*command, text])
    cfg = load(command[1], ["strategy=single", "data.use_share=0.2"])
    (tmp_path / "share").mkdir()
    on_a_share = transfer._Study(cfg, 32, tmp_path / "share").tokens
    assert len(on_a_share.order(4, 0).chosen) == images_of_share(on_a_share.manifest, 0.2) < 25
    with pytest.raises(InputError, match=r"--out=.* holds results of other settings or data \(settings.json\)"):
        transfer.main([*command, "data.use_share=0.2"])
    with pytest.raises(InputError, match=r"--out=.* holds results of other settings or data \(settings.json\)"):
        transfer.main([*command, "--updates", "9"])


def results(best: dict[tuple[str, int], float]) -> list[Result]:
    """A grid of four rates whose losses have their minimum where `best` says."""
    rates = (1.0, 2.0, 4.0, 8.0)
    return [
        Result(parametrization, width, rate, seed, 1.0, abs(rate - least) + 0.1 * seed, 0.0)
        for (parametrization, width), least in best.items()
        for rate in rates
        for seed in (0, 1)
    ]


def test_the_sentence_says_how_far_the_best_rate_moves() -> None:
    best = {("standard", 64): 4.0, ("standard", 128): 1.0, ("mup", 64): 4.0, ("mup", 128): 2.0, ("mup", 256): 4.0}
    grid = results(best)
    assert (moved(grid, "standard"), moved(grid, "mup")) == (2, 1)
    text = table(grid)
    assert text.startswith("validation loss, mean over seeds")
    assert "mup: from width 64 to 256 the best rate goes from 4 to 4; it moves by at most 1 step of the grid." in text
    assert "from 4 to 1; it moves by at most 2 steps of the grid (at the edge of the grid at width 128" in text
    # The loss of a run that diverged, in one seed alone, is never the best; without data.val, the training loss counts.
    diverged = [replace(one, val_loss=float("nan")) if (one.rate, one.seed) == (4.0, 1) else one for one in grid]
    assert moved(diverged, "mup") == 0
    assert read_csv(as_csv(grid)) == grid
    trained = [replace(one, loss=one.val_loss, val_loss=float("nan")) for one in grid]
    assert moved(trained, "standard") == 2
    assert table(trained).startswith("training loss, mean over seeds")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], r"--jobs=0 must be at least 1"),
        (["--rates", "0.1"], r"--rates=0.1 must be two or more increasing numbers above 0"),
        (["--rates", "0.1,nan"], r"--rates=0.1,nan must be"),
        (["--widths", "64,130"], r"model.width=130 is not a multiple of model.num_heads=4"),
        (["--seeds", "-1"], r"--seeds=-1 and --updates=200 must be at least 1"),
        ([], r"not found: .*index.json"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        transfer.main(["--config", "demo.yaml", *arguments, "--out", str(tmp_path / "out")])
