"""Published results on ImageNet 256 x 256, each with the table it stands in, and the table that sets ours beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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

_HEADER = ("model", "FID", "sFID", "IS", "precision", "recall", "samples", "against")


def our_rows(name: str, scores: Mapping[str, Any]) -> list[list[str]]:
    """One row per reference, of `images.inception` in a result. Precision and recall in ADM's arithmetic where taken."""
    rows = []
    for reference, found in scores["references"].items():
        rows.append(
            [
                name,
                _cell(found["fid"], 3),
                _cell(found["sfid"], 3),
                _cell(scores["inception_score"]["value"], 1),
                *(_cell(_as_adm(found[key]), 4) for key in ("precision", "recall")),
                f"{scores['samples']:,}",
                reference,
            ]
        )
    return rows


def _as_adm(values: Mapping[str, float] | None) -> float | None:
    return None if values is None else values.get("adm_fp16", next(iter(values.values()), None))


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def published_row(row: PublishedRow) -> list[str]:
    cells = (_cell(row.fid, 2), "-", _cell(row.inception_score, 1), _cell(row.precision, 2), _cell(row.recall, 2))
    return [row.model, *cells, "50,000", f"{row.reference} [{row.source}]"]


def table(ours: list[list[str]], published: Mapping[str, PublishedRow] = ROWS) -> str:
    """Ours first, the published rows below, columns aligned."""
    rows = [list(_HEADER), *ours, *(published_row(row) for row in published.values())]
    return aligned(rows, left=(0, len(_HEADER) - 1))
