"""Declarations of config fields: the meaning of a field, its choices or bounds, and whether a resumed run may change it.

    depth: int = number(24, "transformer blocks", above=0, most=1024)
    kernel: str = choice("auto", "attention kernel", among=("auto", "flash", "sdpa"), may_change=True)

The reference of all fields (configs/README.md), the checks of single fields, the fields that a resumed run may change and
the fields that the weights determine are derived from the declarations. Rules between fields are in validate.py.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypedDict, TypeVar, Unpack, get_args, get_type_hints, overload

from rear_scale.config.errors import InputError
from rear_scale.config.renamed import refusal_of_value

_KEY = "rear_scale"  # of dataclass metadata
_LARGEST_SEED = 2**63 - 1

# Names; names with their meanings; or a function that returns either, for choices declared by a module that is not imported
# here.
Choices = Iterable[Any] | dict[str, str] | Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Rule:
    """A condition on the value of one field.

    The error of a value that breaks it reads NAME=VALUE `says`. `way_out`; configs/README.md shows `short`.
    """

    holds: Callable[[Any], bool]
    says: str
    way_out: str  # {name} stands for the field's name
    short: str


@dataclass(frozen=True)
class Declaration:
    """Metadata of a field or section. may_change, by_weights: None = inherited from the section around it."""

    doc: str
    rules: tuple[Rule, ...] = ()
    among: Choices | None = None
    each: bool = False  # whether the choices apply to each entry of a list
    may_change: bool | None = None  # whether a resumed run may have another value without resume.allow
    by_weights: bool | None = None  # whether the weights of a checkpoint determine the value
    reads: bool = False  # whether it names files or folders that are read

    @property
    def choices(self) -> dict[Any, str]:
        """The allowed values of a field of choices, each with its meaning or ""."""
        among = self.among() if callable(self.among) else self.among
        return dict(among) if isinstance(among, dict) else dict.fromkeys(among or (), "")

    def check(self, name: str, value: Any) -> None:
        """Raises InputError for a value, not None, that is no allowed choice or breaks a rule. name: the field's, for errors."""
        if self.among is not None:
            for one in value if self.each else [value]:
                _check_choice(name, one, list(self.choices))
        for rule in self.rules:
            if not rule.holds(value):
                raise InputError(f"{name}={value} {rule.says}. {rule.way_out.format(name=name)}")


class Traits(TypedDict, total=False):
    """What a declaration of any kind may say beside its own arguments; meanings as in Declaration."""

    may_change: bool
    by_weights: bool
    reads: bool


# The functions below are used as dataclasses.field is: what they return is no value of the field, but typed as its default,
# so that type checkers compare it with the field's annotation.
_Value = TypeVar("_Value")
_Number = TypeVar("_Number", bound=float | None)


def setting(default: _Value, doc: str, *, rules: tuple[Rule, ...] = (), **traits: Unpack[Traits]) -> _Value:
    """A field without a kind of its own."""
    return _field(default, Declaration(doc, rules, **traits))


def path(default: str | None, doc: str, **traits: Unpack[Traits]) -> Any:
    """A file or folder. A resumed run may have another path, because the location of a file changes no result."""
    traits.setdefault("may_change", True)
    traits.setdefault("reads", True)
    return _field(default, Declaration(doc, **traits))


def choice(default: _Value, doc: str, *, among: Choices, **traits: Unpack[Traits]) -> _Value:
    """A field with a fixed set of values."""
    return _field(default, Declaration(doc, among=among, **traits))


def choices(default: list[str], doc: str, *, among: Choices, **traits: Unpack[Traits]) -> list[str]:
    """A list of one or more values out of a fixed set."""
    way_out = f"Use [{','.join(default)}]"
    return _field(default, Declaration(doc, (Rule(bool, "is empty", way_out, "one or more"),), among, True, **traits))


def number(
    default: _Number,
    doc: str,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    says: str | None = None,
    way_out: str | None = None,
    too_large: str | None = None,
    rules: tuple[Rule, ...] = (),
    **traits: Unpack[Traits],
) -> _Number:
    """A finite number within bounds: above and below are exclusive, least and most inclusive.

    says, way_out: the two parts of the error of a value out of bounds; too_large: the whole error of a value above `most`,
    for a `most` of more than 1.
    """
    if most is not None and most > 1:
        rule, _, smaller = (too_large or f"is above {most:,}. Use a smaller one").partition(". ")
        rules += (Rule(_at_most(most), rule, smaller, f"≤ {most:,}"),)
        most = None
    if (above, least, below, most) != (None,) * 4:
        rule, short, usual = _in_words(above, least, below, most)
        rules = (Rule(_inside(above, least, below, most), says or rule, way_out or usual, short), *rules)
    return _field(default, Declaration(doc, rules, **traits))


def fraction(default: float, doc: str, **traits: Unpack[Traits]) -> float:
    """A number from 0 to 1."""
    return number(default, doc, least=0, most=1, **traits)


def seed(default: int, doc: str, **traits: Unpack[Traits]) -> int:
    """A seed of random numbers, at most 63 bits: generators use 64 bits of it, so a larger number would repeat a smaller one."""
    says, short = "must lie between 0 and 2^63 - 1", "0 .. 2^63 - 1"
    rule = Rule(lambda value: 0 <= value <= _LARGEST_SEED, says, "Set {name}=0", short)
    return _field(default, Declaration(doc, (rule,), **traits))


def time_of_run(default: float, doc: str, **traits: Unpack[Traits]) -> float:
    """A time in a run: up to 1 a fraction of its length, above 1 a step."""
    rule = Rule(
        lambda value: 0 <= value < math.inf and (value <= 1 or value == int(value)),
        "is neither a fraction of the run (0 to 1) nor a whole number of steps",
        "Use 0.75 for three quarters of the run, or 187500 for a step",
        "0 .. 1, or steps",
    )
    return _field(default, Declaration(doc, (rule,), **traits))


@overload
def section(config_class: type[_Value], doc: str = "", **traits: Unpack[Traits]) -> _Value: ...
@overload
def section(config_class: None, doc: str = "", **traits: Unpack[Traits]) -> None: ...
def section(config_class: type | None, doc: str = "", **traits: Unpack[Traits]) -> Any:
    """A section of the config; config_class=None for one that may be absent.

    may_change and by_weights are inherited by its fields that do not set them.
    """
    metadata = {_KEY: Declaration(doc, **traits)}
    if config_class is None:
        return dataclasses.field(default=None, metadata=metadata)
    return dataclasses.field(default_factory=config_class, metadata=metadata)


def _field(default: Any, declaration: Declaration) -> Any:
    metadata = {_KEY: declaration}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _at_most(most: float) -> Callable[[float], bool]:
    return lambda value: not value > most


def _inside(
    above: float | None, least: float | None, below: float | None, most: float | None
) -> Callable[[float], bool]:
    def inside(value: float) -> bool:
        return (
            (value > above if above is not None else value >= (-math.inf if least is None else least))
            and (value <= most if most is not None else value < (math.inf if below is None else below))
        )  # fmt: skip

    return inside


def _in_words(
    above: float | None, least: float | None, below: float | None, most: float | None
) -> tuple[str, str, str]:
    """The bounds in words: the rule for an error, the short form for the reference, and the way out for an error."""
    lower = least if above is None else above
    if (least, most) == (0, 1):
        return "must lie between 0 and 1", "0 .. 1", "Set {name} to a fraction such as 0.1"
    if below is not None or most is not None:
        interval = f"{'[' if above is None else '('}{lower:g}, {f'{most:g}]' if below is None else f'{below:g})'}"
        return f"must lie in {interval}", interval, "Set {name} to a number in it"
    if above == 0:
        return "must be above 0", "> 0", "Set {name} to a positive number"
    if least == 0:
        return "must not be negative", "≥ 0", "Set {name} to 0 or more"
    return f"must be at least {lower:g}", f"≥ {lower:g}", f"Use at least {lower:g}"


def suggest(wrong: str, known: list[str]) -> str:
    """The text "; did you mean X?" where one of the known words is close, else an empty text."""
    by_lower = {word.lower(): word for word in known}
    close = difflib.get_close_matches(wrong.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def _check_choice(name: str, value: Any, known: list[Any]) -> None:
    if value in known:
        return
    if refusal := refusal_of_value(name, value):
        raise InputError(refusal)
    names = ["true" if one is True else "false" if one is False else str(one) for one in known]
    way_out = f"Use one of them{suggest(str(value), names)}"
    if all(part in names for part in str(value).split(",")):
        way_out = "One run takes one value: start a run for each of a sweep"
    raise InputError(f"{name}={value} is not one of {', '.join(names)}. {way_out}")


@cache
def declarations(config_class: type) -> dict[str, Declaration]:
    """The declaration of each field and section of a config's dataclass by dotted name, sections before their fields.

    may_change and by_weights are True or False.
    """
    return dict(_declared(config_class, "", Declaration("", may_change=False, by_weights=False)))


def _declared(config_class: type, prefix: str, around: Declaration) -> Iterator[tuple[str, Declaration]]:
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        own: Declaration = field.metadata[_KEY]
        inherited = {name: getattr(around, name) for name in ("may_change", "by_weights") if getattr(own, name) is None}
        own = dataclasses.replace(own, **inherited)
        yield prefix + field.name, own
        for inner in (hints[field.name], *get_args(hints[field.name])):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                yield from _declared(inner, f"{prefix}{field.name}.", own)


def declaration(config_class: type, name: str) -> Declaration | None:
    """The declaration of a field or section by dotted name.

    For an unknown name (an entry of a field with named entries, a field of another version), the declaration of the section
    or field around it; None where that is unknown too.
    """
    known = declarations(config_class)
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return known.get(name)


def check_fields(cfg: Any) -> None:
    """Raises InputError for the first field of a config whose value breaks the rule of its own declaration."""
    config_class: type = type(cfg)
    for name, own in declarations(config_class).items():
        if own.among is None and not own.rules:
            continue
        value = cfg
        for part in name.split("."):
            value = getattr(value, part, None)  # the fields of a section that is None are None
        if value is not None:
            own.check(name, value)
