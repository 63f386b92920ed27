"""The rows of a study by what is varied in them: sizes, lengths and seeds of one method, and pairs of methods.

A study has several grids, and a field that one of them varies has a value in the cells of all others. Cells are therefore
compared by the words of their grids: those that name a size, a length or a seed, and all others, which make another method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rear_scale.scaling.study_collect import Collected, Row
from rear_scale.scaling.study_file import StudyFile
from rear_scale.scaling.study_grid import SEED, Cell

OBJECTIVE = "objective"
# Fields of a run's length and data. Warm-up is a share of the length.
_OF_LENGTH = ("train.total_steps", "train.epochs", "optim.warmup_steps", "data.use_share")

Words = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Place:
    """A finished row as a cell of one grid. A row of several grids has as many places."""

    row: Row
    objective: str
    size: Words
    length: Words
    variant: Words  # fields of the objective
    others: Words  # all other words but the seed

    @property
    def method(self) -> tuple[str, Words]:
        return self.objective, self.variant | self.others

    @property
    def label(self) -> str:
        """The method, such as `rear` or `rear heads.weight=0.5`."""
        return " ".join([self.objective, *described(self.variant | self.others)])

    @property
    def data(self) -> tuple[int, int]:
        return self.row["images"], self.row["unique_images"] or 0


def described(words: Words) -> list[str]:
    """The words in order: choices by their values, fields behind the last two parts of their keys."""
    return [f"{'.'.join(key.split('.')[-2:])}={value}" if "." in key else value for key, value in sorted(words)]


def places(study: StudyFile, collected: Collected) -> list[Place]:
    """The places of all finished rows, in the order of the cells."""
    sizes = _size_words(collected)
    found = []
    for cell, row in zip(collected.cells, collected.rows, strict=True):
        if row["state"] == "done":
            found += [_place(study, cell, row, words, sizes) for words in cell.words_by_grid.values()]
    return found


def _place(study: StudyFile, cell: Cell, row: Row, words: Mapping[str, str], sizes: frozenset[str]) -> Place:
    parts: dict[str, set[tuple[str, str]]] = {"size": set(), "length": set(), "variant": set(), "others": set()}
    for key, value in words.items():
        if key in (OBJECTIVE, SEED):
            continue
        if key in sizes:
            part = "size"
        elif _is_length(study, key):
            part = "length"
        else:
            part = "variant" if key.startswith(f"{OBJECTIVE}.") else "others"
        parts[part].add((key, value))
    return Place(row, words.get(OBJECTIVE, "all"), **{name: frozenset(part) for name, part in parts.items()})


def _is_length(study: StudyFile, key: str) -> bool:
    if key not in study.choices:
        return key in _OF_LENGTH
    given = [text.partition("=")[0] for choice in study.choices[key].values() for text in choice.overrides]
    return bool(given) and {*given} <= {*_OF_LENGTH} and not any(one.config for one in study.choices[key].values())


def _size_words(collected: Collected) -> frozenset[str]:
    """The keys of choices, groups and fields of the model of which each number of parameters has one value."""
    values: dict[str, dict[int, set[str]]] = {}
    for cell, row in zip(collected.cells, collected.rows, strict=True):
        for key, value in cell.words.items():
            values.setdefault(key, {}).setdefault(row["parameters"], set()).add(value)
    return frozenset(
        key
        for key, by_size in values.items()
        if key != OBJECTIVE
        and ("." not in key or key.startswith("model."))
        and len(by_size) > 1
        and all(len(one) == 1 for one in by_size.values())
    )


def methods(found: Sequence[Place]) -> dict[tuple[str, Words], list[Place]]:
    """The places of each method, every row once."""
    by_method: dict[tuple[str, Words], dict[str, Place]] = {}
    for place in found:
        by_method.setdefault(place.method, {}).setdefault(place.row["cell"], place)
    return {method: [*own.values()] for method, own in by_method.items()}


def longest(own: Sequence[Place]) -> list[Place]:
    """The places with the most images, and of these with the most different ones."""
    most = max(place.data for place in own)
    return [place for place in own if place.data == most]


def twins(found: Sequence[Place], first: str, second: str) -> list[tuple[list[Place], list[Place]]]:
    """Pairs of settings of two objectives that differ in the objective and its own fields alone, with a place for each seed.

    A variant of the second objective that the first does not have, such as another weight of its heads, is paired with the
    first objective as it is.
    """
    by_setting: dict[tuple[str, Words, Words], dict[int, Place]] = {}
    for place in found:
        key = (place.objective, place.size | place.length | place.others, place.variant)
        by_setting.setdefault(key, {})[place.row[SEED]] = place
    pairs, seen = [], set()
    for (objective, setting, variant), own in by_setting.items():
        if objective != second:
            continue
        base = by_setting.get((first, setting, variant)) or by_setting.get((first, setting, frozenset()))
        seeds = sorted(own.keys() & base.keys()) if base else []
        rows = tuple((base[seed].row["cell"], own[seed].row["cell"]) for seed in seeds) if base else ()
        if base and seeds and rows not in seen:  # two grids may have the same cells
            seen.add(rows)
            pairs.append(([base[seed] for seed in seeds], [own[seed] for seed in seeds]))
    return pairs
