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

from rear_scale.analysis.csv_tables import read_csv, shown
from rear_scale.analysis.experiment import Row
from rear_scale.analysis.intervals import Interval, difference_interval, mean_interval
from rear_scale.analysis.kinds import scale_of, title_of
from rear_scale.analysis.table import EXPERIMENTS
from rear_scale.config import CONFIG_DIR, InputError, from_dict
from rear_scale.config.values import leaves
from rear_scale.evaluate.result import Result, read_result

FILE = CONFIG_DIR / "claims.yaml"
RESULTS = "result"  # the table of evaluations
HOLDS, FAILS, UNCLEAR, NOT_RUN = "holds", "does not hold", "not distinguishable", "not run"
PAPERS = {"rear": "reAR", "rar": "RAR"}
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
    match: str = (
        "scale"  # what compared rows share: "scale" = data, size and length of the run; "data" = the data alone
    )


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
    if claim.direction not in _DIRECTIONS or claim.source.partition("_")[0] not in known or claim.paper not in PAPERS:
        raise InputError(
            f"{path}: claims.{name} has claim={claim.direction}, from={claim.source}, paper={claim.paper}. Use one of "
            f"{', '.join(_DIRECTIONS)}; {', '.join(known)}; {', '.join(PAPERS)}"
        )
    return claim


def _selections(value: Any) -> tuple[Mapping[str, Any], ...]:
    return tuple(value) if isinstance(value, list) else (value,)


def find_tables(folders: Iterable[Path]) -> dict[str, list[Row]]:
    """The rows of all results in folders, by table. Each has `data_set`, `scale` and `size` beside its own columns.

    Raises InputError for a folder that does not exist.
    """
    tables: dict[str, list[Row]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"not found: {folder}. Name folders that hold runs, for instance runs/demo")
        for name in EXPERIMENTS:
            for record in sorted(folder.rglob(f"{name}.json")):
                _add_experiment(tables, name, record)
        for path in sorted(folder.rglob("result*.json")):
            # Other settings of sampling count only where the run's own ones were not evaluated.
            if path.name == "result.json" or not (path.parent / "result.json").exists():
                tables.setdefault(RESULTS, []).extend(_rows_of_result(path))
    # A checkpoint may have been analysed several times, beside others.
    return {name: _distinct(rows) for name, rows in tables.items()}


def _distinct(rows: Sequence[Row]) -> list[Row]:
    return list({json.dumps(row, sort_keys=True, default=str): row for row in rows}.values())


def _add_experiment(tables: dict[str, list[Row]], name: str, record: Path) -> None:
    """Adds the rows of the tables beside the record of an analysis."""
    try:
        checkpoints = json.loads(record.read_text())["checkpoints"]
        about = {(one["run"], one["seed"], one["step"]): one for one in checkpoints}
    except (ValueError, LookupError, TypeError):
        return  # a file of another program
    for path in sorted(record.parent.glob(f"{name}*.csv")):
        if path.stem == f"{name}_summary":
            continue
        for row in read_csv(path):
            one = about.get((row.get("run"), row.get("seed"), row.get("step")))
            if one is not None and "kind" in one:
                extra = {key: one[key] for key in ("data_set", "scale", "size")}
                tables.setdefault(path.stem, []).append({**row, "model": one["kind"], **extra})


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
            "steps": cfg.train.total_steps, "decode_depth": _part(cfg.objective.heads.decode_tap, cfg.model.depth),
            **_numbers(result),
        }
    ]  # fmt: skip


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
        groups = [here]
        if claim.match == "scale":
            sizes = sorted({(row["size"], row["scale"]) for row in here}, reverse=True)
            groups = [[row for row in here if row["scale"] == scale] for _, scale in sizes]
        # The largest model that has been run on both sides.
        verdicts = (_judge_group(claim, group) for group in groups)
        found += [next((one for one in verdicts if one is not None), None)]
    return [one for one in found if one is not None] or [Verdict(claim, NOT_RUN)]


def _judge_group(claim: Claim, rows: Sequence[Row]) -> Verdict | None:
    plus, minus = (
        [row for row in rows if any(_matches(row, one, rows) for one in side)] for side in (claim.plus, claim.minus)
    )
    if not plus or (claim.minus and not minus):
        return None
    measure = next((name for name in claim.measure if all(_is_number(row.get(name)) for row in (*plus, *minus))), None)
    if measure is None:
        return None
    first, second = _by_seed(plus, measure), _by_seed(minus, measure)
    if not claim.minus:
        interval = mean_interval([value - claim.at for value in first.values()])
    elif first.keys() == second.keys():  # each run on both sides: its own difference
        interval = _of_own_differences({run: first[run] - second[run] for run in first})
    else:
        interval = difference_interval(list(first.values()), list(second.values()))
    scales = dict.fromkeys(row["scale"] for row in (*plus, *minus))
    runs = list(dict.fromkeys(str(row["run"]) for row in (*plus, *minus)))
    return Verdict(claim, _verdict(claim, interval), rows[0]["data_set"], "; ".join(scales), measure, interval, runs)


def _of_own_differences(differences: Mapping[Any, float]) -> Interval:
    """The mean of the differences of runs. With two models, half of the difference between them: `plus` and `minus` then hold one
    half each of both models, with opposite signs."""
    models: dict[str, list[float]] = {}
    for run, value in differences.items():
        models.setdefault(run[0], []).append(value)
    if len(models) != 2:
        return mean_interval(list(differences.values()))
    one, other = models.values()
    return difference_interval([value / 2 for value in one], [-value / 2 for value in other])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _by_seed(rows: Sequence[Row], measure: str) -> dict[Any, float]:
    """The mean of a measure over the rows of each run."""
    runs: dict[Any, list[float]] = {}
    for row in rows:
        runs.setdefault((row["model"], row["run"], row["seed"], row["scale"]), []).append(row[measure])
    return {run: statistics.fmean(values) for run, values in runs.items()}


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
