"""Locations of the project's own files, in a checkout and in an installed copy, and the commands that a user types there."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# configs/, launchers/ and data/ lie beside the package in a checkout, and inside of it in a wheel (package-dir in
# pyproject.toml).
IN_CHECKOUT = not (PACKAGE / "configs").is_dir()
ROOT = PACKAGE.parent if IN_CHECKOUT else PACKAGE


def commands() -> dict[str, Path]:
    """The scripts that `python -m rear_scale NAME` runs, by name: launchers/*.py, then data/*.py."""
    return {path.stem: path for folder in ("launchers", "data") for path in sorted((ROOT / folder).glob("*.py"))}


def as_typed(text: str) -> str:
    """The text with scripts named as they are started here: in an installed copy, where no launchers/train.py is in reach,
    as `-m rear_scale train`."""
    if IN_CHECKOUT:
        return text
    script = r"(?:launchers|data)/(\w+)\.py"  # a user's own path with these words at its end stays as it is
    text = re.sub(rf"(\bdeepspeed\b[^\n]*?) {script}", r"\1 --module rear_scale \2", text)
    text = re.sub(rf"(\b(?:python|torchrun)\b[^\n]*?) {script}", r"\1 -m rear_scale \2", text)
    return re.sub(r"(?<![\w/.-])(?:bash )?(?:launchers|data)/(\w+)\.(?:py|sh)", r"python -m rear_scale \1", text)


def how_to_install(package: str) -> str:
    """The command that installs a package, in the versions that pyproject.toml allows where it names the package."""
    try:
        wanted = requires("rear_scale") or []
    except PackageNotFoundError:
        wanted = []
    ranges = [text.partition(";")[0].strip() for text in wanted if re.match(rf"{re.escape(package)}(?![\w-])", text)]
    command = f"pip install '{(ranges or [package])[0]}'"
    # DeepSpeed is published as source. Its build imports torch, which an isolated build would not find, and compiles
    # kernels unless it is told not to.
    return f"DS_BUILD_OPS=0 {command} --no-build-isolation" if package == "deepspeed" else command
