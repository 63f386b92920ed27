"""The claims of both papers and what results that are there say about them: `launchers/analyze.py claims`.

configs/claims.yaml lists the claims. A claim compares the rows of a table that `plus` selects with those that `minus` selects:
rows of an experiment's CSV file, or of evaluations (result.json). Without `minus`, the rows are compared with the number `at`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rear_scale.analysis.csv_tables import ABOUT, read_csv, shown
from rear_scale.analysis.experiment import Row
from rear_scale.analysis.kinds import scale_of, title_of
from rear_scale.analysis.table import EXPERIMENTS
from rear_scale.analysis.throughput import speed_of
from rear_scale.config import CONFIG_DIR, ExperimentConfig, InputError, from_dict
from rear_scale.config.values import leaves
from rear_scale.evaluate.result import Result, read_result
from rear_scale.intervals import Interval, difference_interval, mean_interval

FILE = CONFIG_DIR / "claims.yaml"
RESULTS = "result"  # the table of evaluations
HOLDS, FAILS, UNCLEAR, NOT_RUN = "holds", "does not hold", "not distinguishable", "not run"
PAPERS = {"rear": "reAR", "rar": "RAR"}
_MATCHES = ("scale", "size", "length")
_DIRECTIONS = ("above", "below", "equal")
_LEAST_SEEDS = 2  # of an interval


@dataclass(frozen=True)
class Claim:
    """One claim of a paper."""

    name: str
    paper: str
    where: str  # section, table or figure
    says: str  # in our words
    source: str  # an experiment, EXPERIMENT_TABLE, or RESULTS
    measure: tuple[str, ...]  # columns, of which the first one is used that all rows have
    plus: tuple[Mapping[str, Any], ...]
    minus: tuple[Mapping[str, Any], ...]
    direction: str  # of plus - minus, or of plus - at
    command: str  # that gives the results
    at: float = 0.0
    within: float = 0.0  # for "equal": the largest difference
    match: str = "scale"  # what compared rows share beside their data: scale = size and length, or one of both


@dataclass(frozen=True)
class Verdict:
    """What results of one data set say about a claim."""

    claim: Claim
    verdict: str
    data: str = ""
    scale: str = ""
    measure: str = ""
    interval: Interval | None = None
    runs: list[str] = field(default_factory=list)
    left_out: list[str] = field(
        default_factory=list
    )  # runs that fit too, of another recipe than those that were compared


def read_claims(path: Path = FILE) -> list[Claim]:
    """The claims of a file. Raises InputError for an entry that is not one."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [_claim(name, entry, path) for name, entry in values["claims"].items()]


def _claim(name: str, entry: Mapping[str, Any], path: Path) -> Claim:
    try:
        rest = dict(entry)
        measure, source = rest.pop("measure"), rest.pop("from")
        claim = Claim(
            name=name,
            source=source,
            measure=tuple(measure) if isinstance(measure, list) else (measure,),
            plus=_selections(rest.pop("plus")),
            minus=_selections(rest.pop("minus", [])),
            direction=rest.pop("claim"),
            command=rest.pop("command", None)
            or f"python launchers/analyze.py {source.partition('_')[0]} --checkpoint RUNS",
            **rest,
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: claims.{name} lacks or has an unknown {error}. Write it as the others") from None
    known = (RESULTS, *EXPERIMENTS)
    for key, value, choices in (
        ("claim", claim.direction, _DIRECTIONS), ("from", claim.source.partition("_")[0], known),
        ("paper", claim.paper, tuple(PAPERS)), ("match", claim.match, _MATCHES),
    ):  # fmt: skip
        if value not in choices:
            raise InputError(f"{path}: claims.{name} has {key}={value}. Use one of {', '.join(choices)}")
    return claim


def _selections(value: Any) -> tuple[Mapping[str, Any], ...]:
    return tuple(value) if isinstance(value, list) else (value,)


def find_tables(folders: Iterable[Path]) -> dict[str, list[Row]]:
    """The rows of all results in folders, by table. Each has `data_set`, `scale`, `size` and `recipe` beside its own columns.

    Of several analyses of a run, that of the latest step counts, then that of the most images, then the newest. Raises InputError
    for a folder that does not exist.
    """
    tables: dict[str, list[Row]] = {}
    results: dict[Path, Path] = {}
    records: dict[str, list[_Analysis]] = {name: [] for name in EXPERIMENTS}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"not found: {folder}. Name folders that hold runs, for instance runs/demo")
        for name in EXPERIMENTS:
            for record in sorted(folder.rglob(f"{name}.json")):
                records[name] += _analyses(name, record)
        for path in sorted(folder.rglob("result*.json")):
            # Other settings of sampling count only where the run's own ones were not evaluated.
            if path.name == "result.json" or not (path.parent / "result.json").exists():
                results.setdefault(path.resolve(), path)  # folders may overlap
    for path in results.values():
        tables.setdefault(RESULTS, []).extend(_rows_of_result(path))
    for of_name in records.values():
        best = {}
        for one in sorted(of_name, key=lambda one: one.rank):
            best[one.run] = one
        for one in best.values():
            for table, rows in one.tables.items():
                tables.setdefault(table, []).extend(rows)
    return tables


@dataclass(frozen=True)
class _Analysis:
    """What one analysis says about one checkpoint."""

    run: tuple[Any, ...]  # that tells the run from others
    rank: tuple[float, ...]  # step, images, time
    tables: dict[str, list[Row]]


def _analyses(name: str, record: Path) -> list[_Analysis]:
    """The analyses of each checkpoint in the record of a command, with the rows of the tables beside it."""
    try:
        values = json.loads(record.read_text())
        checkpoints, settings = values["checkpoints"], values.get("analyze") or {}
        about = {tuple(one[column] for column in ABOUT): one for one in checkpoints if "kind" in one}
        images = [settings.get(setting, 0) for setting in ("images", "images_per_class")]
        paths = [path for path in sorted(record.parent.glob(f"{name}*.csv")) if path.stem != f"{name}_summary"]
        tables = {path.stem: read_csv(path) for path in paths}
        found = []
        for key, one in about.items():
            extra = {column: one.get(column) for column in ("data_set", "scale", "size", "recipe")}
            own = {
                table: [
                    {**row, "model": one["kind"], **extra}
                    for row in rows
                    if tuple(row.get(column) for column in ABOUT) == key
                ]
                for table, rows in tables.items()
            }
            rank = tuple(map(float, (one["step"], *images, record.stat().st_mtime)))
            found.append(_Analysis((one["run"], one["seed"], *extra.values()), rank, own))
        return found
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []  # a file of another program


def _rows_of_result(path: Path) -> list[Row]:
    """The row of an evaluation, with the fields of the run's config; none for a file that is no evaluation of a checkpoint."""
    try:
        result = read_result(path)
        if result.config is None:
            return []
        cfg = from_dict(dict(result.config), str(path), [])
    except InputError:
        return []
    scale = scale_of(cfg)
    return [
        {
            **{name: value for name, value in leaves(dict(result.config)).items() if not isinstance(value, list | dict)},
            "model": title_of(cfg), "run": cfg.run.name, "seed": cfg.run.seed, **scale,
            "steps": _steps(result, cfg), "decode_depth": _part(cfg.objective.heads.decode_tap, cfg.model.depth),
            **_numbers(result), **_speed(path.parent),
        }
    ]  # fmt: skip


def _steps(result: Result, cfg: ExperimentConfig) -> int | None:
    """The length of a run, which may be given in epochs."""
    if cfg.train.total_steps is not None:
        return cfg.train.total_steps
    return None if result.checkpoint is None else result.checkpoint.step


def _speed(run: Path) -> Row:
    speed = speed_of(run)
    return {} if speed is None else {"images_per_s": speed["images_per_s"]}


def _part(tap: int | None, depth: int) -> float | None:
    return None if tap is None else tap / depth


def _numbers(result: Result) -> Row:
    """The scores under flat names: METRIC for the first reference, and ctr_val_clean and the like."""
    found: Row = {}
    for number in result.images.numbers():
        found.setdefault(number.name, number.value)
    for place, scores in (result.tokens or {}).items():
        found |= {f"{name}_{place}": scores[name] for name in ("ctr", "perplexity")}
    return found


def judge(claim: Claim, rows: Sequence[Row]) -> list[Verdict]:
    """The verdicts on a claim, one for each data set with rows on both sides; one of NOT_RUN without any."""
    found = []
    for data in dict.fromkeys(row["data_set"] for row in rows):
        here = [row for row in rows if row["data_set"] == data]
        verdicts = (_judge_group(claim, group) for group in _groups(claim, here))
        found += [next((one for one in verdicts if one is not None), None)]
    return [one for one in found if one is not None] or [Verdict(claim, NOT_RUN)]


def _groups(claim: Claim, rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that may be compared: those of one size and length of training, or of one of both, and of one form of
    conditioning. The group with the most different scales comes first, of several such that of the largest model."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        size, _, length = str(row["scale"]).partition(", ")
        name = {"scale": row["scale"], "size": size, "length": length}[claim.match]
        groups.setdefault((name, row.get("model.conditioning")), []).append(row)

    def place(group: list[Row]) -> tuple[float, ...]:
        return len({row["scale"] for row in group}), max(row["size"] for row in group)

    return sorted(groups.values(), key=place, reverse=True)


def _judge_group(claim: Claim, rows: Sequence[Row]) -> Verdict | None:
    sides = [[[row for row in rows if _matches(row, one, rows)] for one in side] for side in (claim.plus, claim.minus)]
    if not all(of_one for side in sides for of_one in side):
        return None
    kept = _one_recipe(claim, sides)
    plus, minus = map(_flat, kept)
    compared = {id(row) for row in (*plus, *minus)}
    left_out = [row for side in sides for row in _flat(side) if id(row) not in compared]
    measure = next((name for name in claim.measure if all(_is_number(row.get(name)) for row in (*plus, *minus))), None)
    if measure is None:
        return None
    first, second = (_by_seed(side, measure) for side in kept)
    if not claim.minus:
        interval = mean_interval([value - claim.at for value in first.values()])
    elif both := [run for run in first if run in second]:  # each run on both sides: its own difference
        interval = _of_own_differences({run: first[run] - second[run] for run in both})
    else:
        interval = difference_interval(list(first.values()), list(second.values()))
    scales = dict.fromkeys(row["scale"] for row in (*plus, *minus))
    runs = list(dict.fromkeys(str(row["run"]) for row in (*plus, *minus)))
    others = list(dict.fromkeys(str(row["run"]) for row in left_out))
    verdict = _verdict(claim, interval)
    return Verdict(claim, verdict, rows[0]["data_set"], "; ".join(scales), measure, interval, runs, others)


def _flat(side: Sequence[Sequence[Row]]) -> list[Row]:
    return [row for rows in side for row in rows]


def _one_recipe(claim: Claim, sides: Sequence[Sequence[Sequence[Row]]]) -> list[list[Sequence[Row]]]:
    """The rows of both sides by selection, of each kind of model those of one recipe: that with the most runs, and of several
    such the first. Runs of other recipes are no seeds of that model. A selection that names several values of a field of the
    config means all of their recipes."""
    found = []
    for selections, side in zip((claim.plus, claim.minus), sides, strict=True):
        several = any(
            "." in name and isinstance(value, list | dict) for one in selections for name, value in one.items()
        )
        found.append([rows if several else _of_recipe(rows, _flat(side)) for rows in side])
    return found


def _of_recipe(rows: Sequence[Row], side: Sequence[Row]) -> list[Row]:
    chosen = {}
    for model in {row["model"] for row in rows}:
        runs: dict[Any, set[Any]] = {}
        for row in side:
            if row["model"] == model:
                runs.setdefault(row.get("recipe"), set()).add((row["run"], row["seed"]))
        chosen[model] = max(runs, key=lambda recipe: len(runs[recipe]))
    return [row for row in rows if row.get("recipe") == chosen[row["model"]]]


def _of_own_differences(differences: Mapping[Any, float]) -> Interval:
    """The mean of the differences of runs. With two models, the difference between them: `plus` and `minus` then hold one half
    each of both models, with opposite signs."""
    models: dict[str, list[float]] = {}
    for run, value in differences.items():
        models.setdefault(run[0], []).append(value)
    if len(models) != 2:
        return mean_interval(list(differences.values()))
    one, other = models.values()
    return difference_interval(one, [-value for value in other])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _by_seed(side: Sequence[Sequence[Row]], measure: str) -> dict[Any, float]:
    """The sum over selections of the mean of a measure over the rows of each run."""
    found: dict[Any, float] = {}
    for rows in side:
        runs: dict[Any, list[float]] = {}
        for row in rows:
            run = (row["model"], row["run"], row["seed"], row["scale"], row.get("recipe"))
            runs.setdefault(run, []).append(row[measure])
        for run, values in runs.items():
            found[run] = found.get(run, 0.0) + statistics.fmean(values)
    return found


def _matches(row: Row, selection: Mapping[str, Any], rows: Sequence[Row]) -> bool:
    """Whether a row has the values of a selection.

    A value is a number or text; a list, of which one fits; {above: a, below: b}; or `max` or `min`, of all rows that have the
    other values.
    """
    plain = {name: value for name, value in selection.items() if value not in ("max", "min")}
    if not all(_fits(row.get(name), value) for name, value in plain.items()):
        return False
    for name, value in selection.items():
        if name not in plain:
            others = [
                one[name]
                for one in rows
                if one.get(name) is not None and all(_fits(one.get(n), v) for n, v in plain.items())
            ]
            edge = max if value == "max" else min
            # One size alone is neither the largest nor the smallest.
            if len(set(others)) < 2 or row.get(name) != edge(others):
                return False
    return True


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return any(_fits(value, one) for one in wanted)
    if isinstance(wanted, dict):
        inside = isinstance(value, int | float)
        return inside and wanted.get("above", -math.inf) < value < wanted.get("below", math.inf)
    if isinstance(wanted, float) and isinstance(value, int | float):
        return math.isclose(value, wanted, abs_tol=1e-6)
    return value == wanted


def _verdict(claim: Claim, interval: Interval) -> str:
    if interval.low is None or interval.high is None or interval.seeds < _LEAST_SEEDS:
        return UNCLEAR
    low, high = interval.low, interval.high
    if claim.direction == "below":
        low, high = -high, -low
    if claim.direction == "equal":
        if -claim.within <= low and high <= claim.within:
            return HOLDS
        return FAILS if low > claim.within or high < -claim.within else UNCLEAR
    return HOLDS if low > 0 else FAILS if high < 0 else UNCLEAR


HEADER = ["claim", "paper", "says", "measured on", "seeds", "measure", "difference", "verdict", "tested by"]


def table(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """The rows of the table, as text, under HEADER."""
    rows = []
    for one in verdicts:
        claim, interval = one.claim, one.interval
        difference, seeds = "-", "-"
        if interval is not None:
            span = "" if interval.low is None else f" [{shown(interval.low)}, {shown(interval.high)}]"
            difference, seeds = f"{shown(interval.mean)}{span}", str(interval.seeds)
        where = f"{one.data}: {one.scale}" if one.data else "-"
        rows.append([claim.name, f"{PAPERS[claim.paper]}, {claim.where}", claim.says, where, seeds, one.measure or "-",
                     difference, one.verdict, claim.command])  # fmt: skip
    return rows


def csv_rows(verdicts: Sequence[Verdict]) -> list[Row]:
    """The rows of claims.csv, with all digits."""
    found = []
    for one in verdicts:
        interval = one.interval
        found.append({
            "claim": one.claim.name, "paper": one.claim.paper, "where": one.claim.where, "says": one.claim.says,
            "verdict": one.verdict, "data": one.data or None, "scale": one.scale or None, "runs": " ".join(one.runs) or None,
            "left_out": " ".join(one.left_out) or None,
            "measure": one.measure or None, "expected": one.claim.direction,
            "difference": None if interval is None else interval.mean, "low": None if interval is None else interval.low,
            "high": None if interval is None else interval.high, "seeds": None if interval is None else interval.seeds,
            "command": one.claim.command,
        })  # fmt: skip
    return found


def counts(verdicts: Sequence[Verdict]) -> str:
    """The number of verdicts of each kind, in words."""
    kinds = (HOLDS, FAILS, UNCLEAR, NOT_RUN)
    return ", ".join(f"{sum(one.verdict == kind for one in verdicts)} {kind}" for kind in kinds)


def markdown(verdicts: Sequence[Verdict], command: str) -> str:
    """The table in Markdown, with its command."""
    lines = ["# Claims of the papers", "", f"    {command}", "", f"{counts(verdicts)}.", ""]
    cells = [HEADER, ["---"] * len(HEADER), *table(verdicts)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join(lines) + "\n"
