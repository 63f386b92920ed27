"""Access to the plain implementations of tests/reference, with which benchmarks and tests compare."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from rear_scale.config import InputError
from rear_scale.places import ROOT

_FOLDER = ROOT / "tests" / "reference"


def check_there() -> None:
    """Raises InputError outside a checkout, before anything is written or measured."""
    if not _FOLDER.is_dir():
        raise InputError(f"not found: {_FOLDER}, which the bench compares with. Run it from a checkout of the project")


def load(name: str) -> ModuleType:
    """The module tests/reference/NAME.py. Raises InputError outside a checkout, where it does not exist."""
    path = _FOLDER / f"{name}.py"
    if not path.is_file():
        raise InputError(f"not found: {path}, which the benchmark compares with. Run it in a checkout of the project")
    spec = importlib.util.spec_from_file_location(f"reference_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
