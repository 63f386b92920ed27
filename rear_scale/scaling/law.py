"""Scaling laws: fits of losses and distances against parameters, images or compute, with intervals from resampled cells.

    power           y = E + A / x^a
    three_term      L = E + A / N^a + B / D^b                 Hoffmann et al. 2022, arXiv:2203.15556, approach 3
    repeated_data   the same with D replaced by effective data  Muennighoff et al. 2023, arXiv:2305.16264, equation 5

All are fitted to logarithms under a Huber loss, which outliers move little, from many starts. The effective data alone are
those of Muennighoff et al.; their effective parameters (equation 6) are left out.

    law = fit(THREE_TERM, loss, draws=200, N=parameters, D=images)
    low, high = law.interval("a")
    print(warning(condition(THREE_TERM, law.constants, N=parameters, D=images)))
"""

# n cells, P constants of a law

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rear_scale.config import InputError
from rear_scale.scaling.scipy_part import scipy_part

HUBER = 1e-3  # of residuals in logarithms, as Hoffmann et al.
_NARROWING = (10 * HUBER, 3 * HUBER, HUBER)  # far from the minimum, the narrow loss alone stops in the wrong place
_EXPONENTS = (0.1, 0.25, 0.5, 1.0)  # of the starts
_REFINED = 3  # starts that are followed to their end
_INTERVAL = (5.0, 95.0)  # percentiles
# With losses known to 0.1%, this is where the worst combination of constants is uncertain by a factor of e.
_CONDITIONED = 1e3
_ASSUMED_EXPONENT = {"a": 0.35, "b": 0.3}  # about those of Hoffmann et al.; for designs that nobody has run yet
_LARGEST = 1e60  # of values and inputs, whose powers then are numbers of float64
_ROUNDING = 1e-6  # of values: what changes them by less is no law
_ASSUMED_HALF_LIFE = 15.4  # repeats, Muennighoff et al.

Columns = Mapping[str, np.ndarray]  # float64 [n] by name


@dataclass(frozen=True)
class Form:
    """One form of law: what it is a function of, and its constants, all positive, whose logarithms are fitted."""

    name: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    value: Callable[[Columns, Mapping[str, np.ndarray | float]], np.ndarray]
    terms: tuple[tuple[str, str, str], ...]  # (scale, exponent, input) of each decaying term, for the starts


def _power(columns: Columns, c: Mapping[str, np.ndarray | float]) -> np.ndarray:
    return c["E"] + c["A"] * columns["x"] ** -c["a"]


def _three_term(columns: Columns, c: Mapping[str, np.ndarray | float]) -> np.ndarray:
    return c["E"] + c["A"] * columns["N"] ** -c["a"] + c["B"] * columns["D"] ** -c["b"]


def effective_data(unique: np.ndarray, seen: np.ndarray, half_life: np.ndarray | float) -> np.ndarray:
    """Fresh data that `seen` data of which `unique` are distinct are worth; repeats lose their worth with `half_life`."""
    repeats = np.maximum(seen / unique - 1, 0)
    return np.minimum(seen, unique) * (1 + half_life * (1 - np.exp(-repeats / half_life)))


def _repeated_data(columns: Columns, c: Mapping[str, np.ndarray | float]) -> np.ndarray:
    data = effective_data(columns["U"], columns["D"], c["R"])
    return c["E"] + c["A"] * columns["N"] ** -c["a"] + c["B"] * data ** -c["b"]


POWER = Form("power", ("x",), ("E", "A", "a"), _power, (("A", "a", "x"),))
THREE_TERM = Form("three_term", ("N", "D"), ("E", "A", "a", "B", "b"), _three_term, (("A", "a", "N"), ("B", "b", "D")))
REPEATED_DATA = Form(
    "repeated_data",
    ("N", "D", "U"),
    ("E", "A", "a", "B", "b", "R"),
    _repeated_data,
    (("A", "a", "N"), ("B", "b", "D")),
)
FORMS = {form.name: form for form in (POWER, THREE_TERM, REPEATED_DATA)}


@dataclass(frozen=True)
class Law:
    """A fitted law."""

    form: Form
    constants: dict[str, float]
    residual: float  # root mean square of the residuals in logarithms
    draws: np.ndarray | None = None  # float64 [draws, P]: constants of resampled cells

    def __call__(self, **columns: np.ndarray | float) -> np.ndarray:
        """The law's values, float64 [n]."""
        return self.form.value(_as_arrays(self.form, columns), self.constants)

    def idle(self, **columns: np.ndarray | float) -> str | None:
        """The first input on which the fitted values hardly depend: over the cells, its term changes them by less than twice the
        scatter of single cells, so that its constants and their intervals mean nothing; None = there is none."""
        arrays = _as_arrays(self.form, columns)
        if self.form is REPEATED_DATA:
            arrays["D"] = effective_data(arrays["U"], arrays["D"], self.constants["R"])
        mean = self(**columns).mean()
        for scale, exponent, name in self.form.terms:
            term = self.constants[scale] * arrays[name] ** -self.constants[exponent]
            if np.ptp(term) / mean < max(2 * self.residual, _ROUNDING):
                return name
        return None

    def interval(self, name: str) -> tuple[float, float]:
        """The 90% interval of a constant. Needs draws."""
        assert self.draws is not None
        low, high = np.percentile(self.draws[:, self.form.constants.index(name)], _INTERVAL)
        return float(low), float(high)

    def prediction(self, **columns: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The values at some places, and the ends of the 90% intervals of observations there, float64 [n] each.

        The intervals are those of the constants together with the scatter of single cells. Needs draws.
        """
        assert self.draws is not None
        arrays = _as_arrays(self.form, columns)
        names = self.form.constants
        values = np.stack([self.form.value(arrays, dict(zip(names, draw, strict=True))) for draw in self.draws])
        scatter = np.random.default_rng(0).normal(0, self.residual, (len(values), 1))
        low, high = np.percentile(values * np.exp(scatter), _INTERVAL, axis=0)
        return self(**columns), low, high


@dataclass(frozen=True)
class HeldOut:
    """One cell that a law was not fitted to: its place, its result, and what the law says of it."""

    place: dict[str, float]
    result: float
    predicted: float
    low: float  # of the 90% interval of a result at this place
    high: float

    @property
    def inside(self) -> bool:
        return self.low <= self.result <= self.high


def fit(form: Form, values: Sequence[float] | np.ndarray, draws: int = 0, seed: int = 0, **columns: np.ndarray) -> Law:
    """The law of a form for values (positive, float [n]) at columns (positive, float [n] each).

    draws: resamplings of the cells, for intervals. Raises InputError for fewer cells than constants, and for values that are
    not positive and finite.
    """
    y, arrays = np.asarray(values, np.float64), _as_arrays(form, columns)
    _check(form, y, arrays)
    best = _refined(form, y, arrays, _starts(form, y, arrays))
    residuals = _residuals(best, form, y, arrays)
    free = max(1, len(y) - len(form.constants))
    law = Law(form, _named(form, best), float(np.sqrt(np.square(residuals).sum() / free)))
    if not draws:
        return law
    generator = np.random.default_rng(seed)
    constants: list[np.ndarray] = []
    while len(constants) < draws:
        chosen = generator.integers(0, len(y), len(y))
        part = {name: column[chosen] for name, column in arrays.items()}
        if _places(part) >= len(form.constants):  # fewer places than constants determine nothing
            constants.append(np.exp(_refined(form, y[chosen], part, [best])))
    return Law(form, law.constants, law.residual, np.stack(constants))


def condition(form: Form, constants: Mapping[str, float], **columns: np.ndarray) -> float:
    """How badly a design tells the constants of a law apart: the condition number of the derivatives of its logarithm.

    The derivatives are by the logarithms of the constants, in columns of unit length, with each scale taken at the geometric
    mean of its input, so that units make no difference. 1 is best; inputs that grow together, as at one ratio of images to
    parameters, make it large, and fewer places than constants make it infinite.
    """
    arrays = _as_arrays(form, columns)
    if _places(arrays) < len(form.constants):
        return float("inf")
    theta = np.log([constants[name] for name in form.constants])
    derivatives = _derivatives(theta, form, arrays)
    at = form.constants.index
    for scale, exponent, name in form.terms:
        centre = np.log(arrays[name]).mean()
        derivatives[:, at(exponent)] += constants[exponent] * centre * derivatives[:, at(scale)]
    lengths = np.linalg.norm(derivatives, axis=0)
    if not lengths.all():
        return float("inf")
    return float(np.linalg.cond(derivatives / lengths))


def assumed_constants(form: Form, **columns: np.ndarray) -> dict[str, float]:
    """Constants for the condition number of a design that was not run: usual exponents, and terms that are a fifth of the
    offset each at the geometric mean of their inputs."""
    arrays = _as_arrays(form, columns)
    constants = {"E": 1.0, "R": _ASSUMED_HALF_LIFE}
    for scale, exponent, name in form.terms:
        power = _ASSUMED_EXPONENT[exponent]
        constants |= {exponent: power, scale: 0.2 * float(np.exp(power * np.log(arrays[name]).mean()))}
    return {name: constants[name] for name in form.constants}


def warning(number: float) -> str | None:
    """A warning about a design of this condition number; None where its constants can be told apart."""
    if number <= _CONDITIONED:
        return None
    return (
        f"this grid does not tell the constants of the law apart (condition number {number:.3g}, above {_CONDITIONED:.0f}). Vary "
        "the length at each size, and the unique data at each length, instead of all of them together"
    )


def without_largest(
    form: Form, values: Sequence[float] | np.ndarray, by: str, draws: int = 200, seed: int = 0, **columns: np.ndarray
) -> tuple[Law, list[HeldOut]]:
    """The law of all cells but those with the largest `by` (one of the columns), and these cells beside its predictions.

    Raises InputError as `fit` does, and when all cells have the same `by`.
    """
    y, arrays = np.asarray(values, np.float64), _as_arrays(form, columns)
    largest = arrays[by] == arrays[by].max()
    if largest.all():
        raise InputError(
            f"all cells have {by}={arrays[by][0]:g}, so none is larger than the others. Add cells of other {by}"
        )
    law = fit(form, y[~largest], draws, seed, **{name: column[~largest] for name, column in arrays.items()})
    return law, held_out(law, y[largest], **{name: column[largest] for name, column in arrays.items()})


def held_out(law: Law, results: Sequence[float] | np.ndarray, **columns: np.ndarray) -> list[HeldOut]:
    """The results of cells that a law was not fitted to, beside its predictions. Needs a law with draws."""
    arrays = _as_arrays(law.form, columns)
    predictions = zip(*law.prediction(**arrays), strict=True)
    return [
        HeldOut({name: float(column[at]) for name, column in arrays.items()}, float(result), *map(float, numbers))
        for at, (result, numbers) in enumerate(zip(results, predictions, strict=True))
    ]


def _places(arrays: Columns) -> int:
    """The number of different inputs."""
    return len(np.unique(np.stack([*arrays.values()]), axis=1).T)


def _as_arrays(form: Form, columns: Mapping[str, np.ndarray | float]) -> dict[str, np.ndarray]:
    assert set(columns) == set(form.inputs), (sorted(columns), form.inputs)
    return {name: np.atleast_1d(np.asarray(column, np.float64)) for name, column in columns.items()}


def _check(form: Form, y: np.ndarray, arrays: Columns) -> None:
    needed = len(form.constants)
    for name, column in {"values": y, **arrays}.items():
        fits = (column >= 1 / _LARGEST) & (column <= _LARGEST)
        if not fits.all():
            raise InputError(
                f"{name} of the law {form.name} has {column[~fits][0]:g}, but must be positive and finite, from "
                f"{1 / _LARGEST:g} to {_LARGEST:g}. Leave that cell out"
            )
    if len(y) <= needed or _places(arrays) < needed:
        raise InputError(
            f"{len(y)} cells at {_places(arrays)} different {', '.join(form.inputs)} do not determine the {needed} constants of "
            f"the law {form.name}. Run at least {needed + 1} cells at {needed} places, or fit a law with fewer constants"
        )


def _named(form: Form, theta: np.ndarray) -> dict[str, float]:
    return dict(zip(form.constants, np.exp(theta).tolist(), strict=True))


def _residuals(theta: np.ndarray, form: Form, y: np.ndarray, arrays: Columns) -> np.ndarray:
    # The solver takes a shorter step after a value that is not finite.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return np.log(form.value(arrays, dict(zip(form.constants, np.exp(theta), strict=True)))) - np.log(y)


def _derivatives(theta: np.ndarray, form: Form, arrays: Columns) -> np.ndarray:
    """float64 [n, P]: of the law's logarithm by the logarithms of its constants."""
    step, columns = 1e-5, []
    one = np.ones(len(next(iter(arrays.values()))))
    for number in range(len(theta)):
        shift = np.zeros(len(theta))
        shift[number] = step
        high, low = (_residuals(theta + sign * shift, form, one, arrays) for sign in (1, -1))
        columns.append((high - low) / (2 * step))
    return np.stack(columns, axis=1)


def _starts(form: Form, y: np.ndarray, arrays: Columns) -> list[np.ndarray]:
    """Logarithms of constants: for each choice of exponents, the scales that fit best."""
    nnls = scipy_part("optimize").nnls
    starts = []
    for exponents in itertools.product(_EXPONENTS, repeat=len(form.terms)):
        decaying = [arrays[name] ** -power for (_, _, name), power in zip(form.terms, exponents, strict=True)]
        columns = np.stack([np.ones(len(y)), *decaying], axis=1) / y[:, None]
        lengths = np.linalg.norm(columns, axis=0)
        scales, error = nnls(columns / lengths, np.ones(len(y)))
        # A scale of zero has no logarithm: a small part of the values in its place.
        scales = np.maximum(scales / lengths, 1e-3 / lengths)
        constants = {"E": scales[0], "R": _ASSUMED_HALF_LIFE}
        for (scale, exponent, _), power, value in zip(form.terms, exponents, scales[1:], strict=True):
            constants |= {scale: value, exponent: power}
        starts.append((error, np.log([constants[name] for name in form.constants])))
    starts.sort(key=lambda pair: pair[0])
    return [theta for _, theta in starts[:_REFINED]]


def _refined(form: Form, y: np.ndarray, arrays: Columns, starts: Sequence[np.ndarray]) -> np.ndarray:
    """The best of the local minima that the starts lead to."""
    ends = [_minimum(form, y, arrays, start) for start in starts]
    return min(ends, key=lambda end: end.cost).x


def _minimum(form: Form, y: np.ndarray, arrays: Columns, start: np.ndarray) -> Any:
    """scipy's OptimizeResult of the local minimum that one start leads to."""
    optimize = scipy_part("optimize")
    end, theta = None, start
    for width in _NARROWING:
        end = optimize.least_squares(
            _residuals, theta, lambda theta, *_: _derivatives(theta, form, arrays),
            args=(form, y, arrays), loss="huber", f_scale=width, max_nfev=200, x_scale="jac",
        )  # fmt: skip
        theta = end.x
    return end
