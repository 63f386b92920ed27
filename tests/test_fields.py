"""Config fields declare themselves: their checks, and what a resume and a checkpoint's weights allow, follow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.config.fields import (
    check_fields,
    choice,
    choices,
    declaration,
    declarations,
    fraction,
    number,
    section,
    setting,
    time_of_run,
)

KNOWN = ["sgd", "adam"]


@dataclass
class Inner:
    rule: str = choice("sgd", "update", among=lambda: KNOWN)
    modes: list[str] = choices(["a"], "modes", among=("a", "b"))
    rate: float = number(0.5, "rate", least=0, below=1, way_out="Use 0.1")
    size: int | None = number(None, "size", above=0, most=64)
    part: float = fraction(0.5, "part")
    start: float = time_of_run(0.0, "start")
    free: int = setting(1, "free", may_change=True, by_weights=False)


@dataclass
class Outer:
    inner: Inner = section(Inner, by_weights=True)
    absent: Inner | None = section(None, "absent", may_change=True)


def refusal(name: str, value: object) -> str:
    cfg = Outer()
    setattr(cfg.inner, name, value)
    with pytest.raises(InputError) as caught:
        check_fields(cfg)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("rule", "adm", "inner.rule=adm is not one of sgd, adam. Use one of them; did you mean adam?"),
        ("rule", "sgd,adam", "One run takes one value: start a run for each of a sweep"),
        ("modes", ["a", "c"], "inner.modes=c is not one of a, b"),
        ("modes", [], "inner.modes=[] is empty. Use [a]"),
        ("rate", 1.0, "inner.rate=1.0 must lie in [0, 1). Use 0.1"),
        ("rate", math.nan, "must lie in [0, 1)"),
        ("size", 0, "inner.size=0 must be above 0. Set inner.size to a positive number"),
        ("size", 65, "inner.size=65 is above 64. Use a smaller one"),
        ("size", math.inf, "inner.size=inf"),
        ("part", -0.1, "inner.part=-0.1 must lie between 0 and 1. Set inner.part to a fraction such as 0.1"),
        ("start", 1.5, "inner.start=1.5 is neither a fraction of the run (0 to 1) nor a whole number of steps"),
    ],
)
def test_errors_of_single_fields_name_field_value_rule_and_way_out(name: str, value: object, expected: str) -> None:
    assert expected in refusal(name, value)


def test_values_at_the_bounds_are_taken() -> None:
    cfg = Outer(Inner("adam", ["b", "a"], 0.0, 64, 1.0, 2.0), Inner())
    check_fields(cfg)
    cfg.absent.size = -1
    with pytest.raises(InputError, match=r"absent\.size=-1 must be above 0"):
        check_fields(cfg)


def test_names_that_are_registered_later_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Outer(Inner(rule="muon"))
    with pytest.raises(InputError):
        check_fields(cfg)
    monkeypatch.setattr("test_fields.KNOWN", [*KNOWN, "muon"])
    check_fields(cfg)


def test_fields_are_as_their_section_unless_they_say_otherwise() -> None:
    found = {name: (own.may_change, own.by_weights) for name, own in declarations(Outer).items()}
    assert found["inner.rule"] == (False, True)
    assert found["inner.free"] == (True, False)
    assert found["absent.rule"] == found["absent"] == (True, False)


@pytest.mark.parametrize(
    ("name", "may_change", "by_weights"),
    [
        ("tokenizer.training.lr", True, False),
        ("tokenizer.codebook_dim", False, True),
        ("tokenizer.image_size", False, False),
        ("model.kernel", True, False),
        ("objective.noise.rate", False, True),
        ("data.assumed_images", True, False),
        ("optim.warmup_steps", False, False),
        ("evaluate.reference.mine", True, False),
        ("sample.of_another_version", True, False),
        ("optim.of_another_version", False, False),
    ],
)
def test_the_schema_says_what_may_change(name: str, may_change: bool, by_weights: bool) -> None:
    own = declaration(ExperimentConfig, name)
    assert (own.may_change, own.by_weights) == (may_change, by_weights)


def test_no_field_is_free_that_the_weights_are_for() -> None:
    for name, own in declarations(ExperimentConfig).items():
        assert not (own.may_change and own.by_weights), name


def test_every_field_says_its_meaning_and_its_default_keeps_its_rule() -> None:
    cfg = ExperimentConfig()
    check_fields(cfg)
    sections = {name.rpartition(".")[0] for name in declarations(ExperimentConfig)}
    for name, own in declarations(ExperimentConfig).items():
        assert own.doc or name in sections, name
    assert declaration(ExperimentConfig, "of_another_version") is None
