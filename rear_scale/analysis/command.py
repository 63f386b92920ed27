"""The command of launchers/analyze.py: one experiment on one or several checkpoints."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rear_scale import cli, config
from rear_scale.analysis import claims, throughput
from rear_scale.analysis.csv_tables import over_seeds, shown, write_csv
from rear_scale.analysis.experiment import Analysed, Experiment, Row, Subject
from rear_scale.analysis.groups import check_data, check_runs
from rear_scale.analysis.job import analyse
from rear_scale.analysis.kinds import scale_of, title_of
from rear_scale.analysis.table import EXPERIMENTS
from rear_scale.checkpoint.open import open_with_config
from rear_scale.config import InputError
from rear_scale.config.fields import suggest
from rear_scale.evaluate.networks import weight_fields
from rear_scale.files import atomic_open, write_text_atomically
from rear_scale.progress import say
from rear_scale.run.folder import provenance
from rear_scale.text_table import aligned
from rear_scale.world import World, discover, joined

# Path, title, paragraphs, and the header and the rows of a table.
WritePage = Callable[[Path, str, list[str], list[str], list[list[str]]], None]

_OVERRIDE = re.compile(r"[~+]?[a-z_]+(\.\w+)*=.*|~[a-z_]+(\.\w+)+", re.DOTALL)
_MOST_LINES = 40  # of a table in the terminal


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="PATH",
        help="runs or checkpoints of one model, one for each seed",
    )
    parser.add_argument(
        "--versus", nargs="+", default=[], metavar="PATH", help="those of another model, to compare with"
    )


@dataclass
class AnalyzeCommand:
    """A parsed command line."""

    experiment: str
    args: argparse.Namespace
    overrides: list[str]
    runs: list[Path]  # words that are neither the experiment nor overrides
    checkpoints: dict[str, list[str]] = field(default_factory=dict)  # by option


def parse(parser: argparse.ArgumentParser) -> AnalyzeCommand:
    """The parsed command line. Raises InputError for an unknown experiment."""
    args = parser.parse_intermixed_args()
    known = [*EXPERIMENTS, *OF_RESULTS]
    if args.experiment not in known:
        raise InputError(
            f"{args.experiment} is not an experiment{suggest(args.experiment, known) or '.'} Use one of {', '.join(known)}"
        )
    # An option with several values takes the overrides behind it too.
    words = [*args.checkpoint, *args.versus, *args.overrides]
    overrides = [word for word in words if _is_override(word)]
    for text in overrides:
        config.check_override(text)
    paths = {name: [word for word in getattr(args, name) if word not in overrides] for name in ("checkpoint", "versus")}
    runs = [Path(word) for word in args.overrides if word not in overrides]
    return AnalyzeCommand(args.experiment, args, overrides, runs, paths)


def _is_override(word: str) -> bool:
    return _OVERRIDE.fullmatch(word) is not None and not Path(word).exists()


# Analyses of results that are there, which need neither checkpoints nor ranks.
OF_RESULTS = {
    "throughput": "FID against sampling speed, beside published points",
    "claims": "the papers' claims and what the results say about them",
}


def analyze_results(command: AnalyzeCommand, write_page: WritePage) -> None:
    """Runs `throughput` or `claims` on the results in the folders of the command line; on rank 0 alone.

    write_page: writes an HTML page of a table (report/page.py). Raises InputError for checkpoints, and for missing folders.
    """
    if discover().rank != 0:
        return
    if command.checkpoints["checkpoint"] or command.checkpoints["versus"]:
        raise InputError(f"{command.experiment} reads results of runs. Name folders of runs without --checkpoint")
    folders = command.runs or [Path("runs")]
    out = output_folder(command.overrides, Path("runs"), command.experiment)
    if command.args.dry_run:
        print(f"{command.experiment}: {OF_RESULTS[command.experiment]}")
        for folder in folders:
            print(f"{folder} (exists)" if folder.is_dir() else f"not found: {folder}")
        print(f"output: {out}")
    elif command.experiment == "throughput":
        _throughput(folders, out)
    else:
        _claims(folders, out, write_page)


def _throughput(folders: Sequence[Path], out: Path) -> None:
    own, lines = throughput.own_rows(folders)
    rows = [*throughput.published_rows(), *own]
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "throughput.csv", rows)
    with atomic_open(out / "throughput.png") as file:
        file.write(throughput.figure(rows))
    columns = ["method", "type", "fid", "images", "images_per_s", "device"]
    print(aligned([columns, *([shown(row[name]) for name in columns] for row in rows)], left=(0, 1)))
    for line in lines:
        say(line)
    cli.end(out, f"{len(own)} of our runs beside {len(rows) - len(own)} published points")


def _claims(folders: Sequence[Path], out: Path, write_page: WritePage) -> None:
    tables = claims.find_tables(folders)
    known = claims.read_claims()
    verdicts = [verdict for claim in known for verdict in claims.judge(claim, tables.get(claim.source, []))]
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "claims.csv", claims.csv_rows(verdicts))
    command = cli.typed("analyze", "claims", *folders)
    write_text_atomically(out / "claims.md", claims.markdown(verdicts, command))
    write_page(
        out / "claims.html",
        "Claims of the papers",
        [command, claims.counts(verdicts)],
        claims.HEADER,
        claims.table(verdicts),
    )
    tested = [row for row, one in zip(claims.table(verdicts), verdicts, strict=True) if one.verdict != claims.NOT_RUN]
    columns = [
        claims.HEADER.index(name) for name in ("claim", "measured on", "seeds", "measure", "difference", "verdict")
    ]
    print(aligned([[row[at] for at in columns] for row in (claims.HEADER, *tested)], left=range(6)))
    cli.end(out / "claims.html", f"{len(known)} claims: {claims.counts(verdicts)}")


def analyze(command: AnalyzeCommand) -> None:
    """Runs an experiment, writes its tables and figures, and prints means. Raises InputError for missing or wrong inputs."""
    experiment = EXPERIMENTS[command.experiment]
    if not command.checkpoints["checkpoint"]:
        raise InputError(
            "--checkpoint is missing. Use --checkpoint RUN, for instance --checkpoint runs/demo/rear_seed0"
        )
    if command.runs:
        raise InputError(
            f"{command.runs[0]} is neither an override (section.field=value) nor behind --checkpoint or --versus. Put it there"
        )
    groups = [[_open(command, path) for path in command.checkpoints[name]] for name in ("checkpoint", "versus")]
    notes = check_runs([group for group in groups if group])
    subjects = _named(*groups)
    out = output_folder(command.overrides, subjects[0].checkpoint.run, experiment.name)
    first = cli.Command(subjects[0].cfg, command.args, discover())
    if command.args.dry_run:
        _show(first, experiment, subjects, out, notes)
        return
    notes += check_data([group for group in groups if group])
    with joined(first.ranks, same_for_any_world=True) as world:
        refusal = f"{out} is being written by another process. Wait for it, or write elsewhere with run.dir=FOLDER"
        world.on_main(lambda: out.mkdir(parents=True, exist_ok=True))
        with world.alone(out / ".lock", refusal):
            found = analyse(experiment, subjects, world, out)
            world.on_main(lambda: write_outputs(experiment, found, out, world, notes))


def _open(command: AnalyzeCommand, path: str) -> Subject:
    # run.dir is the folder of the analysis here, not that of the run.
    overrides = [text for text in command.overrides if not text.startswith("run.dir=")]
    checkpoint, cfg = open_with_config(Path(path), command.args.config, overrides)
    return Subject(config.with_home(cfg), checkpoint, title_of(cfg))


def _named(first: list[Subject], second: list[Subject]) -> list[Subject]:
    """The checkpoints with names of models: their kinds, or where both models are of one kind the names of their first runs."""
    groups = [group for group in (first, second) if group]
    kinds = [group[0].model for group in groups]
    runs = [group[0].cfg.run.name for group in groups]
    steps = [f"{run}, step {group[0].checkpoint.step}" for run, group in zip(runs, groups, strict=True)]
    options = [f"{kind} ({name})" for kind, name in zip(kinds, ("--checkpoint", "--versus"), strict=False)]
    titles = next(names for names in (kinds, runs, steps, options) if len(set(names)) == len(groups))
    return [replace(one, model=title) for title, group in zip(titles, groups, strict=True) for one in group]


def output_folder(overrides: Sequence[str], run: Path, name: str) -> Path:
    """run.dir where an override sets it, else RUN/analysis/NAME."""
    given = [text.partition("=")[2] for text in overrides if text.startswith("run.dir=")]
    return Path(given[-1]) if given else run / "analysis" / name


def _show(
    command: cli.Command, experiment: Experiment, subjects: Sequence[Subject], out: Path, notes: Sequence[str]
) -> None:
    """Prints the dry run: the experiment, its checkpoints, and which of its input files exist."""
    if command.ranks.rank != 0:
        return
    print(f"{experiment.name}: {experiment.source}")
    for subject in subjects:
        print(f"{subject.model}: {subject.checkpoint.path}, run.seed={subject.cfg.run.seed}")
    for note in notes:
        print(f"note: {note}")
    print(f"output: {out}")
    cli.show_paths(command, inputs=(*experiment.inputs, *_networks(experiment)), outputs=())


def _networks(experiment: Experiment) -> list[str]:
    """The fields of the weights of LPIPS, for an experiment that compares images."""
    wanted = ("evaluate.vgg_weights", "evaluate.lpips_weights")
    return [name for name in weight_fields() if name in wanted and "analyze.originals" in experiment.inputs]


def write_outputs(
    experiment: Experiment, found: Sequence[Analysed], out: Path, world: World, notes: Sequence[str] = ()
) -> None:
    """Writes tables, figures and the record of an experiment, and prints means over seeds. notes: on the checkpoints that were
    compared. Rank 0 only."""
    tables: dict[str, list[Row]] = {}
    for one in found:
        for suffix, rows in experiment.tables(one).items():
            tables.setdefault(suffix, []).extend(rows)
    means = over_seeds(tables[""], experiment.keys)
    for suffix, rows in {**tables, "summary": means}.items():
        write_csv(_file(out, experiment, suffix, "csv"), rows)
    pictures = experiment.figures(found)
    for suffix, png in pictures.items():
        with atomic_open(_file(out, experiment, suffix, "png")) as file:
            file.write(png)
    lines = [*experiment.lines(found), *(f"note: {note}" for note in notes)]
    write_text_atomically(
        out / f"{experiment.name}.json", json.dumps(_record(experiment, found, lines, world), indent=1) + "\n"
    )
    print(aligned(_text(means, experiment.keys), left=range(1 + len(experiment.keys))))
    for line in lines:
        print(line)
    files = [_file(out, experiment, suffix, "png").name for suffix in pictures]
    cli.end(out, f"{experiment.name}.csv, {', '.join(files)}")


def _file(out: Path, experiment: Experiment, suffix: str, ending: str) -> Path:
    return out / f"{experiment.name}{'_' if suffix else ''}{suffix}.{ending}"


def _record(experiment: Experiment, found: Sequence[Analysed], lines: list[str], world: World) -> dict[str, Any]:
    cfg = found[0].subject.cfg
    return {
        "experiment": experiment.name,
        "source": experiment.source,
        "checkpoints": [
            {
                **one.subject.about,
                "path": str(one.subject.checkpoint.path),
                "kind": title_of(one.subject.cfg),
                **scale_of(one.subject.cfg),
            }
            for one in found
        ],
        "analyze": config.to_dict(cfg)["analyze"],
        "notes": lines,
        "provenance": provenance(world),
    }


def _text(means: Sequence[Row], keys: Sequence[str]) -> list[list[str]]:
    """The table for the terminal: a line for each model and key with the means of all measures, and their intervals."""
    measures = list(dict.fromkeys(row["measure"] for row in means))
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in means:
        interval = "" if row["low"] is None else f" [{shown(row['low'])}, {shown(row['high'])}]"
        place = (row["model"], *(row[name] for name in keys))
        cells.setdefault(place, {})[row["measure"]] = f"{shown(row['mean'])}{interval}"
    lines = [["model", *keys, *measures]]
    lines += [[*map(shown, place), *(of.get(name, "-") for name in measures)] for place, of in cells.items()]
    more = len(lines) - _MOST_LINES
    return lines if more <= 0 else [*lines[:_MOST_LINES], [f"... {more} more in the summary"]]
