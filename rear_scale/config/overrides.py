"""Parsing of command-line overrides, `section.field=value`, by the type of the field in the schema.

Text is taken as typed, whatever characters it contains; lists, sections and named entries are split at commas; numbers and
booleans are parsed by Hydra's grammar.
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


hints = cache(get_type_hints)  # cached: it evaluates all annotations each time


@dataclass(frozen=True)
class Override:
    """One parsed setting of the command line."""

    key: str  # section.field, a section, or a group with a folder in configs/
    value: Any  # text, number, boolean, None, list or dict; for a group, the name of the chosen file
    is_group: bool = False
    removes: bool = False  # ~section.field.NAME: the entry of that name goes


def check_override(text: str) -> Override:
    """The parsed override, whose key is in the schema or a group. Raises InputError for any other text."""
    key, equals, value = text.partition("=")
    key = re.sub(r"^\+{1,2}", "", key)  # Hydra's marks for adding a key; here the schema has all keys
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
    annotation = field_type(key)
    section, _, _ = key.rpartition(".")
    if section and is_map(field_type(section)):
        return Override(key, None, removes=True)
    if is_map(annotation):
        return Override(key, {})
    if strip_optional(annotation) is not annotation:
        return Override(key, None)
    raise InputError(
        f"override {shown(text)}: {key} takes {type_name(annotation)} and is not removed. Leave it out for the value of the "
        f"config, or set another; {_FORM}"
    )


def is_map(annotation: Any) -> bool:
    """Whether a type is that of a field with named entries, such as evaluate.reference."""
    return get_origin(strip_optional(annotation)) is dict


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


def _read(text: str, annotation: Any, key: str) -> Any:
    """The value of a text for a field of type `annotation`; `key` is its name in errors.

    A value of the wrong type (a word for a number) is returned as text, for the check against the schema to refuse. Raises
    InputError for an empty text, for several values of a sweep, and for a list or section that cannot be split.
    """
    plain = strip_optional(annotation)
    if annotation is Any:
        return _read_any(text, key)
    if _NULL.fullmatch(text.strip()) and (plain is not annotation or is_map(annotation) or is_entry(key)):
        return None
    if not text.strip():
        raise InputError(
            f"{key}= is empty: it takes {type_name(annotation)}. Leave it out to keep the value of the config"
        )
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
        # Without braces: one path in place of named ones is allowed; a text in place of a section is refused by the schema.
        return _read_text(text, key) if inner is None else _read_entries(inner, plain, key)
    return _read_scalar(text, key)


def is_entry(key: str) -> bool:
    """Whether a key names an entry of a field with named entries."""
    section, _, _ = key.rpartition(".")
    return "[" not in key and section != "" and is_map(field_type(section))


def _read_any(text: str, key: str) -> Any:
    """The value of a text for a field without a type (a setting of a loss term): None, a list, a number, a boolean or text."""
    if _NULL.fullmatch(text.strip()):
        return None
    if not text.strip():
        raise InputError(f"{key}= is empty: it takes a value. Leave it out to keep the one of the config")
    if (inner := _inner(text, "[]")) is not None:
        return [_read_any(item, f"{key}[{i}]") for i, item in enumerate(split(inner, key))]
    value = _read_scalar(text, key)
    return _read_text(text, key) if isinstance(value, str) else value


def _read_entries(text: str, annotation: Any, key: str) -> dict[str, Any]:
    """The values by name of the text `name: value, name: value`, for a section or a field with named entries."""
    values = {}
    for entry in split(text, key):
        name, colon, value = entry.partition(":")
        name = _unquoted(name.strip())
        if not colon:
            raise InputError(f"{key}: {shown(entry)} has no value. The form is {key}={{name: value, name: value}}")
        inner = f"{key}.{name}"
        values[name] = _read(value.strip(), entry_type(annotation, name, key), inner)
    return values


def _read_text(text: str, key: str) -> str:
    """The text as typed, without quotes around the whole of it, as in Hydra's grammar."""
    if len(text) > LONGEST_TEXT:
        raise InputError(f"{key} is a text of {len(text)} characters. A name or path has at most {LONGEST_TEXT}")
    if not text.isprintable():
        raise InputError(
            f"{key}={shown(text)} has control characters, or bytes that are not UTF-8. Rename the file, or link to it"
        )
    if text == "???":
        raise InputError(f"{key}=??? marks a value that is not set. Write another text")
    if _SWEEP.fullmatch(text):
        raise InputError(f"{_sweep(key, text)}; to set this text itself, write {quoted(key, text)}")
    if resolver := _RESOLVER.search(text):
        raise InputError(
            f"{key}={text}: resolvers such as {resolver[1]} do not work on the command line. For environment variables use the "
            f'shell, "{key}=...$NAME...", and for keys of the config {key}=...${{run.name}}...'
        )
    return _unquoted(text)


def _unquoted(text: str) -> str:
    if _QUOTED.fullmatch(text):
        inner = text[1:-1]
        # Backslashes escape only before a quote, as in Hydra's grammar.
        return re.sub(rf"(\\+)({text[0]}|$)", lambda match: "\\" * (len(match[1]) // 2) + match[2], inner)
    return text


def _read_scalar(text: str, key: str) -> Any:
    """The number or boolean that Hydra's grammar reads; the text itself where it reads neither."""
    if len(text) > _LONGEST_NUMBER:
        raise InputError(f"{key} is a number of {len(text)} characters. A number has at most {_LONGEST_NUMBER}")
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
    """The parts of a text between its separators; those inside brackets or quotes do not count.

    Raises InputError for an empty part and for an unclosed quote.
    """
    if not text.strip():
        return []
    parts, start, depth, quote = [], 0, 0, ""
    for position, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and text[position - 1] != "\\" else quote
        elif letter in "'\"" and (text[start:position].rstrip() or ":").endswith(":"):
            quote = letter  # a quote inside a word is an ordinary character
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == separator and depth <= 0:
            parts.append(text[start:position])
            start = position + 1
    parts = [part.strip() for part in [*parts, text[start:]]]
    if quote or not all(parts):
        fault = "a quote is not closed" if quote else "a value is missing between commas"
        raise InputError(f"{key}={shown(text)}: {fault}. Lists have the form {key}=[VALUE,VALUE]")
    return parts


def combinations(sweeps: Sequence[str], option: str) -> list[list[str]]:
    """The overrides of every combination of swept values (`section.field=VALUE,VALUE,...` each); the last field varies fastest.

    option: the name of the option that takes sweeps, for errors. Raises InputError for a sweep of another form.
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
    """The text inside the brackets around the whole of a text; None without such brackets."""
    text = text.strip()
    return text[1:-1] if text.startswith(brackets[0]) and text.endswith(brackets[1]) and len(text) > 1 else None


def _sweep(key: str, value: str) -> InputError:
    return InputError(
        f"{key}={shown(value)} has several values, as in a sweep, but one run takes one value. Start one run for each, "
        "or describe them as a study (docs/studies.md)"
    )


def quoted(key: str, value: str) -> str:
    """The override, quoted for the shell, that sets a field to a text which would mean something else without quotes."""
    return shlex.quote(f"{key}={in_quotes(value)}")


def in_quotes(text: str) -> str:
    """The text in quotes, as an override's value that is taken literally."""
    return "'" + re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


def shown(text: str) -> str:
    """The text as error messages show it: printable, on one line, and shortened beyond 300 characters."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 300 else f"{text[:200]}... ({len(text)} characters)"


def field_type(key: str) -> Any:
    """The type of a field or section by its dotted name. Raises InputError for an unknown name."""
    annotation: Any = ExperimentConfig
    parts: list[str] = []
    for part in key.split("."):
        annotation = entry_type(strip_optional(annotation), part, ".".join(parts), key)
        parts.append(part)
    return annotation


def entry_type(annotation: Any, name: str, section: str, key: str = "") -> Any:
    """The type of one field of a section, or of one entry of a field with named entries.

    key: the whole key that it is a part of. Raises InputError for a name that the section does not have, and names the new
    one for a renamed field.
    """
    wrong = shown(f"{section}.{name}" if section else name)
    if get_origin(annotation) is dict:
        if not _NAME.fullmatch(name) or not name.isprintable():
            raise InputError(f"{wrong}: a name has no spaces, dots, colons or brackets. Use {section}.NAME=VALUE")
        return get_args(annotation)[1]
    if not (isinstance(annotation, type) and dataclasses.is_dataclass(annotation)):
        section = shown(section)
        raise InputError(f"{wrong}: {section} is a single value and has no field {shown(name)}. Use {section}=VALUE")
    fields = hints(annotation)
    if name not in fields:
        if refusal := refusal_of_key(wrong):
            raise InputError(refusal)
        known = [f"{section}.{one}" if section else one for one in fields]
        ours = our_name(key or wrong)
        meant = f"; did you mean {ours}?" if ours and ours != wrong else suggest(wrong, known)
        raise InputError(f"{wrong} is not a config key{meant}. Known here: {', '.join(known)}")
    return fields[name]


def strip_optional(annotation: Any) -> Any:
    """The type of a field without its None."""
    options = [arg for arg in get_args(annotation) if arg is not type(None)]
    return options[0] if type(None) in get_args(annotation) and len(options) == 1 else annotation


def type_name(annotation: Any) -> str:
    """The type of a field, or of an element of a list field, in words for messages."""
    plain = strip_optional(annotation)
    if get_origin(plain) is list:
        many = {int: "whole numbers", float: "numbers", str: "texts"}
        text = f"a list of {many[get_args(plain)[0]]}"
    else:
        words: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        words[bool | str] = "true, false or auto"
        text = words.get(plain, "a section")
    return text if plain is annotation else f"{text} or null"
