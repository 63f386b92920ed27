"""Class ids, from a class map or from the order of class folders, and their comparison between two data sets."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rear_scale.config import InputError
from rear_scale.shards.walk import Listing, is_utf8, shown

NUM_IDS = 65_536
_NAMED = 12  # at most, in one message


def class_id(text: str) -> int | None:
    """The class id that a text holds, as in a cls member of a tar; None for any other text."""
    text = text.strip()
    return int(text) if re.fullmatch("[0-9]{1,5}", text) and int(text) < NUM_IDS else None


def read_class_map(path: str | Path) -> dict[str, int]:
    """The class ids by name in a file: a JSON object {name: id}, or lines in one of four forms, the same in the whole file.

    `name id`, with a description or without; `id name`, likewise; `name` alone, whose id is the position of its line (0
    for the first); `name description`, likewise. Raises InputError for a file that is missing, or that has a name twice, an
    id that is not a whole number below 65,536, lines of different forms, or numbers in both columns, either of which may be
    the id.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError:
        raise InputError(f"not found: the class map {path}. Set it to a JSON or text file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the class map {path} is not UTF-8 text ({error}). Save it as UTF-8") from error
    try:
        pairs = _json_pairs(text) if text.lstrip().startswith("{") else _line_pairs(text)
        ids = dict(pairs)
        if len(ids) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the name {twice} occurs twice")
        if not ids:
            raise ValueError("it has no class")
        if broken := [name for name in ids if not is_utf8(name)]:
            raise ValueError(f"{broken[0]} is not text")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"the class map {path} cannot be read ({shown(str(error))}). Use lines such as: n01440764 0, or a JSON object"
        ) from error
    return ids


def _json_pairs(text: str) -> list[tuple[str, int]]:
    pairs = json.loads(text, object_pairs_hook=list)
    for name, number in pairs:
        if type(number) is not int or not 0 <= number < NUM_IDS:
            raise ValueError(f"the id of {name} is {str(number)[:30]!r}, not a whole number in 0..{NUM_IDS - 1}")
    return pairs


def _line_pairs(text: str) -> list[tuple[str, int]]:
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    second = [words[1] if len(words) > 1 else "" for _, words in lines]
    ids_first = [bool(words[0].isdecimal()) for _, words in lines]
    if all(word.isdecimal() for word in second):
        pairs = [(words[0], _number(number, words[1])) for number, words in lines]
        other = [(words[1], words[0]) for _, words in lines]
        if all(ids_first) and other != [(name, str(number)) for name, number in pairs]:
            raise ValueError('both columns are numbers, so either may be the id; JSON says which: {"name": id}')
        return pairs
    for (number, _), word in zip(lines, second, strict=True):
        # "4x4" may be a description, but "-1", "1.5" and "2," are mistyped ids, which must not pass as descriptions.
        if word[:1].isdecimal() or re.match(r"[+-][0-9]", word):
            raise ValueError(f"line {number} has {word[:30]!r} after its name, but not all lines have an id there")
    if all(ids_first) and all(second):
        return [(words[1], _number(number, words[0])) for number, words in lines]
    if any(second) and any(ids_first) and not all(ids_first):
        number = lines[ids_first.index(True)][0]
        raise ValueError(f"line {number} begins with a number and others do not, so it may be an id or a name")
    if any(second) and all(ids_first):
        raise ValueError(
            f"line {lines[second.index('')][0]} is a number alone, but other lines have a name after theirs"
        )
    return [(words[0], position) for position, (_, words) in enumerate(lines)]


def _number(line: int, text: str) -> int:
    number = class_id(text)
    if number is None:
        raise ValueError(f"line {line} has the id {text[:30]}, not a whole number in 0..{NUM_IDS - 1}")
    return number


def names_by_id(ids: Mapping[str, int]) -> list[str]:
    """The class names by id, up to the largest id. Of several names with one id, the first in the map."""
    names = {number: name for name, number in reversed(list(ids.items()))}
    return [names.get(number, str(number)) for number in range(max(names) + 1)]


def folder_ids(listing: Listing, counts: Mapping[str, int], ids: Mapping[str, int] | None) -> dict[str, int]:
    """The class id of each class folder by name: its index among the sorted names, or its id in a class map.

    counts: the number of files of each folder. Raises InputError for a folder that the map lacks, for an empty folder without
    a map (another set of the same classes would number the others differently), and for a name that is not UTF-8.
    """
    folder, classes = listing.folder, listing.folders
    for name in classes:
        if shown(name) != name:
            raise InputError(
                f"{folder}: the class folder {shown(name)} has a name that is not UTF-8, but class names must be text. Rename it"
            )
    if ids is None:
        empty = [name for name in classes if not counts.get(name)]
        if empty and len(empty) < len(classes):
            left_out = listing.left_out.line()
            raise InputError(
                f"{folder}: {len(empty)} of {len(classes)} class folders hold no readable files, {empty[0]} among them"
                f"{f' ({left_out})' if left_out else ''}, but class ids are the indices of the folders. Remove the empty ones, "
                "or use a class map, which fixes the ids"
            )
        return {name: position for position, name in enumerate(classes)}
    if unknown := [name for name in classes if name not in ids]:
        raise InputError(
            f"{len(unknown)} of {len(classes)} folders of {folder} are not in the class map, {unknown[0]} among them. "
            "Add them, or move them away"
        )
    return dict(ids)


def id_notes(classes: Sequence[str], counts: Mapping[str, int], ids: Mapping[str, int], mapped: bool) -> list[str]:
    """Notes for the user on class ids: ids that differ from the folders' numbers, and mapped classes without images."""
    if mapped:
        without = [name for name in ids if not counts.get(name)]
        if not without:
            return []
        return [f"{len(without)} of {len(ids)} classes of the class map have no images, {without[0]} among them"]
    moved = [name for name in classes if name.isdecimal() and int(name[:9]) != ids[name]]
    if not moved:
        return []
    listed = ", ".join(f"folder {name} = id {ids[name]}" for name in moved[:_NAMED])
    more = f" and {len(moved) - _NAMED} more" if len(moved) > _NAMED else ""
    return [
        f"class folders are numbered in the order of their names as text: {listed}{more}. Use a class map for other ids"
    ]


def check_same_classes(one: str, names: Sequence[str], other: str, others: Sequence[str]) -> str | None:
    """Raises InputError, naming the first class, when two sets give one class id to different classes.

    one, other: what the sets are, for the message. Returns a note for the user where one set has names and the other only
    ids (because its source names no classes), which cannot be compared; else None.
    """
    plain, others_plain = (list(part) == [str(number) for number in range(len(part))] for part in (names, others))
    if plain and others_plain:
        return None
    if plain != others_plain and not all(name.isdecimal() for name in (others if plain else names)):
        named, bare = (other, one) if plain else (one, other)
        return (
            f"note: {named} names its classes, but {bare} has class ids alone: they are assumed to be the same classes"
        )
    if list(names) == list(others):
        return None
    pairs: list[tuple[Any, Any]] = [
        (names[number] if number < len(names) else None, others[number] if number < len(others) else None)
        for number in range(max(len(names), len(others)))
    ]
    number, (first, second) = next((number, pair) for number, pair in enumerate(pairs) if pair[0] != pair[1])
    said = [
        f"is {name} in {what}" if name is not None else f"does not exist in {what}"
        for name, what in ((first, one), (second, other))
    ]
    raise InputError(
        f"class {number} {said[0]} and {said[1]} ({len(names)} and {len(others)} classes), so their ids stand for different "
        "classes. Make both with one class map that lists all classes, in the same order"
    )
