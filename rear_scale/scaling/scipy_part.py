"""Parts of scipy, which only studies need."""

from __future__ import annotations

import importlib
from types import ModuleType

from rear_scale.config import InputError
from rear_scale.places import how_to_install


def scipy_part(name: str) -> ModuleType:
    """The module scipy.NAME. Raises InputError, with the way to install it, where scipy is missing."""
    try:
        return importlib.import_module(f"scipy.{name}")
    except ImportError as error:
        raise InputError(
            f"fits and intervals of studies need the package scipy, which is not installed. Install it: {how_to_install('scipy')}"
        ) from error
