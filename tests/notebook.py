"""Executes docs/quickstart.ipynb as a reader would, with another run in its one variable."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
from helpers import ROOT, environment
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs/quickstart.ipynb"
_RUN = re.compile(r'^RUN = "[^"]*"', re.MULTILINE)


def execute(run: Path, folder: Path) -> dict[str, str]:
    """The printed text of each code cell, by the first word of its heading, of the notebook executed in a folder on a run.

    Raises CellExecutionError for the first cell that fails.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = _RUN.sub(f'RUN = "{run}"', cell.source)
    places = {name: str(folder / name.lower()) for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR")}
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment(PYTHONPATH=str(ROOT), PATH=os.environ["PATH"], **places))
    return {heading: _printed(cell) for heading, cell in _with_headings(notebook)}


def _with_headings(notebook: nbformat.NotebookNode) -> list[tuple[str, nbformat.NotebookNode]]:
    heading, cells = "", []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cells.append((heading, cell))
        else:
            heading = re.findall(r"^#+ (\w+)", cell.source, re.MULTILINE)[-1]
    return cells


def _printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")
