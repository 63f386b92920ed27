"""Self-contained HTML pages: text, tables, charts and images in one file, without anything from elsewhere.

Every text that is shown is escaped by Jinja2. The page's own Content-Security-Policy names the one script that may run, by its
checksum, and forbids to load anything.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from rear_scale.files import write_text_atomically
from rear_scale.report import charts as geometry
from rear_scale.report.charts import Chart, Mark

_HERE = Path(__file__).parent
_MOST_MARKS = 400  # texts for the pointer


@dataclass(frozen=True)
class Picture:
    """An image file with its caption."""

    data: bytes
    caption: str
    form: str = "png"

    @property
    def uri(self) -> str:
        return f"data:image/{self.form};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    header: list[str]
    rows: list[list[str]]
    words: frozenset[int] = frozenset()  # columns besides the first that hold words and not numbers


@dataclass(frozen=True)
class Choice:
    """Several forms of the same charts, of which the reader sees one."""

    name: str
    options: list[tuple[str, list[Chart]]]


@dataclass(frozen=True)
class Section:
    """A part of the page under one heading."""

    title: str
    text: Sequence[str] = ()  # paragraphs
    table: Table | None = None
    tables: Sequence[tuple[str, Table]] = ()  # (title, table), after the others
    charts: Sequence[Chart] = ()
    choice: Choice | None = None
    pictures: Sequence[Picture] = ()
    rows_of_pictures: Sequence[tuple[str, Sequence[Picture | None]]] = ()  # title or "", and pictures beside each other
    code: str = ""
    folded: Sequence[tuple[str, str]] = ()  # (title, text) that is opened by a click
    notes: Sequence[str] = ()  # paragraphs below all the rest


@dataclass(frozen=True)
class Head:
    """What stands above all sections."""

    state: str = ""  # a word, shown as a badge; its style is that of the class of the same name
    lines: Sequence[str] = ()
    command: str = ""  # to be typed next
    facts: Sequence[tuple[str, str]] = ()  # (name, value)
    marks: Sequence[Mark] = ()  # of the charts over steps, for their texts under the pointer

    @property
    def mark_texts(self) -> list[tuple[float, str]]:
        return [(mark.x, mark.text) for mark in self.marks[:_MOST_MARKS]]


def write_page(path: Path, title: str, sections: Sequence[Section], head: Head | None = None) -> None:
    """Writes one HTML file that needs no other."""
    write_text_atomically(path, page_text(title, sections, head))


def page_text(title: str, sections: Sequence[Section], head: Head | None = None) -> str:
    """The HTML of a page."""
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values: dict[str, Any] = {"title": title, "sections": sections, "head": head or Head(), "geometry": geometry}
    html = _template().render(**values, checksum=checksum)
    # Put in last, as it stands: nothing of the page's contents can become part of it, and its checksum is that of the file.
    before, after = html.rsplit("<!--script-->", 1)
    # Half a surrogate pair, which JSON may hold, is no character that a file can.
    return f"{before}<script>{script}</script>{after}".encode("utf-8", "replace").decode()


@cache
def _template() -> Template:
    return Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html")
