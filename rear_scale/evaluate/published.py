"""Published results on ImageNet 256 x 256 with their sources, and the table that compares our scores with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rear_scale.evaluate.metrics import METRICS
from rear_scale.evaluate.metrics.frechet import SINGULAR
from rear_scale.evaluate.published_tables import printed, published_tables
from rear_scale.evaluate.reference import RESIZED
from rear_scale.evaluate.result import OF_SMALL_IMAGES, ImageScores
from rear_scale.text_table import aligned

ACCEPTED_FID_DIFFERENCE = 0.05
PUBLISHED_SAMPLES = 50_000
PUBLISHED_SIZE = (256, 256)  # height and width in pixels
# Words in a note of a reference -> the caveat in the table.
_MARKED = {SINGULAR: SINGULAR, RESIZED: "the reference has another size"}


@dataclass(frozen=True)
class PublishedRow:
    """A published result: scores of 50,000 samples by the ADM evaluation."""

    model: str
    fid: float
    inception_score: float | None
    precision: float | None
    recall: float | None
    source: str  # paper and table
    reference: str  # the reference set of the FID, as far as the source states it


# Name of a published model -> its place in configs/published.yaml.
_PLACES = {
    "rar_b": "rar_table4/rar_b",
    "rar_l": "rar_table4/rar_l",
    "rar_xl": "rar_table4/rar_xl",
    "rar_xxl": "rar_table4/rar_xxl",
    "rear_s": "rear_table1/rear_s",
    "rear_b": "rear_table1/rear_b",
    "rear_l": "rear_table1/rear_l",
    "alitok_b": "rear_table2/ar_alitok_b",
}


def _row(place: str) -> PublishedRow:
    row, table = printed(place), published_tables()[place.partition("/")[0]]
    assert row.fid is not None, place
    scores = (row.fid, row.inception_score, row.precision, row.recall)
    return PublishedRow(row.label, *scores, table.source, table.paper.reference)


ROWS = {name: _row(place) for name, place in _PLACES.items()}


@dataclass(frozen=True)
class TableRow:
    """One line of the table, with its cells by column title."""

    model: str
    cells: Mapping[str, str]
    samples: str
    against: str
    caveats: Sequence[str] = ()  # reasons why its numbers cannot be compared with published ones
    comparable: bool = False  # whether published rows may be shown beside it


def our_rows(name: str, scores: ImageScores, size: tuple[int, int] | None = None) -> list[TableRow]:
    """The table rows of our scores: one per reference, or one without a reference; then one per reference of a classifier, for
    comparison. Empty where no metric with a column was computed.

    size: height and width of the images; without it no row counts as comparable.
    """
    values = {metric: scores.values(metric) for metric in METRICS if metric.columns}
    values = {metric: parts for metric, parts in values.items() if parts}
    if not values:
        return []
    references = list(dict.fromkeys(other for parts in values.values() for other in parts if other is not None))
    rows = []
    without: list[str | None] = [None]
    for reference in references or without:
        cells: dict[str, str] = {}
        for metric, parts in values.items():
            own = parts.get(reference if metric.against_references else None, {})
            cells |= {column.title: _cell(column.read(own), column.digits) for column in metric.columns}
        caveats = _caveats(scores, reference, size)
        comparable = "inception" in scores.networks and size is not None and not caveats
        rows.append(TableRow(name, cells, f"{_count(scores):,}", reference or "-", caveats, comparable))
    return rows + _yardsticks(scores)


def _yardsticks(scores: ImageScores) -> list[TableRow]:
    """The references of a classifier as rows of the same columns, each against the others."""
    rows = []
    for name, own in (scores.classifier.references if scores.classifier is not None else {}).items():
        others = list(dict.fromkeys(other for parts in own.by_reference.values() for other in parts))
        for other in others:
            cells: dict[str, str] = {}
            for metric in METRICS:
                if metric.network in OF_SMALL_IMAGES:
                    found = own.by_reference.get(metric.name, {}).get(other) if metric.against_references else None
                    part = {metric.name: found} if metric.against_references else own.of_samples
                    cells |= {column.title: _cell(column.read(part), column.digits) for column in metric.columns}
            rows.append(TableRow(f"{name} images", cells, f"{own.count:,}", other))
    return rows


def _count(scores: ImageScores) -> int:
    """Images that were scored."""
    for network in scores.networks.values():
        return network.samples
    if scores.reconstruction is not None:
        return scores.reconstruction.images
    assert scores.classifier is not None
    return scores.classifier.samples.count


def _caveats(scores: ImageScores, reference: str | None, size: tuple[int, int] | None) -> list[str]:
    """The reasons why the numbers of a row cannot be compared with published ones."""
    found = []
    for name, network in scores.networks.items():
        columns = [column for metric in METRICS if metric.network == name for column in metric.columns]
        if not columns:
            continue
        if network.weights_are_published is False:
            found.append("weights are not the published ones")
        if any(column.published for column in columns):
            if network.samples < PUBLISHED_SAMPLES and scores.reconstruction is None:
                found.append(f"fewer than {PUBLISHED_SAMPLES:,} images")
            if size is not None and size != PUBLISHED_SIZE:
                found.append(f"images of {size[1]}x{size[0]}")
        notes = network.references.get(reference, {}).get("notes", []) if reference is not None else []
        found += [short for mark, short in _MARKED.items() if any(mark in note for note in notes)]
        if "warning" in network.of_samples.get("inception_score", {}):
            found.append("IS of splits that lack classes")
    return list(dict.fromkeys(found))


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def published_row(row: PublishedRow) -> TableRow:
    """The row of the table of scores for a published result."""
    values = asdict(row)
    cells = {
        column.title: _cell(values[column.published], column.published_digits)
        for metric in METRICS
        for column in metric.columns
        if column.published is not None
    }
    return TableRow(row.model, cells, f"{PUBLISHED_SAMPLES:,}", f"{row.reference} [{row.source}]")


def table(ours: Sequence[TableRow], published: Mapping[str, PublishedRow]) -> str:
    """The text of the table: our rows first, then the published rows, with caveats in the last column, if there are any."""
    rows = [*ours, *map(published_row, published.values())]
    titles = [column.title for metric in METRICS for column in metric.columns]
    titles = [title for title in titles if any(title in row.cells for row in rows)]
    lines = [["model", *titles, "samples", "against"]]
    lines += [[row.model, *(row.cells.get(title, "-") for title in titles), row.samples, row.against] for row in rows]
    if any(row.caveats for row in rows):
        lines[0].append("caveats")
        for line, row in zip(lines[1:], rows, strict=True):
            line.append("; ".join(row.caveats))
    return aligned(lines, left=(0, len(titles) + 2, len(titles) + 3))


def table_with_published(ours: Sequence[TableRow]) -> str:
    """The text of the table with all published rows, if one of our rows is comparable with them, else with a line that says
    why not."""
    if any(row.comparable for row in ours):
        return table(ours, ROWS)
    text = table(ours, {})
    if any("FID" in row.cells for row in ours):
        height, width = PUBLISHED_SIZE
        text += (
            f"\npublished rows are left out: they are of {PUBLISHED_SAMPLES:,} images of {width}x{height} by the published "
            "Inception weights"
        )
    return text


def token_table(scores: Mapping[str, Mapping[str, Mapping[str, Any]] | None]) -> str:
    """Correct token ratio and perplexity by checkpoint, set and context; empty where none was computed.

    scores: by name of the checkpoint, as analysis.token_prediction gives them.
    """
    lines = [["checkpoint", "tokens", "context", "correct ratio", "perplexity", "sequences"]]
    for name, found in scores.items():
        for key, values in (found or {}).items():
            held, _, context = key.rpartition("_")
            numbers = [f"{values['ctr']:.4f}", f"{values['perplexity']:.3f}", f"{values['sequences']:,}"]
            lines.append([name, f"data.{held}", context, *numbers])
    return aligned(lines, left=(0, 1, 2)) if len(lines) > 1 else ""
