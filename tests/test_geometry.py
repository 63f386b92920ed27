"""The grid of a tokenizer's tokens: said by configs, derived for those from before the fields, and never guessed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from rear_scale import config
from rear_scale.config import InputError, to_dict
from rear_scale.config.schema import SCAN_ORDERS
from rear_scale.model import shape_of
from rear_scale.objective.permutation import scan_order

DEMO = to_dict(config.load("demo.yaml"))


def refusal(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        config.load("rear_l.yaml", overrides)
    message = str(caught.value)
    assert message.isprintable()
    return message


def of_before(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The values of a config as they were saved before the fields were there."""
    values = to_dict(config.load(name))
    del values["tokenizer"]["grid"], values["tokenizer"]["prefix_tokens"]
    values["tokenizer"].update(fields)
    return values


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("rear_l.yaml", {}, ([16, 16], 0)),
        ("official/rear_l_vqplus.yaml", {}, ([16, 16], 0)),
        ("rear_titok_b64.yaml", {}, (None, 0)),
        ("rear_alitok_b.yaml", {}, ([16, 16], 17)),
        ("demo.yaml", {}, ([6, 6], 0)),
        ("demo.yaml", {"image_size": 32, "num_tokens": 64}, ([8, 8], 0)),
        ("rear_l.yaml", {"num_tokens": 128}, (None, 0)),
        ("rear_l.yaml", {"name": "mine"}, (None, 0)),
    ],
)
def test_configs_from_before_the_fields_have_the_grid_of_their_tokenizer(
    name: str, fields: dict[str, Any], expected: tuple[list[int] | None, int]
) -> None:
    saved = of_before(name, fields)
    cfg = config.from_file(saved, "meta.json")
    assert (cfg.tokenizer.grid, cfg.tokenizer.prefix_tokens) == expected
    config.check_resumable(cfg, saved, "step_5")
    if expected[0] is not None:
        other = copy.deepcopy(cfg)
        other.tokenizer.grid = [1, cfg.tokenizer.num_tokens]
        with pytest.raises(InputError, match=r"tokenizer\.grid=.*, but step_5 was trained with tokenizer\.grid=\["):
            config.check_resumable(other, saved, "step_5")


@pytest.mark.parametrize("order", [order for order in SCAN_ORDERS if order != "row_major"])
@pytest.mark.parametrize("field", ["objective.permutation.order", "sample.order"])
def test_a_sequence_has_no_scan_order(field: str, order: str) -> None:
    message = refusal("tokenizer.num_tokens=128", f"{field}={order}")
    assert message.startswith(f"{field}={order} is a scan order of a grid, but tokenizer.grid=null: the 128 tokens")
    assert message.endswith(f"Use {field}=row_major, or set tokenizer.grid=[ROWS,COLUMNS]")


def test_a_sequence_is_predicted_as_it_is_stored_or_permuted() -> None:
    always = ["objective.permutation.start=1", "objective.permutation.end=1", "sample.order=random"]
    for overrides in ([], always, ["tokenizer=titok_b64"]):
        cfg = config.load("rear_l.yaml", ["tokenizer.num_tokens=128", *overrides])
        assert (cfg.tokenizer.grid, shape_of(cfg).grid) == (None, None)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["tokenizer.num_tokens=128", "tokenizer.grid=[16,16]"],
         "tokenizer.grid=[16, 16] behind tokenizer.prefix_tokens=0 does not give tokenizer.num_tokens=128. Set the three"),
        (["tokenizer.prefix_tokens=3"], "behind tokenizer.prefix_tokens=3 does not give tokenizer.num_tokens=256"),
        (["tokenizer.num_tokens=256", "tokenizer.prefix_tokens=17"], "does not give tokenizer.num_tokens=256"),
        (["tokenizer.grid=null", "tokenizer.prefix_tokens=3"],
         "tokenizer.prefix_tokens=3 stands before a grid, but tokenizer.grid=null. Set tokenizer.grid=[ROWS,COLUMNS], or"),
        (["tokenizer.prefix_tokens=-1"], "tokenizer.prefix_tokens=-1 must not be negative"),
        (["tokenizer.grid=[16]"], "tokenizer.grid=[16] is not two numbers from 1 to 1,024. Use tokenizer.grid="),
        (["tokenizer.grid=[16,16,1]"], "is not two numbers"),
        (["tokenizer.grid=[0,256]"], "is not two numbers"),
        (["tokenizer.grid=[1,2048]", "tokenizer.num_tokens=2048"], "is not two numbers"),
        (["tokenizer.grid=[16,x]"], "tokenizer.grid[1]=x is of the wrong type: it takes a whole number"),
        (["tokenizer.grid=16"], "tokenizer.grid=[16] is not two numbers"),
        (["tokenizer.grid=[8,32]", "sample.order=subsample"], "sample.order=subsample halves both sides of the grid"),
        (["tokenizer=compact_digits", "sample.order=subsample"], "but tokenizer.grid=[6, 6]"),
        (["model.architecture=alitok", "tokenizer=titok_b64"],
         "model.architecture=alitok has rotary positions on a grid, but tokenizer.grid=null: the 64 tokens"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_named(overrides: list[str], expected: str) -> None:
    assert expected in refusal(*overrides)


def test_sizes_set_anew_bring_their_own_grid(tmp_path: Path) -> None:
    """In an override and in a user's file alike; a grid that is given with them counts."""
    small = {"image_size": 16, "num_tokens": 16}
    (tmp_path / "mine.yaml").write_text(f"defaults: [demo, _self_]\ntokenizer: {small}\n".replace("'", ""))
    (tmp_path / "wide.yaml").write_text("defaults: [demo, _self_]\ntokenizer: {num_tokens: 128, grid: [8, 16]}\n")
    assert config.load("demo.yaml", [f"tokenizer.{key}={value}" for key, value in small.items()]).tokenizer.grid == [
        4,
        4,
    ]
    assert config.load(str(tmp_path / "mine.yaml")).tokenizer.grid == [4, 4]
    assert config.load(str(tmp_path / "wide.yaml")).tokenizer.grid == [8, 16]
    with pytest.raises(InputError, match=r"tokenizer\.grid=\[8, 16\] .* does not give tokenizer\.num_tokens=36"):
        config.load(str(tmp_path / "wide.yaml"), ["tokenizer.num_tokens=36"])  # the file's own grid is not a stale one
    alitok = config.load("rear_alitok_b.yaml", ["tokenizer.num_tokens=81", "tokenizer.grid=[8,8]"]).tokenizer
    assert (alitok.grid, alitok.prefix_tokens) == ([8, 8], 17)


def test_a_grid_that_is_not_square_reaches_the_model_and_the_order() -> None:
    cfg = config.load("rear_l.yaml", ["tokenizer.num_tokens=128", "tokenizer.grid=[8,16]", "sample.order=alternate"])
    assert (shape_of(cfg).grid, shape_of(cfg).prefix_tokens) == ((8, 16), 0)
    assert scan_order("alternate", shape_of(cfg))[15:18].tolist() == [15, 31, 30]


def test_the_grid_survives_a_saved_config(tmp_path: Path) -> None:
    cfg = config.load("rear_l.yaml", ["tokenizer.num_tokens=130", "tokenizer.grid=[8,16]", "tokenizer.prefix_tokens=2"])
    (tmp_path / "saved.yaml").write_text(config.to_yaml(cfg))
    assert config.load(str(tmp_path / "saved.yaml")) == cfg
    assert config.from_file(to_dict(cfg), "meta.json") == cfg
