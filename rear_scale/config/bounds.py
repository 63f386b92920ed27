"""Limits on config files, so that a damaged or hostile one ends in an error at once instead of exhausting the memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from rear_scale.config.errors import InputError

MOST_CHARACTERS = 1 << 20
MOST_VALUES = 200_000  # a config has some 150, and sample.labels may list an id per image
MOST_ALIASED = 1000  # values that aliases expand to in all; Hydra copies them many times
DEEPEST = 30  # levels of nesting; a config has 4
MOST_REFERENCES = 4096  # values that references (${KEY}) may expand to
MOST_DIGITS = 30  # of a whole number; the rules of single fields are narrower

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(text: str, source: str) -> None:
    """Raises InputError for a YAML text that is too long, too deep, or too large once its aliases are expanded.

    Takes time proportional to the length of the text, because no value is built. Invalid YAML passes: the reader reports the
    line of the error.
    """
    if len(text) > MOST_CHARACTERS:
        raise InputError(
            f"{source} has {len(text):,} characters, a config at most {MOST_CHARACTERS:,}. Is it a config?"
        )
    try:
        _check_events(yaml.parse(text, Loader=_LOADER), source)
    except yaml.YAMLError:
        return


def check_references(texts: Iterable[str], source: str) -> None:
    """Raises InputError where references (${KEY}), each to a text with several more, could multiply beyond bounds."""
    if math.prod(max(1, text.count("${")) for text in texts) > MOST_REFERENCES:
        raise InputError(f"{source}: too many values refer to several others (${{KEY}}). Write some of them out")


def _check_events(events: Iterator[yaml.Event], source: str) -> None:
    anchored: dict[str, tuple[int, int]] = {}  # by anchor: number of values, levels below it
    aliased = 0  # values that aliases expand to
    open_nodes: list[list[Any]] = []  # [anchor, values, levels] of each collection that is not closed

    def add(anchor: str | None, values: int, levels: int) -> None:
        if anchor is not None:
            anchored[anchor] = (values, levels)
        if open_nodes:
            open_nodes[-1][1] += values
            open_nodes[-1][2] = max(open_nodes[-1][2], levels + 1)
        if values > MOST_VALUES or (open_nodes and open_nodes[-1][1] > MOST_VALUES):
            raise InputError(f"{source} holds more than {MOST_VALUES:,} values. Is it a config?")
        if len(open_nodes) + levels > DEEPEST:
            raise InputError(f"{source} is nested more than {DEEPEST} levels deep. Is it a config?")

    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _, _ in open_nodes):
                raise InputError(
                    f"{source}: the alias *{event.anchor} is inside the value that it refers to. Write the value out"
                )
            assert event.anchor is not None, "an alias has a name"
            values, levels = anchored.get(event.anchor, (1, 0))
            aliased += values
            if aliased > MOST_ALIASED:
                raise InputError(
                    f"{source} holds more than {MOST_ALIASED:,} values once its aliases (*NAME) are expanded. Is it a config?"
                )
            add(None, values, levels)
        elif isinstance(event, yaml.ScalarEvent):
            add(event.anchor, 1, 0)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, 1, 0])
            if len(open_nodes) > DEEPEST:
                raise InputError(f"{source} is nested more than {DEEPEST} levels deep. Is it a config?")
        elif isinstance(event, yaml.CollectionEndEvent):
            add(*open_nodes.pop())
