"""The cells of a study: every combination of its grids' words, with the config and the overrides of each."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, QuotedString
from hydra.errors import HydraException

from rear_scale.config import CONFIG_DIR, ExperimentConfig, InputError, load, shown, to_dict
from rear_scale.config.fields import declaration, suggest
from rear_scale.config.overrides import is_group
from rear_scale.config.values import leaves
from rear_scale.scaling.study_file import StudyFile

_IN_BASE = re.compile(r"\{(\w+)\}")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9.@]+")
SEED = "run.seed"
# Fields that say where a run is and what it is called, and nothing of what it computes.
NAMES = ("run.name", "run.dir", "data.cache_dir", "evaluate.cache_dir")
_AFTER_TRAINING = ("sample.", "evaluate.")
# A folder of the name of a run has room for endings such as .evaluate.json in the 255 bytes of a file's name.
_LONGEST_NAME = 160
# Other files and folders of a study
_TAKEN = ("failed", "logs", "stages", "results")


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str  # that of its folder; the same as long as its words are
    words_by_grid: Mapping[str, Mapping[str, str]]  # of each grid that has it, its words there by key, such as size: s
    config: str  # the word after --config
    overrides: tuple[str, ...]  # of the training line, without run.name and run.dir
    cfg: ExperimentConfig

    @property
    def grids(self) -> tuple[str, ...]:
        return tuple(self.words_by_grid)

    @property
    def words(self) -> dict[str, str]:
        """Its words in all of its grids, those of the first one before others of the same key."""
        found: dict[str, str] = {}
        for words in self.words_by_grid.values():
            found = {**found, **{key: value for key, value in words.items() if key not in found}}
        return found

    @property
    def seed(self) -> int:
        return self.cfg.run.seed


def expand(study: StudyFile, more: Sequence[str] = ()) -> list[Cell]:
    """The cells of a study in the order of its grids; a run that several grids have is one cell.

    more: words of the user, which replace those of their keys in every grid and are added to the others. Raises InputError for
    a word that Hydra's grammar does not read, an unknown choice, and a config that is refused.
    """
    own = [_parsed(word, study, "the command line") for word in more]
    cells: dict[str, Cell] = {}
    for name, words in study.grids.items():
        parsed = [_parsed(word, study, f"{study.source}: grids.{name}") for word in words]
        keys = [key for key, _ in parsed]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise InputError(f"{study.source}: grids.{name} has {twice} twice. Write its values in one word")
        factors = dict([*parsed, *own])
        for values in itertools.product(*factors.values()):
            cell = _cell(study, name, dict(zip(factors, values, strict=True)))
            same = identity(cell.cfg)
            before = cells.get(same)
            cells[same] = cell if before is None else _merged(before, cell)
    found = list(cells.values())
    if not found:
        raise InputError(f"{study.source} has no cells: its grids are empty. Add words such as run.seed=range(3)")
    return _named_apart(found)


def identity(cfg: ExperimentConfig) -> str:
    """A sha256 of all fields of a config but its names and places: two runs that have it compute the same."""
    values = {key: value for key, value in leaves(to_dict(cfg)).items() if key not in NAMES}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def training_identity(cfg: ExperimentConfig) -> str:
    """A sha256 of all fields but names, places, and those of sampling and evaluation: one training serves all cells that have
    it. Fields that a resumed run may change count, because a study of them (train.stop_at_step, strategy) compares runs."""
    values = {
        key: value
        for key, value in leaves(to_dict(cfg)).items()
        if key not in NAMES and not key.startswith(_AFTER_TRAINING)
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def is_fixed(key: str) -> bool:
    """Whether a resumed run may not change a field."""
    own = declaration(ExperimentConfig, key)
    return own is None or not own.may_change


def sampling_overrides(cell: Cell, trained: Cell) -> list[str]:
    """The overrides that sample and score the weights of another cell as this one would."""
    mine, others = ({key: value for key, value in leaves(to_dict(one.cfg)).items() if key.startswith(_AFTER_TRAINING)}
                    for one in (cell, trained))  # fmt: skip
    return [f"{key}={'null' if value is None else value}" for key, value in mine.items() if value != others.get(key)]


def varied(cells: Sequence[Cell]) -> dict[str, list[Any]]:
    """The values of the cells by key, for the words of the grids, and for the single fields in which the cells differ.

    A field has its value in every cell; another word has "" in cells whose grid does not have it. run.seed is always there.
    """
    named = dict.fromkeys(key for cell in cells for key in cell.words if "." not in key)
    columns: dict[str, list[Any]] = {key: [cell.words.get(key, "") for cell in cells] for key in named}
    flat = [leaves(to_dict(cell.cfg)) for cell in cells]
    keys = dict.fromkeys(_keys_set(cells))
    keys.setdefault(SEED)
    for key in keys:
        values = [one.get(key) for one in flat]
        if key == SEED or any(value != values[0] for value in values):
            columns[key] = values
    return columns


def _keys_set(cells: Iterable[Cell]) -> Iterable[str]:
    for cell in cells:
        for text in cell.overrides:
            key = text.partition("=")[0].lstrip("+~")
            if "." in key and key not in NAMES:
                yield key


def _parsed(word: str, study: StudyFile, where: str) -> tuple[str, list[str]]:
    """The key of a word and its values as texts."""
    try:
        (override,) = OverridesParser.create().parse_overrides([word])
    except HydraException as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{where}: {shown(word)} is not a word of a grid ({reason}). Write KEY=VALUE,VALUE or KEY=range(3)"
        ) from error
    key = override.key_or_group
    value: Any = override.value()
    if isinstance(value, Glob):
        known = _known(key, study)
        if known is None:
            raise InputError(f"{where}: {shown(word)}: glob() is for choices and groups. Write the values of {key} out")
        return key, _chosen(value, known)
    if not override.is_sweep_override():
        return key, [value.text if isinstance(value, QuotedString) else word.partition("=")[2]]
    try:
        texts = list(override.sweep_string_iterator())
    except HydraException as error:
        raise InputError(f"{where}: {shown(word)}: {error}. Write the values out: {key}=A,B,C") from error
    return key, [_bare(text) for text in texts]


def _bare(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _known(key: str, study: StudyFile) -> list[str] | None:
    """The values of a choice or of a group of configs/."""
    if key in study.choices:
        return list(study.choices[key])
    return sorted(path.stem for path in (CONFIG_DIR / key).glob("*.yaml")) if is_group(key) else None


def _chosen(glob: Glob, known: list[str]) -> list[str]:
    def fits(name: str, patterns: list[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return [name for name in known if fits(name, glob.include) and not fits(name, glob.exclude)]


def _cell(study: StudyFile, grid: str, words: dict[str, str]) -> Cell:
    """The cell of one combination of words."""
    base, overrides = study.base, list(study.overrides)
    in_base = _IN_BASE.findall(base)
    for key, value in words.items():
        if key in in_base:
            base = base.replace(f"{{{key}}}", value)
        elif key in study.choices:
            named = study.choices[key]
            if value not in named:
                raise InputError(
                    f"{study.source}: grids.{grid}: {key}={shown(value)} is not one of {', '.join(named)}"
                    f"{suggest(value, list(named)) or '.'} Add it to choices.{key}, or use one of them"
                )
            base = named[value].config or base
            overrides += named[value].overrides
        else:
            overrides.append(f"{key}={value}")
    if missing := _IN_BASE.findall(base):
        raise InputError(f"{study.source}: base={base} needs the word {missing[0]}=... in grids.{grid}. Add it")
    kept = _without_repeats(overrides)
    try:
        cfg = load(base, kept)
    except InputError as error:
        typed = ", ".join(f"{key}={value}" for key, value in words.items())
        raise InputError(f"{study.source}: grids.{grid} ({typed}): {error}") from error
    return Cell(_name(words), {grid: words}, base, tuple(kept), cfg)


def _without_repeats(overrides: list[str]) -> list[str]:
    """The overrides without those that a later one of the same key replaces, choices of groups first: these set many fields."""
    keys = [text.partition("=")[0] for text in overrides]
    last = [text for number, text in enumerate(overrides) if keys[number] not in keys[number + 1 :]]
    return sorted(last, key=lambda text: not is_group(text.partition("=")[0]))


def _name(words: Mapping[str, str]) -> str:
    """The name of a cell: its values, those of single fields behind the last part of the key."""
    parts = []
    for key, value in words.items():
        before = key.rpartition(".")[2] if "." in key else ""
        parts.append(_NOT_IN_A_NAME.sub("_", f"{before}{value}").strip("_"))
    name = "-".join(filter(None, parts)).strip(".") or "cell"
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return f"{name}-cell" if name in _TAKEN or name.startswith("study.") else name


def _merged(first: Cell, second: Cell) -> Cell:
    return replace(first, words_by_grid={**first.words_by_grid, **second.words_by_grid})


def _named_apart(cells: list[Cell]) -> list[Cell]:
    """The cells, with a part of their identity in names that several of them would have."""
    names = [cell.name for cell in cells]
    return [
        replace(cell, name=f"{cell.name}-{identity(cell.cfg)[:6]}") if names.count(cell.name) > 1 else cell
        for cell in cells
    ]
