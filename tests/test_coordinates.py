from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rear_scale.config import InputError
from rear_scale.config.schema import OPTIMIZERS
from rear_scale.scaling import coordinates
from rear_scale.scaling.coordinates import Growth, Row, growths_of

# Small sequences and heads; the tokens are synthetic.
SMALL = [
    *("tokenizer.num_tokens=16", "tokenizer.image_size=64", "tokenizer.grid=[4,4]", "tokenizer.codebook_size=32"),
    *("tokenizer.codebook_dim=8", "model.num_classes=5", "objective.heads.hidden=32"),
]
# The bounds of the check: of the largest growth from the narrowest width under mup, and of at least one under standard.
FLAT, GROWS = 1.3, 2.0


def growths(out: Path, *arguments: str) -> list[Growth]:
    coordinates.main([*arguments, "--out", str(out)])
    with (out / "coordinates.csv").open() as file:
        lines = list(csv.DictReader(file))
    numbers = {"seed": int, "width": int, "start": float, "size": float, "change": float}
    rows = [Row(**{name: numbers.get(name, str)(value) for name, value in line.items()}) for line in lines]
    assert np.asarray(Image.open(out / "coordinates.png")).std() > 0
    return growths_of(rows)


def check(found: list[Growth]) -> None:
    for optimizer in {growth.optimizer for growth in found}:
        own = [growth for growth in found if growth.optimizer == optimizer]
        flat = [growth for growth in own if growth.parametrization == "mup"]
        assert [growth for growth in flat if growth.factor >= FLAT] == [], optimizer
        assert max(growth.factor for growth in own if growth.parametrization == "standard") > GROWS, optimizer


@pytest.mark.parametrize("config", ["rear_s.yaml", pytest.param("rear_alitok_b.yaml", marks=pytest.mark.long)])
def test_activations_are_flat_in_the_width_under_mup_and_grow_under_standard(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = SMALL if config == "rear_s.yaml" else [*SMALL, "tokenizer.prefix_tokens=0"]
    found = growths(tmp_path, "--config", config, "--widths", "32,64,128", "model.depth=2", "optim.lr=2e-3", *shape)
    check(found)
    layers = {growth.layer for growth in found}
    assert {"embedded", "blocks.1", "blocks.1.attn", "blocks.1.attn.logits", "blocks.1.mlp", "logits"} <= layers
    assert {"encode", "decode"} <= layers
    assert {growth.optimizer for growth in found} == {"adamw", "muon"} & OPTIMIZERS.keys()
    assert "mup, adamw: the largest growth from the narrowest width is" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_check_of_rear_s_from_64_to_512(tmp_path: Path) -> None:
    check(growths(tmp_path, "--config", "rear_s.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "64"], r"--widths=64 must be two or more increasing numbers"),
        (["--widths", "64,x"], r"--widths=64,x is not a list of numbers"),
        (["--updates", "0"], r"--updates=0 and --seeds=1 must be at least 1"),
        (["--widths", "64,130"], r"model.width=130 is not a multiple of model.num_heads=4"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        coordinates.main(["--config", "rear_s.yaml", *arguments, "--out", str(tmp_path)])
