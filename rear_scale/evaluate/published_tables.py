"""The tables of the papers, read from configs/published.yaml: the only place where a published number stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import yaml

from rear_scale.config import CONFIG_DIR, InputError

FILE = CONFIG_DIR / "published.yaml"
# Measure -> (title, decimal places as printed).
MEASURES = {
    "fid": ("FID", 2),
    "inception_score": ("IS", 1),
    "precision": ("Prec.", 2),
    "recall": ("Rec.", 2),
    "images_per_s": ("images/s", 1),
}


@dataclass(frozen=True)
class Paper:
    name: str  # authors and year, as tables cite it
    arxiv: str
    reference: str  # the reference set of the FID, as far as the paper states it


@dataclass(frozen=True)
class Printed:
    """One printed row. None = the paper prints no such value there."""

    label: str
    fid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    images_per_s: float | None = None  # on one A100, with decoding
    parameters: str | None = None  # as printed, such as 461M
    epochs: int | None = None
    steps: int | None = None  # of sampling
    bpp_16: float | None = None  # 16 x bits per pixel of the tokenizer
    group: str | None = None
    tokenizer: str | None = None
    config: str | None = None  # the file in configs/ that trains this row
    same_as: str | None = None  # TABLE/ROW that prints a result of the same model
    note: str | None = None

    def measures(self) -> dict[str, float]:
        """The printed scores by name, in the order of MEASURES."""
        return {name: value for name in MEASURES if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class PublishedTable:
    """One table of a paper."""

    key: str
    paper: Paper
    number: int
    title: str
    rows: Mapping[str, Printed]
    baseline: str | None = None  # the row that others are compared with
    note: str | None = None

    @property
    def source(self) -> str:
        return f"{self.paper.name}, Table {self.number}"

    @property
    def of_models(self) -> bool:
        """Whether it compares models, and not settings of one model."""
        return any(row.parameters is not None for row in self.rows.values())


@dataclass(frozen=True)
class _File:
    papers: Mapping[str, Any]
    tables: Mapping[str, Any] = field(default_factory=dict)


@cache
def published_tables() -> Mapping[str, PublishedTable]:
    """All tables by key, such as rear_table4. Raises InputError where the file has an unknown or missing field."""
    values = _made(_File, yaml.safe_load(FILE.read_text()), "")
    papers = {name: _made(Paper, paper, f"papers.{name}") for name, paper in values.papers.items()}
    tables = {}
    for key, table in values.tables.items():
        rows = {name: _made(Printed, row, f"tables.{key}.rows.{name}") for name, row in table["rows"].items()}
        rest = {name: value for name, value in table.items() if name not in ("rows", "paper", "table")}
        about = {**rest, "key": key, "paper": papers[table["paper"]], "number": table["table"], "rows": rows}
        tables[key] = _made(PublishedTable, about, f"tables.{key}")
    return tables


def printed(place: str) -> Printed:
    """The row TABLE/ROW."""
    table, _, row = place.partition("/")
    return published_tables()[table].rows[row]


def published_table(name: str) -> PublishedTable:
    """The table of a key; `table4` means rear_table4. Raises InputError for an unknown one."""
    tables = published_tables()
    for key in (name, f"rear_{name}"):
        if key in tables:
            return tables[key]
    raise InputError(f"{name} is not a table of {FILE.name}. Use one of {', '.join(tables)}")


def differences(row: Printed) -> list[str]:
    """What the row named by same_as prints otherwise, as `FID 1.78 (RAR, Yu et al. 2024, Table 4)`."""
    if row.same_as is None:
        return []
    other = printed(row.same_as)
    theirs, source = other.measures(), published_tables()[row.same_as.partition("/")[0]].source
    return [
        f"{MEASURES[name][0]} {theirs[name]:.{MEASURES[name][1]}f} ({source})"
        for name, value in row.measures().items()
        if name in theirs and theirs[name] != value
    ]


def _made(form: type[Any], values: Any, place: str) -> Any:
    names = {one.name for one in fields(form)}
    if not isinstance(values, dict) or not values.keys() <= names:
        wrong = sorted(map(str, values.keys() - names)) if isinstance(values, dict) else [str(values)]
        raise InputError(f"{FILE}: {place} has the unknown field {', '.join(wrong)}. Use {', '.join(sorted(names))}")
    try:
        return form(**values)
    except TypeError as error:
        raise InputError(f"{FILE}: {place} lacks a field ({error})") from error
