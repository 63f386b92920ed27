"""Scaling laws of data with known constants."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from rear_scale.config import InputError
from rear_scale.scaling.law import (
    FORMS,
    POWER,
    REPEATED_DATA,
    THREE_TERM,
    Form,
    assumed_constants,
    condition,
    effective_data,
    fit,
    held_out,
    warning,
    without_largest,
)

SIZES = (1e6, 3e6, 1e7, 3e7)
TRUE = {
    "power": {"E": 2.0, "A": 60.0, "a": 0.3},
    "three_term": {"E": 3.0, "A": 400.0, "a": 0.35, "B": 800.0, "b": 0.4},
    "repeated_data": {"E": 3.0, "A": 400.0, "a": 0.35, "B": 800.0, "b": 0.4, "R": 8.0},
}


def _design(form: Form, seeds: int = 1) -> dict[str, np.ndarray]:
    if form is POWER:
        axes = [np.array((1e5, 3e5, *SIZES))]
    elif form is THREE_TERM:
        axes = [np.array(SIZES), np.array((1e6, 4e6, 1.6e7))]
    else:
        axes = [np.array(SIZES), np.array((2e6, 8e6, 3.2e7, 1.28e8)), np.array((1e6, 4e6, 1.6e7))]
    grid = [np.repeat(column.ravel(), seeds) for column in np.meshgrid(*axes)]
    return dict(zip(form.inputs, grid, strict=True))


def _observed(form: Form, columns: dict[str, np.ndarray], noise: float, seed: int = 0) -> np.ndarray:
    values = form.value(columns, TRUE[form.name])
    return values * np.exp(np.random.default_rng(seed).normal(0, noise, len(values)))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_constants_of_values_without_noise_are_found(form: Form) -> None:
    columns = _design(form)
    law = fit(form, _observed(form, columns, 0), **columns)
    assert law.constants == pytest.approx(TRUE[form.name], rel=1e-3)
    assert law.residual < 1e-6
    assert law(**columns) == pytest.approx(form.value(columns, TRUE[form.name]), rel=1e-6)


def test_an_outlier_moves_a_law_little() -> None:
    columns = _design(THREE_TERM, seeds=2)
    values = _observed(THREE_TERM, columns, 0)
    values[5] *= 1.2
    assert fit(THREE_TERM, values, **columns).constants == pytest.approx(TRUE["three_term"], rel=0.02)


def _coverage(form: Form, simulations: int, draws: int, seeds: int) -> dict[str, float]:
    """The share of simulations whose 90% interval holds each constant, and the one that holds a new observation."""
    columns, true = _design(form, seeds), TRUE[form.name]
    beyond = {name: 3 * column.max() for name, column in columns.items()}
    hits = dict.fromkeys((*true, "observation"), 0)
    for seed in range(simulations):
        law = fit(form, _observed(form, columns, 0.003, seed), draws, seed, **columns)
        for name, value in true.items():
            low, high = law.interval(name)
            hits[name] += low <= value <= high
        place = {name: np.array([value]) for name, value in beyond.items()}
        (new,) = held_out(law, _observed(form, place, 0.003, 10_000 + seed), **place)
        hits["observation"] += new.inside
    return {name: count / simulations for name, count in hits.items()}


def test_intervals_hold_the_constants_about_as_often_as_they_say() -> None:
    found = _coverage(POWER, simulations=12, draws=16, seeds=3)
    assert all(share >= 0.66 for share in found.values()), found  # 8 of 12: fewer happen in 0.4% of samples at 0.9
    assert min(found.values()) < 1, found


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_90_percent_intervals_cover_in_80_to_97_percent_of_200_simulations(form: Form) -> None:
    found = _coverage(form, simulations=200, draws=60, seeds=1 if form is REPEATED_DATA else 3)
    assert all(0.80 <= share <= 0.97 for share in found.values()), found


def test_repeats_lose_their_worth() -> None:
    seen = np.array((5e5, 1e6, 2e6, 1e9))
    worth = effective_data(np.array(1e6), seen, 10.0)
    assert worth[:2] == pytest.approx(seen[:2])
    assert worth[2] == pytest.approx(1e6 * (1 + 10 * (1 - np.exp(-0.1))))
    assert worth[3] == pytest.approx(11e6)  # repeats are worth no more than the half-life in fresh data


def test_a_design_along_one_ratio_is_warned_of_and_a_grid_is_not() -> None:
    grid = _design(THREE_TERM)
    ratio = {"N": np.array(SIZES * 2), "D": 20 * np.array(SIZES * 2)}
    two_lengths = {name: np.array(column) for name, column in zip("ND", np.meshgrid(SIZES, (1e6, 4e6)), strict=True)}
    numbers = []
    for columns in (grid, ratio, {name: column.ravel() for name, column in two_lengths.items()}):
        numbers.append(condition(THREE_TERM, assumed_constants(THREE_TERM, **columns), **columns))
    assert numbers[0] < 100
    assert warning(numbers[0]) is None
    assert numbers[1] == np.inf  # four places for five constants
    for number in numbers[1:]:
        assert "does not tell the constants of the law apart" in warning(number)
    more = {name: np.append(column, 10 * column.max()) for name, column in ratio.items()}
    assert 1e4 < condition(THREE_TERM, assumed_constants(THREE_TERM, **more), **more) < np.inf


def test_the_condition_number_does_not_depend_on_units() -> None:
    columns = _design(THREE_TERM)
    millions = {name: column * 1e-6 for name, column in columns.items()}
    numbers = [condition(THREE_TERM, assumed_constants(THREE_TERM, **units), **units) for units in (columns, millions)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)


def test_the_largest_size_is_predicted_from_the_others() -> None:
    columns = _design(THREE_TERM)
    values = _observed(THREE_TERM, columns, 0.001)
    values[-1] *= 1.5  # the largest size at the greatest length
    law, cells = without_largest(THREE_TERM, values, "N", draws=30, **columns)
    assert {cell.place["N"] for cell in cells} == {3e7}
    assert [cell.inside for cell in cells] == [True, True, False]
    assert all(cell.low < cell.predicted < cell.high for cell in cells)
    assert cells[0].predicted == pytest.approx(float(law(**cells[0].place)[0]))


def _none_larger() -> None:
    columns = {"N": np.full(8, 1e6), "D": np.arange(1, 9) * 1e6}
    without_largest(THREE_TERM, np.ones(8), "N", **columns)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fit(POWER, [1.0, 2.0, 3.0], x=np.array((1, 2, 3))), "3 cells at 3 different x do not determine the 3"),
        (lambda: fit(POWER, np.ones(9), x=np.tile((1, 2), 5)[:9]), "9 cells at 2 different x"),
        (lambda: fit(POWER, [1.0, 2.0, np.nan, 3.0], x=np.arange(1, 5)), "values of the law power has nan"),
        (lambda: fit(POWER, np.ones(4), x=np.arange(4)), "x of the law power has 0"),
        (lambda: fit(POWER, np.full(4, 1e200), x=np.arange(1, 5)), "values of the law power has 1e+200"),
        (_none_larger, "all cells have N=1e+06"),
    ],
)
def test_cells_that_determine_no_law_are_refused(call, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("+", r"\+")):
        call()


def test_a_missing_scipy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    columns = _design(POWER)
    with pytest.raises(InputError, match="need the package scipy.*pip install"):
        fit(POWER, _observed(POWER, columns, 0), **columns)


def test_inputs_that_change_nothing_are_named() -> None:
    """Their constants would have intervals of no width, at wherever the solver began."""
    columns = _design(POWER, seeds=2)
    noisy = _observed(POWER, columns, 0.003)
    assert fit(POWER, noisy, **columns).idle(**columns) is None
    scatter = np.exp(np.random.default_rng(0).normal(0, 0.003, len(noisy)))
    for values in (np.full(len(noisy), 2.0), 2.0 * scatter, 1 + 1e-8 * columns["x"]):
        assert fit(POWER, values, **columns).idle(**columns) == "x"
    columns = _design(THREE_TERM)
    assert fit(THREE_TERM, _observed(THREE_TERM, columns, 0.003), **columns).idle(**columns) is None
    values = 3 + 400 / columns["N"] ** 0.35
    assert fit(THREE_TERM, values, **columns).idle(**columns) == "D"
    columns = _design(REPEATED_DATA)
    assert fit(REPEATED_DATA, _observed(REPEATED_DATA, columns, 0), **columns).idle(**columns) is None
