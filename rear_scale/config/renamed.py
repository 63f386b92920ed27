"""Config keys and values that were renamed: the one table of their old and new names.

Files that an earlier version of the program wrote (a checkpoint's meta.json, the header of a weight file, the config.yaml of a
run folder) are read with the old names. On the command line and in a user's own YAML they are errors that name the new ones,
so that no config carries two names of one thing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

# Old key -> new key. Both are fields of the same section.
KEYS = {
    "data.lanes": "data.shuffle_streams",
    "data.max_skipped_share": "data.max_skipped_fraction",
    "pretokenize.max_bad_share": "pretokenize.max_bad_fraction",
    "optim.decay": "optim.decay_parameters",
    "sample.copies": "sample.also_write",
    "sample.quantiser": "sample.uint8_rounding",
    "evaluate.neighbour_modes": "evaluate.precision_recall_arithmetic",
    "evaluate.neighbour_reference_images": "evaluate.precision_recall_reference_images",
    "evaluate.extrapolate": "evaluate.fid_infinity",
}
# By today's key: old value -> new value.
VALUES = {
    "data.mode": {"resident": "mmap"},
    "objective.heads.encode_counts": {"unperturbed": "clean"},
    "sample.uint8_rounding": {"trunc255": "truncate", "round": "nearest"},
}


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the nested values of a saved config, with old keys and values replaced by the new ones.

    An old key beside its new one stays, for the check of keys to refuse.
    """
    renamed = copy.deepcopy(dict(values))
    _rename(renamed, KEYS)
    _replace(renamed, VALUES)
    # The one field whose values are keys.
    section, name = _section_of(renamed, "resume.allow")
    if isinstance(section.get(name), list):
        section[name] = [KEYS.get(one, one) if isinstance(one, str) else one for one in section[name]]
    return renamed


def with_todays_rounding(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of what a result or the settings beside samples say, with the rounding rule under `uint8_rounding`."""
    return upgraded({"sample": saved})["sample"]


def downgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the nested values of a config under the old names.

    For hashes of settings: renaming a field must not change the identity of what was made before.
    """
    renamed = copy.deepcopy(dict(values))
    _replace(renamed, {key: {new: old for old, new in changes.items()} for key, changes in VALUES.items()})
    _rename(renamed, {new: old for old, new in KEYS.items()})
    return renamed


def refusal_of_key(key: str) -> str | None:
    """The error for an old key that a user wrote, with the new key and its new values; None for any other key."""
    if key not in KEYS:
        return None
    new = KEYS[key]
    changed = "".join(f"; its value {old} is {value} now" for old, value in VALUES.get(new, {}).items())
    return f"{key} was renamed to {new}{changed}. Set {new} instead"


def refusal_of_value(key: str, value: Any) -> str | None:
    """The error for an old value that a user wrote, with the new one; None for any other value."""
    changes = VALUES.get(key, {})
    if not isinstance(value, str) or value not in changes:
        return None
    return f"{key}={value} was renamed. Set {key}={changes[value]} instead"


def _rename(values: dict[str, Any], keys: Mapping[str, str]) -> None:
    for before, after in keys.items():
        section, name = _section_of(values, before)
        new_name = after.rpartition(".")[2]
        if name in section and new_name not in section:
            section[new_name] = section.pop(name)


def _replace(values: dict[str, Any], changes: Mapping[str, Mapping[str, str]]) -> None:
    for key, by_value in changes.items():
        section, name = _section_of(values, key)
        if isinstance(section.get(name), str):
            section[name] = by_value.get(section[name], section[name])


def _section_of(values: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The section of a dotted key, and the key's last name. An empty section where a file has none, or something else there."""
    *sections, name = key.split(".")
    section: Any = values
    for part in sections:
        section = section.get(part) if isinstance(section, dict) else None
    return (section if isinstance(section, dict) else {}), name
