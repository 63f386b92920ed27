"""What an output is made from, kept in its manifest: it counts as finished only while that is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from rear_scale.config import InputError

Inputs = dict[str, str | int | float | bool | None]  # by what it is, in words for the user


def listing_hash(lines: Iterable[object]) -> str:
    """A short hash of a list, such as that of files with their sizes and times."""
    found = hashlib.sha256()
    for line in lines:
        found.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:16]


def fingerprint(inputs: Inputs) -> str:
    """A hash of all inputs, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def check_same_inputs(before: object, now: Inputs, out: Path, field: str) -> None:
    """Raises InputError, naming what differs, when a finished output was made from something else than asked for now.

    before: what its manifest says; that of an earlier version says nothing. field: what names the output.
    """
    way_out = f"Remove {out}, or set another {field}"
    if not isinstance(before, Mapping):
        raise InputError(f"{field}={out} was made before its inputs were recorded: they may be others now. {way_out}")
    changed = [
        f"{name} {str(before.get(name))[:200]} then, {now.get(name)} now"
        for name in sorted(map(str, before.keys() | now.keys()))
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise InputError(f"{field}={out} is finished, but of other inputs: {'; '.join(changed)}. {way_out}")
