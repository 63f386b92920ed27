"""The YAML file of a study (configs/study/), and the same study at a scale for one machine (--scale NAME).

    title: what it asks
    base: rear_s.yaml            the config of every cell; {NAME} in it is a word of the grid, as in "{objective}_{size}.yaml"
    overrides: [...]             of every cell, before the words of the grid
    choices: {row: {A: [...]}}   names for overrides, for a config, or {config: ..., overrides: [...]}; row=A,B or row=glob(*) is
                                 then a word of a grid
    grids: {main: [...]}         words in Hydra's sweep syntax; each grid is the product of its words
    commands: [train, evaluate]  run for each cell: train, sample, evaluate, unguided (scores without guidance), throughput
    evaluate: [...]              overrides of the lines of launchers/evaluate.py and launchers/sample.py
    start: torchrun ...          the words in front of every line
    jobs: 2                      cells that are run at a time (1); each has its share of the machine's cores and GPUs
    guidance: {...}              a search for the scale of guidance in place of a grid: rear_scale/scaling/guidance.py
    scales: {digits: {...}}      the same fields again, in place of those above

A scale has a file of its own in configs/study/scale/, for what its studies share: base, overrides, start, `data` (a folder) and
`prepare` (the commands that fill it), and `machine` (rates by which a dry run estimates the time). The study's own fields for
that scale come on top; `overrides` of both add up, and those for the full scale are left out. A choice that a scale sets to null
is left out there. {processes} in `start` and `prepare` is the number of GPUs of this machine, at most two; two without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from rear_scale.config import CONFIG_DIR, InputError, check_yaml, find_config
from rear_scale.config.fields import suggest

COMMANDS = ("train", "sample", "evaluate", "unguided", "throughput")  # in the order in which they are run
_SCALES = CONFIG_DIR / "study" / "scale"
# Field -> its type in YAML, and the type of its entries.
_TYPES: dict[str, tuple[type, type | None]] = {
    "title": (str, None),
    "base": (str, None),
    "overrides": (list, str),
    "choices": (dict, dict),
    "grids": (dict, list),
    "commands": (list, str),
    "evaluate": (list, str),
    "start": (str, None),
    "jobs": (int, None),
    "guidance": (dict, None),
    "data": (str, None),
    "prepare": (list, dict),
    "machine": (dict, None),
    "table": (str, None),
}


@dataclass(frozen=True)
class Choice:
    """What a named value of a word stands for."""

    config: str | None  # in place of the study's base
    overrides: list[str]


@dataclass(frozen=True)
class Preparation:
    """One command that makes data for the cells."""

    name: str
    command: str
    makes: Path


@dataclass(frozen=True)
class Machine:
    """Rates of the machine that a scale is meant for; a dry run estimates the time of a cell with them."""

    name: str
    gflops_per_s: float  # of training in one job
    step_s: float  # more for each update, whatever its model
    start_s: float  # of one command
    evaluate_s: float  # of one evaluation, whatever its model, without its start
    evaluate_s_per_gflop: float  # more for each GFLOP that training needs for an image of the model


@dataclass(frozen=True)
class StudyFile:
    """A study as it is written, at one scale. `rear_scale.scaling.study_grid.expand` makes its cells."""

    name: str  # that of its file
    scale: str | None
    source: str  # the file, for errors and commands
    title: str
    base: str
    start: str
    jobs: int
    overrides: list[str]
    choices: dict[str, dict[str, Choice]]
    grids: dict[str, list[str]]
    commands: list[str]
    evaluate: list[str] = field(default_factory=list)
    guidance: dict[str, Any] | None = None
    data: Path | None = None
    prepare: list[Preparation] = field(default_factory=list)
    machine: Machine | None = None
    table: str | None = None  # the published table that its rows stand in: a key of configs/published.yaml

    @property
    def folder(self) -> Path:
        """The folder of its runs, tables and figures."""
        return Path("runs/study") / (self.name if self.scale is None else f"{self.name}_{self.scale}")


def read_study(name: str, scale: str | None = None) -> StudyFile:
    """The study of a file in configs/ or elsewhere. Raises InputError for an unknown file, scale or field, and a wrong type."""
    path = find_config(name)
    values = _read(path)
    scales = values.pop("scales", {})
    if not isinstance(scales, dict):
        raise InputError(f"{path}: scales is not a section of named scales. Write it as in {CONFIG_DIR / 'study'}")
    _check(values, str(path))
    if scale is not None:
        values = {**values, **_at_scale(values, scales, scale, path)}
    needed = ("title",) if "guidance" in values else ("title", "base", "grids")
    if missing := [key for key in needed if key not in values]:
        raise InputError(f"{path}: {missing[0]} is missing. A study has a title, and a base and grids or guidance")
    return _typed(path, scale, values)


def _read(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8", errors="replace")
    check_yaml(text, str(path))
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML ({' '.join(str(error).split())}). Correct it") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a study: it has no fields. Write it as in {CONFIG_DIR / 'study'}")
    return values


def _at_scale(values: Mapping[str, Any], scales: Mapping[str, Any], scale: str, path: Path) -> dict[str, Any]:
    """The fields that a scale sets: those of its file in configs/study/scale/, and those of the study for it."""
    if scale not in scales:
        known = ", ".join(scales) or "none"
        raise InputError(
            f"--scale {scale} is not a scale of {path}{suggest(scale, list(scales)) or '.'} It has {known}"
        )
    shared_file = _SCALES / f"{scale}.yaml"
    shared = _read(shared_file) if shared_file.is_file() else {}
    own = scales[scale] or {}
    if not isinstance(own, dict):
        raise InputError(f"{path}: scales.{scale} is not a section of fields. Write it as in {CONFIG_DIR / 'study'}")
    _check(shared, str(shared_file))
    _check(own, f"{path}: scales.{scale}")
    choices = dict(values.get("choices", {}))
    for name, named in own.get("choices", {}).items():
        choices[name] = {**choices.get(name, {}), **named}
    overrides = [*shared.get("overrides", []), *own.get("overrides", [])]
    evaluate = [*shared.get("evaluate", []), *own.get("evaluate", [])]
    return {**shared, **own, "choices": choices, "overrides": overrides, "evaluate": evaluate}


def _check(values: Mapping[str, Any], source: str) -> None:
    """Raises InputError for the first unknown field, and for one of another type."""
    for key, value in values.items():
        if key not in _TYPES:
            raise InputError(f"{source}: {key} is not a field of a study{suggest(str(key), list(_TYPES)) or '.'} It has "
                             f"{', '.join(_TYPES)} and scales")  # fmt: skip
        wanted, entry = _TYPES[key]
        entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if not isinstance(value, wanted) or (entry is not None and not all(isinstance(one, entry) for one in entries)):
            kinds: dict[Any, str] = {str: "texts", dict: "sections", list: "lists"}
            inside = kinds.get(entry, "values")
            kinds = {str: "a text", int: "a whole number", list: f"a list of {inside}", dict: f"a section of {inside}"}
            kind = kinds[wanted]
            raise InputError(f"{source}: {key} is not {kind}. Write it as in {CONFIG_DIR / 'study'}")


def _typed(path: Path, scale: str | None, values: dict[str, Any]) -> StudyFile:
    commands = values.get("commands", ["train", "evaluate"])
    for command in commands:
        if command not in COMMANDS:
            raise InputError(
                f"{path}: commands has {command}, which is not one of {', '.join(COMMANDS)}"
                f"{suggest(command, list(COMMANDS)) or '.'} Use some of them"
            )
    jobs = checked_jobs(values.get("jobs", 1), f"{path}: jobs", commands)
    choices = {
        name: {
            str(value): _choice(meaning, f"{path}: choices.{name}.{value}")
            for value, meaning in named.items()
            if meaning is not None
        }
        for name, named in values.get("choices", {}).items()
    }
    grids = {name: _texts(words, f"{path}: grids.{name}") for name, words in values.get("grids", {}).items()}
    return StudyFile(
        name=path.stem,
        scale=scale,
        source=str(path.relative_to(CONFIG_DIR)) if path.is_relative_to(CONFIG_DIR) else str(path),
        title=values["title"],
        base=values.get("base", ""),
        start=_with_processes(values.get("start", "python")),
        jobs=jobs,
        overrides=values.get("overrides", []),
        choices=choices,
        grids=grids,
        commands=sorted(commands, key=COMMANDS.index),
        evaluate=values.get("evaluate", []),
        guidance=values.get("guidance"),
        data=Path(values["data"]) if "data" in values else None,
        prepare=[_preparation(one, f"{path}: prepare") for one in values.get("prepare", [])],
        machine=_section(Machine, values["machine"], f"{path}: machine") if "machine" in values else None,
        table=values.get("table"),
    )


def checked_jobs(jobs: int, name: str, commands: Sequence[str]) -> int:
    """The number of cells that are run at a time. Raises InputError for less than one, and for several that measure times."""
    if jobs < 1:
        raise InputError(f"{name}={jobs} must be at least 1, the number of cells that are run at a time. Use 1 or 2")
    if jobs > 1 and "throughput" in commands:
        raise InputError(
            f"{name}={jobs}: cells that run at a time would slow each other down while they are timed. Use 1"
        )
    return jobs


def _texts(words: Any, where: str) -> list[str]:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise InputError(f"{where} is not a list of texts such as [train.epochs=50]. Write it as one")
    return words


def _choice(meaning: Any, where: str) -> Choice:
    if isinstance(meaning, str):
        return Choice(meaning, [])
    if isinstance(meaning, dict):
        if not {*meaning} <= {"config", "overrides"} or not isinstance(meaning.get("config", ""), str):
            raise InputError(
                f"{where} has the fields {', '.join(map(str, meaning))}. A choice has config and overrides"
            )
        return Choice(meaning.get("config"), _texts(meaning.get("overrides", []), f"{where}.overrides"))
    return Choice(None, _texts(meaning, where))


def _preparation(values: Mapping[str, Any], where: str) -> Preparation:
    found: Preparation = _section(Preparation, values, where)
    return replace(found, command=_with_processes(found.command), makes=Path(found.makes))


def _with_processes(words: str) -> str:
    """The words with {processes} replaced: two, but with GPUs at most one for each."""
    return words.replace("{processes}", str(min(2, torch.cuda.device_count()) or 2))


def _section(section: type, values: Mapping[str, Any], where: str) -> Any:
    names = [one.name for one in fields(section)]
    if sorted(values) != sorted(names):
        raise InputError(f"{where} has the fields {', '.join(map(str, values))}, not {', '.join(names)}. Give it these")
    return section(**values)
