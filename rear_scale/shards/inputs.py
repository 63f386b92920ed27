"""Records of what an output folder was made from, kept in its manifest; with other inputs the output is not finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from rear_scale.config import InputError

Inputs = dict[str, str | int | float | bool | None]  # by the name of the input as messages show it


def listing_hash(lines: Iterable[object]) -> str:
    """A short hash of a list, such as the files of a folder with their sizes and times."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def fingerprint(inputs: Inputs) -> str:
    """A hash of all inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def check_same_inputs(before: object, now: Inputs, out: Path, field: str) -> None:
    """Raises InputError, naming the differences, when a finished output was made from other inputs than those of this call.

    before: the inputs in its manifest, None in one of an earlier version. field: the option or key that names the output.
    """
    way_out = f"Remove {out}, or set another {field}"
    if not isinstance(before, Mapping):
        raise InputError(
            f"{field}={out} was made by a version that did not record its inputs, so they may differ. {way_out}"
        )
    changed = [
        f"{name} {str(before.get(name))[:200]} then, {now.get(name)} now"
        for name in sorted(map(str, before.keys() | now.keys()))
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise InputError(f"{field}={out} is finished, but was made from other inputs: {'; '.join(changed)}. {way_out}")
