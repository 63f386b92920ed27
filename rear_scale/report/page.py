"""Self-contained HTML pages: text, tables and images in one file."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rear_scale.files import write_text_atomically


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption."""

    png: bytes
    caption: str

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """A part of the page under one heading."""

    title: str
    text: list[str] = field(default_factory=list)  # paragraphs
    table: Table | None = None
    pictures: list[Picture] = field(default_factory=list)
    code: str = ""


def write_page(path: Path, title: str, sections: list[Section]) -> None:
    """Writes one HTML file that needs no other."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    write_text_atomically(path, environment.get_template("page.html").render(title=title, sections=sections))
