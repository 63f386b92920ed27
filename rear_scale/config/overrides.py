"""Overrides of the command line, `section.field=value`: the type of the field in the schema says how the value is read.

Text is taken as it was typed, whatever characters it has; lists, sections and names are taken apart at their commas;
numbers and true or false are read by Hydra's grammar.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from rear_scale import places
from rear_scale.config.errors import InputError
from rear_scale.config.fields import suggest
from rear_scale.config.other_names import our_name
from rear_scale.config.renamed import refusal_of_key
from rear_scale.config.schema import STRATEGY_KEY, ExperimentConfig
from rear_scale.parallel import facts

CONFIG_DIR = places.ROOT / "configs"
LONGEST_TEXT = 4096  # characters; no path is longer
_FORM = "the form is section.field=value"
_NULL = re.compile(r"null|Null|NULL|None")  # none is a text: a policy, a folder
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_SWEEP = re.compile(r"(?:choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
_RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:")
_NAME = re.compile(r"[^\s.:=\[\]{}$]+")  # of an entry such as evaluate.reference.NAME
_LONGEST_NUMBER = 400  # characters


hints = cache(get_type_hints)  # it reads the source's annotations anew each time


@dataclass(frozen=True)
class Override:
    """One setting of the command line."""

    key: str  # section.field, a section, or a group with a folder in configs/
    value: Any  # plain: text, number, truth value, None, list or dict; of a group the name of its file
    is_group: bool = False
    removes: bool = False  # ~section.field.NAME: the entry of that name goes


def check_override(text: str) -> Override:
    """The parsed override, after its key was looked up in the schema or among the groups. Raises InputError."""
    key, equals, value = text.partition("=")
    key = re.sub(r"^\+{1,2}", "", key)  # Hydra's marks for a key that is new: all keys are known here
    if key.startswith("~"):
        return _removal(text)
    if not equals or not key:
        raise InputError(
            f"override {shown(text)} has no {'value' if key else 'key'}: {_FORM}, without spaces around the ="
        )
    if key != key.strip():
        raise InputError(f"override {shown(text)}: {_FORM}, without spaces around the =")
    if key == "strategy" and value in facts.names() and not (CONFIG_DIR / key / f"{value}.yaml").is_file():
        return Override(STRATEGY_KEY, value)  # a registered strategy without a file of defaults
    if is_group(key):
        return Override(key, _choice(key, value), is_group=True)
    return Override(key, _read(value, field_type(key), key))


def _removal(text: str) -> Override:
    """~key: removes an entry of a field with named entries, empties such a field, and sets an optional field to null."""
    key = text.removeprefix("~")
    if "=" in key or key != key.strip() or not key:
        raise InputError(f"override {shown(text)}: what is removed has no value. The form is ~section.field.NAME")
    kind = field_type(key)
    section, _, _ = key.rpartition(".")
    if section and is_map(field_type(section)):
        return Override(key, None, removes=True)
    if is_map(kind):
        return Override(key, {})
    if strip_optional(kind) is not kind:
        return Override(key, None)
    raise InputError(
        f"override {shown(text)}: {key} takes {type_name(kind)} and is not removed. Leave it out for the value of the config, or "
        f"set another; {_FORM}"
    )


def is_map(kind: Any) -> bool:
    """Whether a type is that of a field with named entries, such as evaluate.reference."""
    return get_origin(strip_optional(kind)) is dict


def is_group(key: str) -> bool:
    """Whether a section has a folder of files in configs/ to choose from, as in strategy=ddp."""
    return key in hints(ExperimentConfig) and (CONFIG_DIR / key).is_dir()


def _choice(key: str, value: str) -> str:
    choices = sorted(path.stem for path in (CONFIG_DIR / key).glob("*.yaml"))
    if value in choices:
        return value
    if len(split(value, key)) > 1 or _SWEEP.fullmatch(value):
        raise _sweep(key, value)
    raise InputError(
        f"{key}={shown(value)} is not one of {', '.join(choices)}{suggest(value, choices)}. "
        f"Single fields are set by {key}.FIELD=VALUE"
    )


def _read(text: str, kind: Any, key: str) -> Any:
    """The value that a text stands for in a field of type `kind`; `key` is its name in errors.

    Values that no field of the type takes (a word for a number) come back as text: the schema's check names them. Raises
    InputError for what is empty, belongs to a sweep, or cannot be taken apart.
    """
    plain = strip_optional(kind)
    if kind is Any:
        return _read_any(text, key)
    if _NULL.fullmatch(text.strip()) and (plain is not kind or is_map(kind) or is_entry(key)):
        return None
    if not text.strip():
        raise InputError(f"{key}= is empty: it takes {type_name(kind)}. Leave it out for the value of the config")
    if plain is str:
        return _read_text(text, key)
    if get_origin(plain) is list:
        (element,) = get_args(plain)
        inner = _inner(text, "[]")
        return [
            _read(item, element, f"{key}[{i}]") for i, item in enumerate(split(text if inner is None else inner, key))
        ]
    if get_origin(plain) is dict or dataclasses.is_dataclass(plain):
        inner = _inner(text, "{}")
        # A path in place of named ones is a text; one in place of a section is refused by the schema's check.
        return _read_text(text, key) if inner is None else _read_entries(inner, plain, key)
    return _read_scalar(text, key)


def is_entry(key: str) -> bool:
    """Whether a key names an entry of a field with named entries."""
    section, _, _ = key.rpartition(".")
    return "[" not in key and section != "" and is_map(field_type(section))


def _read_any(text: str, key: str) -> Any:
    """A value whose type the schema leaves open (a setting of a term of the loss): null, a list, a number, or a text."""
    if _NULL.fullmatch(text.strip()):
        return None
    if not text.strip():
        raise InputError(f"{key}= is empty: it takes a value. Leave it out for the one of the config")
    if (inner := _inner(text, "[]")) is not None:
        return [_read_any(item, f"{key}[{i}]") for i, item in enumerate(split(inner, key))]
    found = _read_scalar(text, key)
    return _read_text(text, key) if isinstance(found, str) else found


def _read_entries(text: str, kind: Any, key: str) -> dict[str, Any]:
    """`name: value, name: value` of a section or of a field with named entries."""
    found = {}
    for entry in split(text, key):
        name, colon, value = entry.partition(":")
        name = _unquoted(name.strip())
        if not colon:
            raise InputError(f"{key}: {shown(entry)} has no value. The form is {key}={{name: value, name: value}}")
        inner = f"{key}.{name}"
        found[name] = _read(value.strip(), entry_type(kind, name, key), inner)
    return found


def _read_text(text: str, key: str) -> str:
    """Text as it was typed; quotes around all of it are dropped, as in Hydra's grammar."""
    if len(text) > LONGEST_TEXT:
        raise InputError(f"{key} is a text of {len(text)} characters. At most {LONGEST_TEXT} make a name or a path")
    if not text.isprintable():
        raise InputError(
            f"{key}={shown(text)} has control characters, or bytes that are not UTF-8. Rename the file, or link to it"
        )
    if text == "???":
        raise InputError(f"{key}=??? is the mark of a value that is not set. Write another text")
    if _SWEEP.fullmatch(text):
        raise InputError(f"{_sweep(key, text)}; as a text it is written {quoted(key, text)}")
    if resolver := _RESOLVER.search(text):
        raise InputError(
            f"{key}={text}: {resolver[1]} is not looked up on the command line, where the shell does that: "
            f'"{key}=...$NAME...". Keys of the config are, as in {key}=...${{run.name}}...'
        )
    return _unquoted(text)


def _unquoted(text: str) -> str:
    if _QUOTED.fullmatch(text):
        inner = text[1:-1]
        # Backslashes are only marks before a quote, as in Hydra's grammar.
        return re.sub(rf"(\\+)({text[0]}|$)", lambda found: "\\" * (len(found[1]) // 2) + found[2], inner)
    return text


def _read_scalar(text: str, key: str) -> Any:
    """A number or truth value as Hydra's grammar reads it; the text itself where that finds none."""
    if len(text) > _LONGEST_NUMBER:
        raise InputError(f"{key} is a number of {len(text)} characters. At most {_LONGEST_NUMBER} are read")
    if len(split(text, key)) > 1:
        raise _sweep(key, text)
    try:
        (override,) = OverridesParser.create().parse_overrides([f"x={text}"])
        if override.is_sweep_override():
            raise _sweep(key, text)
        value = override.value()
    except (HydraException, RecursionError):
        return text
    return value if isinstance(value, (bool, int, float)) else text


def split(text: str, key: str, separator: str = ",") -> list[str]:
    """The parts of a text between its commas, without those in brackets or quotes.

    Raises InputError for a part that is empty and for a quote that is not closed.
    """
    if not text.strip():
        return []
    parts, start, depth, quote = [], 0, 0, ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and text[place - 1] != "\\" else quote
        elif letter in "'\"" and (text[start:place].rstrip() or ":").endswith(":"):
            quote = letter  # one in the middle of a word is a letter of it
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == separator and depth <= 0:
            parts.append(text[start:place])
            start = place + 1
    parts = [part.strip() for part in [*parts, text[start:]]]
    if quote or not all(parts):
        fault = "a quote is not closed" if quote else "a value is missing between commas"
        raise InputError(f"{key}={shown(text)}: {fault}. Lists have the form {key}=[VALUE,VALUE]")
    return parts


def combinations(sweeps: Sequence[str], option: str) -> list[list[str]]:
    """Overrides of every combination of swept values (`section.field=VALUE,VALUE,...` each), the last field's changing first.

    option: what gave the sweeps, for errors. Raises InputError for a sweep of another form.
    """
    choices = []
    for text in sweeps:
        field, _, values = text.partition("=")
        if not field or not values:
            raise InputError(
                f"{option} {shown(text)}: the form is section.field=VALUE,VALUE,..., as in optim.lr=1e-4,2e-4"
            )
        choices.append([f"{field}={value}" for value in split(values, f"{option} {field}")])
    return [list(chosen) for chosen in itertools.product(*choices)]


def _inner(text: str, brackets: str) -> str | None:
    """What stands in the brackets around all of a text; None when there are none."""
    text = text.strip()
    return text[1:-1] if text.startswith(brackets[0]) and text.endswith(brackets[1]) and len(text) > 1 else None


def _sweep(key: str, value: str) -> InputError:
    return InputError(
        f"{key}={shown(value)} names several values: that is a sweep, which belongs to a study of several runs, and one run "
        f"takes one value. Start a run for each"
    )


def quoted(key: str, value: str) -> str:
    """The word of a shell that sets a field to a text which would mean something else without quotes."""
    return shlex.quote(f"{key}={in_quotes(value)}")


def in_quotes(text: str) -> str:
    """A text as the value of an override that means nothing but the text itself."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def shown(text: str) -> str:
    """A text as errors name it: on one line, and not longer than a line."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 300 else f"{text[:200]}... ({len(text)} characters)"


def field_type(key: str) -> Any:
    """The type of a field or section. Raises InputError when there is none of that name."""
    kind: Any = ExperimentConfig
    done: list[str] = []
    for part in key.split("."):
        kind = entry_type(strip_optional(kind), part, ".".join(done), key)
        done.append(part)
    return kind


def entry_type(kind: Any, name: str, section: str, key: str = "") -> Any:
    """The type of one field of a section, or of one entry of a field with named entries. Raises InputError.

    key: all of the key that it is a part of.
    """
    wrong = shown(f"{section}.{name}" if section else name)
    if get_origin(kind) is dict:
        if not _NAME.fullmatch(name) or not name.isprintable():
            raise InputError(f"{wrong}: a name has no spaces, dots, colons or brackets. Use {section}.NAME=VALUE")
        return get_args(kind)[1]
    if not dataclasses.is_dataclass(kind):
        section = shown(section)
        raise InputError(f"{wrong}: {section} is a single value and has no field {shown(name)}. Use {section}=VALUE")
    fields = hints(kind)
    if name not in fields:
        if refusal := refusal_of_key(wrong):
            raise InputError(refusal)
        known = [f"{section}.{one}" if section else one for one in fields]
        ours = our_name(key or wrong)
        meant = f"; did you mean {ours}?" if ours and ours != wrong else suggest(wrong, known)
        raise InputError(f"{wrong} is not a config key{meant}. Known here: {', '.join(known)}")
    return fields[name]


def strip_optional(kind: Any) -> Any:
    """The type of a field without its None."""
    options = [arg for arg in get_args(kind) if arg is not type(None)]
    return options[0] if type(None) in get_args(kind) and len(options) == 1 else kind


def type_name(kind: Any) -> str:
    """In words, the type of a field or of one element of a list field."""
    plain = strip_optional(kind)
    if get_origin(plain) is list:
        many = {int: "whole numbers", float: "numbers", str: "texts"}
        text = f"a list of {many[get_args(plain)[0]]}"
    else:
        words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        words[bool | str] = "true, false or auto"
        text = words.get(plain, "a section")
    return text if plain is kind else f"{text} or null"
