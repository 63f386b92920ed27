"""A published table beside what was run here, as Markdown and HTML.

    python launchers/study.py table rear_table4
    python launchers/study.py table table3 --results runs/study/table3_digits/study.csv --out runs/tables

The rows and numbers of the papers stand in configs/published.yaml; rows that were not run say so. Without --results, the
study.csv of the table's study is taken at each scale at which there is one, from runs/study/. Each row is compared with the
table's baseline over training seeds, and differences inside the noise are marked.
"""

from __future__ import annotations

import argparse
import csv
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rear_scale import cli
from rear_scale.config import InputError, load
from rear_scale.evaluate.published_tables import MEASURES, Printed, PublishedTable, differences, published_table
from rear_scale.files import write_text_atomically
from rear_scale.scaling.seed_noise import SeedNoise, difference, seed_noise
from rear_scale.scaling.study_grid import SEED

STUDIES = Path("runs/study")
RESULTS = "study.csv"
# Another training seed moves an FID by about as much: arXiv:2606.20536.
INCONCLUSIVE = 0.013
_INSIDE, _OUTSIDE, _UNKNOWN = "~", "*", "?"
_LEGEND = (
    f"`{_OUTSIDE}` differs from the baseline at the 5% level over training seeds, `{_INSIDE}` is inside their noise, "
    f"`{_UNKNOWN}` has one seed and cannot be judged."
)
_LEGEND_PUBLISHED = (
    f"`{_INSIDE}` beside a published FID: within {INCONCLUSIVE:.1%} of the baseline's, which another training seed can explain "
    "(arXiv:2606.20536); the papers print one seed."
)
# Columns of study.csv that hold scores, in the order in which tables show them; other distances stand between the last of
# _FIRST_SCORES and `commit`.
_FIRST_SCORES = ("loss", "loss_noisy", "ctr", "ctr_noisy", "perplexity", "perplexity_noisy")
_AFTER_SCORES = "commit"
_NOT_SHOWN = ("loss", "loss_noisy")  # the logarithms of the perplexities


def main(arguments: list[str]) -> None:
    """Runs the command with its arguments. Raises InputError for an unknown table and a file that holds no results of it."""
    args = _parser().parse_args(arguments)
    table = published_table(args.name)
    results = [read_results(path) for path in args.results] or found_results(table)
    text, page = as_markdown(table, results), as_html(table, results)
    print(text)
    for ending, content in (("md", text), ("html", page)):
        args.out.mkdir(parents=True, exist_ok=True)
        write_text_atomically(args.out / f"{table.key}.{ending}", f"{content}\n")
    cli.end(args.out / f"{table.key}.md")


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="study.py table",
        description=__doc__,
    )
    parser.add_argument("name", metavar="NAME", help="a table of configs/published.yaml, such as rear_table4")
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="FILE.csv", help="of studies that ran its rows"
    )
    parser.add_argument(
        "--out", type=Path, default=STUDIES / "tables", metavar="FOLDER", help="of NAME.md and NAME.html"
    )
    return parser


@dataclass(frozen=True)
class Results:
    """The study.csv of one study at one scale."""

    path: Path
    scale: str
    measures: Sequence[str]  # its columns with scores
    cells: Sequence[Mapping[str, str]]

    def of_row(self, name: str, row: Printed) -> list[Mapping[str, str]]:
        """The cells that trained a published row: those that hold its name or its config in a column of their settings."""
        names = {name}
        if row.config is not None:
            names |= {row.config, row.config.removesuffix(".yaml"), Path(row.config).stem}
        settings = [column for column in self.cells[0] if column not in (*self.measures, "run")] if self.cells else []
        return [cell for cell in self.cells if names & {cell[column] for column in settings}]


def read_results(path: Path) -> Results:
    """The results in a study.csv. Raises InputError when it is missing or has other columns."""
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file, restval="")
            columns, cells = list(reader.fieldnames or []), list(reader)
    except FileNotFoundError as error:
        raise InputError(
            f"not found: {path}, the results of a study. launchers/study.py --collect writes it"
        ) from error
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise InputError(
            f"{path} is no table of results ({error}). Make it again with launchers/study.py --collect"
        ) from error
    if "cell" not in columns or _AFTER_SCORES not in columns or _FIRST_SCORES[0] not in columns:
        raise InputError(
            f"{path} has not the columns cell, {_FIRST_SCORES[0]} and {_AFTER_SCORES} of a study's results. Make it with "
            "launchers/study.py --collect"
        )
    scores = columns[columns.index(_FIRST_SCORES[0]) : columns.index(_AFTER_SCORES)]
    measures = [name for name in scores if name not in _NOT_SHOWN]
    return Results(path, _scale(path), measures, cells)


def found_results(table: PublishedTable) -> list[Results]:
    """The results of the table's own study at every scale at which it was gathered, the full one first."""
    name = table.key.removeprefix("rear_")
    folders = [STUDIES / name, *sorted(STUDIES.glob(f"{name}_*"))]
    return [read_results(folder / RESULTS) for folder in folders if (folder / RESULTS).is_file()]


def _scale(path: Path) -> str:
    _, _, scale = path.parent.name.rpartition("_")
    return scale if scale in ("digits", "fashion") else "full"


@dataclass(frozen=True)
class Block:
    """One table of the page."""

    title: str
    rows: Sequence[Sequence[str]]  # the first is the header
    notes: Sequence[str]


def blocks(table: PublishedTable, results: Sequence[Results]) -> list[Block]:
    """The published numbers, with what was run at full scale beside them, and a block for each smaller scale."""
    found = [_published(table, results)]
    return found + [_run(table, one) for one in results]


def _published(table: PublishedTable, results: Sequence[Results]) -> Block:
    """All rows as printed, and where each was run."""
    rows, numbered = table.rows, list[str]()
    notes = [_LEGEND_PUBLISHED] if table.baseline is not None else []
    names = [name for name in MEASURES if any(name in row.measures() for row in rows.values())]
    about = [
        name
        for name in ("tokenizer", "epochs", "parameters", "steps")
        if any(getattr(row, name) for row in rows.values())
    ]
    compression = table.of_models and any(row.config for row in rows.values())
    header = ["row", *about, *(["BPP_16", "BPP_16 of our tokenizer"] if compression else [])]
    lines = [[*header, *(MEASURES[name][0] for name in names), "run here"]]
    for key, row in rows.items():
        remarks = [*([row.note] if row.note else []), *differences(row)]
        mark = ""
        if remarks:
            numbered.append(f"[{len(numbered) + 1}] {'; '.join(remarks)}")
            mark = f" [{len(numbered)}]"
        line = [f"{row.label}{mark}", *(str(getattr(row, name) or "-") for name in about)]
        if compression:
            own = None if row.config is None else bpp_16(row.config)
            line += ["-" if value is None else f"{value:.3f}" for value in (row.bpp_16, own)]
        line += [_printed(table, row, name) for name in names]
        scales = [one.scale for one in results if any(_done(cell, one) for cell in one.of_row(key, row))]
        lines.append([*line, ", ".join(scales) or ("not run" if row.config else "-")])
    title = f"{table.source}: {table.title}{f' ({table.note})' if table.note else ''}"
    return Block(title, lines, [*numbered, *notes, f"FID against {table.paper.reference}."])


def _printed(table: PublishedTable, row: Printed, name: str) -> str:
    value = row.measures().get(name)
    if value is None:
        return "-"
    text = f"{value:.{MEASURES[name][1]}f}"
    baseline = table.rows[table.baseline].fid if table.baseline is not None else None
    if name == "fid" and baseline is not None and row is not table.rows[table.baseline or ""]:
        return text + (f" {_INSIDE}" if abs(value / baseline - 1) < INCONCLUSIVE else "")
    return text


def _run(table: PublishedTable, results: Results) -> Block:
    """The scores of one scale: mean and standard deviation over training seeds, and the difference from the baseline."""
    measures = [name for name in results.measures if any(cell[name] for cell in results.cells)]
    baseline = table.baseline
    header = ["row", "seeds"]
    for name in measures:
        header += [name, "difference"] if baseline is not None else [name]
    lines, found = [header], {key: _noise(results, key, row, measures) for key, row in table.rows.items()}
    for key, row in table.rows.items():
        if row.config is None:
            continue
        noise, of_baseline = found[key], found[baseline] if baseline is not None else {}
        line = [row.label + (" (baseline)" if key == baseline else ""), _seeds(results, key, row)]
        for name in measures:
            line.append(_cell(noise.get(name)))
            if baseline is not None:
                line.append("" if key == baseline else _against(of_baseline.get(name), noise.get(name)))
        lines.append(line)
    notes = [_LEGEND] if baseline is not None else []
    notes.append(
        f"{_range(results, 'parameters')} parameters, {_range(results, 'images')} training images; {results.path}."
    )
    return Block(f"run here, scale: {results.scale}", lines, notes)


def _noise(results: Results, key: str, row: Printed, measures: Sequence[str]) -> dict[str, SeedNoise]:
    cells = [cell for cell in results.of_row(key, row) if cell.get("state", "done") == "done"]
    seeds = [cell[SEED] for cell in cells if cell.get(SEED)]
    if twice := next((seed for seed in seeds if seeds.count(seed) > 1), None):
        names = [cell["cell"] for cell in cells if cell.get(SEED) == twice]
        raise InputError(
            f"{results.path}: the cells {', '.join(names)} are all row {key} with {SEED}={twice}, so they are not training "
            "seeds. Gather the study without other words (launchers/study.py --collect)"
        )
    values = {name: [_number(cell[name]) for cell in cells] for name in measures}
    rows = {name: [[value] for value in of_cells if value is not None] for name, of_cells in values.items()}
    return {name: seed_noise(scores) for name, scores in rows.items() if scores}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _done(cell: Mapping[str, str], results: Results) -> bool:
    return cell.get("state", "done") == "done" and any(_number(cell[name]) is not None for name in results.measures)


def _seeds(results: Results, key: str, row: Printed) -> str:
    """The number of runs with scores; without any, the state of the row."""
    cells = results.of_row(key, row)
    done = sum(_done(cell, results) for cell in cells)
    states = sorted({cell.get("state") or "" for cell in cells} - {""})
    return str(done) if done else ", ".join(states) or "not run"


def _cell(noise: SeedNoise | None) -> str:
    if noise is None:
        return "-"
    spread = f" ± {math.sqrt(noise.seed_variance):.2g}" if noise.seed_variance is not None else ""
    return f"{noise.mean:.4g}{spread}"


def _against(baseline: SeedNoise | None, own: SeedNoise | None) -> str:
    if baseline is None or own is None:
        return "-"
    gap = difference(baseline, own)
    mark = _UNKNOWN if gap.low is None else _INSIDE if gap.verdict == "not distinguishable" else _OUTSIDE
    return f"{gap.value:+.3g} {mark}"


def _range(results: Results, column: str) -> str:
    values = [value for cell in results.cells if (value := _number(cell.get(column, ""))) is not None]
    if not values:
        return "unknown"
    low, high = min(values), max(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


@cache
def bpp_16(config: str) -> float:
    """16 x the bits per pixel of the codes of a config's tokenizer, with as many bits for a code as the codebook needs (reAR,
    Table 1)."""
    tokenizer = load(config).tokenizer
    return 16 * tokenizer.num_tokens * math.log2(tokenizer.codebook_size) / tokenizer.image_size**2


def as_markdown(table: PublishedTable, results: Sequence[Results]) -> str:
    """The page as Markdown. results: of studies that ran rows of the table; empty = nothing was run."""
    parts = []
    for block in blocks(table, results):
        header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in block.rows]
        lines = [header, ["---"] * len(header), *rows]
        parts.append(f"**{block.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
        parts += block.notes
    return "\n\n".join(parts)


def as_html(table: PublishedTable, results: Sequence[Results]) -> str:
    """The page as HTML without scripts or files of its own."""
    parts = []
    for block in blocks(table, results):
        header, *rows = [[html.escape(cell) for cell in row] for row in block.rows]
        lines = [
            "".join(f"<th>{cell}</th>" for cell in header),
            *("".join(f"<td>{cell}</td>" for cell in row) for row in rows),
        ]
        body = "\n".join(f"<tr>{line}</tr>" for line in lines)
        notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in block.notes)
        parts.append(f"<h2>{html.escape(block.title)}</h2>\n<table>\n{body}\n</table>\n{notes}")
    style = "body{font-family:sans-serif}td,th{padding:.2em .7em;text-align:left;border-bottom:1px solid #ccc}"
    head = f'<meta charset="utf-8"><title>{html.escape(table.source)}</title><style>{style}</style>'
    return f"<!DOCTYPE html><html><head>{head}</head><body>\n{''.join(parts)}</body></html>"
