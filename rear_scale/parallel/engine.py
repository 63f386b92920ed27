"""Checks that the package of a strategy's engine is installed."""

from __future__ import annotations

import importlib.util

from rear_scale.config import InputError
from rear_scale.parallel import facts
from rear_scale.parallel.facts import Facts
from rear_scale.places import how_to_install


def missing_package(row: Facts) -> str | None:
    """One sentence that names the package a strategy needs and the command that installs it; None where it is installed."""
    if row.needs is None or importlib.util.find_spec(row.needs) is not None:
        return None
    return (
        f"strategy={row.name} needs the package {row.needs}, which is not installed. "
        f"Install it: {how_to_install(row.needs)}"
    )


def check_installed(row: Facts) -> None:
    """Raises InputError when the package of a strategy's engine is not installed."""
    missing = missing_package(row)
    if missing is not None:
        others = facts.names(lambda other: other.needs is None)
        raise InputError(f"{missing}, or use one that needs torch alone: strategy={', '.join(others)}")
