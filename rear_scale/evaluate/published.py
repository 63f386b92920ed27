"""Published results on ImageNet 256 x 256, each with the table it stands in, and the table that sets ours beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rear_scale.evaluate.metrics import METRICS
from rear_scale.evaluate.result import ImageScores
from rear_scale.text_table import aligned

ACCEPTED_FID_DIFFERENCE = 0.05


@dataclass(frozen=True)
class PublishedRow:
    """50,000 samples, scored by the ADM evaluation."""

    model: str
    fid: float
    inception_score: float | None
    precision: float | None
    recall: float | None
    source: str  # paper and table
    reference: str  # what the FID is against, as far as the source says


_RAR = "RAR, Yu et al. 2024, Table 4"
_REAR = "reAR, He et al., Table 1"
_REAR_TOKENIZERS = "reAR, He et al., Table 2"
_ADM = "ADM's VIRTUAL_imagenet256_labeled.npz"
# The paper's appendix A and its released instructions differ.
_VAL = "ImageNet validation images (appendix A) or ADM's npz (released instructions)"

ROWS = {
    "rar_b": PublishedRow("RAR-B", 1.95, 290.5, 0.82, 0.58, _RAR, _ADM),
    "rar_l": PublishedRow("RAR-L", 1.70, 299.5, 0.81, 0.60, _RAR, _ADM),
    "rar_xl": PublishedRow("RAR-XL", 1.50, 306.9, 0.80, 0.62, _RAR, _ADM),
    "rar_xxl": PublishedRow("RAR-XXL", 1.48, 326.0, 0.80, 0.63, _RAR, _ADM),
    "rear_s": PublishedRow("reAR-S", 2.00, 295.7, None, None, _REAR, _VAL),
    "rear_b": PublishedRow("reAR-B", 1.91, 300.9, None, None, _REAR, _VAL),
    "rear_l": PublishedRow("reAR-L (cfg 10.0)", 1.86, 316.9, None, None, _REAR, _VAL),
    "alitok_b": PublishedRow("AR-AliTok-B", 1.50, None, None, None, _REAR_TOKENIZERS, _VAL),
}


@dataclass(frozen=True)
class TableRow:
    """One line of the table; its cells by the title of their column."""

    model: str
    cells: Mapping[str, str]
    samples: str
    against: str


def our_rows(name: str, scores: ImageScores) -> list[TableRow]:
    """One row per reference; none where no metric with a column was computed."""
    metrics = [metric for metric in METRICS if metric.columns and metric.network in scores.networks]
    networks = [scores.networks[metric.network] for metric in metrics]
    references = dict.fromkeys(reference for network in networks for reference in network.references)
    rows = []
    for reference in references:
        cells = {}
        for metric in metrics:
            values = scores.values(metric).get(reference if metric.against_references else None, {})
            cells |= {column.title: _cell(column.read(values), column.digits) for column in metric.columns}
        rows.append(TableRow(name, cells, f"{networks[0].samples:,}", reference))
    return rows


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def published_row(row: PublishedRow) -> TableRow:
    values = asdict(row)
    cells = {
        column.title: _cell(values[column.published], column.published_digits)
        for metric in METRICS
        for column in metric.columns
        if column.published is not None
    }
    return TableRow(row.model, cells, "50,000", f"{row.reference} [{row.source}]")


def table(ours: list[TableRow], published: Mapping[str, PublishedRow] = ROWS) -> str:
    """Ours first, the published rows below, columns aligned."""
    rows = [*ours, *map(published_row, published.values())]
    titles = [column.title for metric in METRICS for column in metric.columns]
    titles = [title for title in titles if any(title in row.cells for row in rows)]
    lines = [["model", *titles, "samples", "against"]]
    lines += [[row.model, *(row.cells.get(title, "-") for title in titles), row.samples, row.against] for row in rows]
    return aligned(lines, left=(0, len(titles) + 2))
