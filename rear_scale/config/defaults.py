"""The files that a config may be composed of, found without composing it: the cache key of a composed config."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rear_scale.config.values import leaves

_MOST_FILES = 100

Texts = tuple[tuple[str, tuple[bytes | None, ...]], ...]


def texts_composed(folders: Iterable[Path], name: str, groups: Iterable[tuple[str, str]]) -> Texts | None:
    """The files that the config `name` may be composed of: each name with its texts in all folders, None where it is missing.

    folders: the search path. groups: (group, choice), as on the command line. Returns None where a defaults list has other
    forms than plain names, which only Hydra resolves.
    """
    texts: dict[str, tuple[bytes | None, ...]] = {}
    waiting = [name, *(f"{group}/{choice}" for group, choice in groups)]
    while waiting:
        name = waiting.pop()
        if name in texts:
            continue
        texts[name] = tuple(_text(folder / f"{name}.yaml") for folder in folders)
        for text in texts[name]:
            entries = () if text is None else _defaults(text)
            if entries is None or len(texts) > _MOST_FILES:
                return None
            # Names without a leading slash are relative to the folder of the file.
            parent = PurePosixPath(name).parent
            waiting += [one[1:] if one.startswith("/") else (parent / one).as_posix() for one in entries]
    return tuple(sorted(texts.items()))


def _text(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


@lru_cache(maxsize=1024)
def _defaults(text: bytes) -> tuple[str, ...] | None:
    """The entries of a file's defaults list as GROUP/NAME or NAME; None for entries of other forms and for invalid YAML."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError):
        return None
    entries = values.get("defaults", []) if isinstance(values, dict) else []
    if not isinstance(entries, list) or (isinstance(values, dict) and "hydra" in values):
        return None
    plain = [_plain(entry) for entry in entries]
    return None if None in plain else tuple(entry for entry in plain if entry and entry != "_self_")


@lru_cache(maxsize=1024)
def own_keys(text: str) -> frozenset[str]:
    """The dotted keys that a config file itself sets; empty for invalid YAML."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return frozenset()
    return frozenset(leaves(values)) if isinstance(values, dict) else frozenset()


def _plain(entry: Any) -> str | None:
    if isinstance(entry, str):
        name = entry
    elif isinstance(entry, dict) and len(entry) == 1:
        ((group, choice),) = entry.items()
        if not isinstance(group, str) or not isinstance(choice, str):
            return None
        name = f"{group.removeprefix('override ')}/{choice}"
    else:
        return None
    return None if set(name) & set(" @$:.") else name
