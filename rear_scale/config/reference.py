"""The reference of all config fields in Markdown: python -m rear_scale.config.reference > configs/README.md"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from rear_scale.config.fields import Declaration, declarations
from rear_scale.config.overrides import CONFIG_DIR, field_type, is_group, strip_optional, type_name
from rear_scale.config.schema import ExperimentConfig

_HEAD = """# Fields of a config

`python -m rear_scale.config.reference > configs/README.md` writes this page from `rear_scale/config/schema.py`; do not edit it.

A config is one of the files here (`--config rear_l.yaml`) or a file of your own, whose `defaults` list names the files
that it is based on. Every field can be set in a file or on the command line, as in `optim.lr=2e-4`. Some sections have files to
choose from, as in `strategy=zero3`. Relative paths are relative to the current directory.

The column *resume* tells whether a resumed run may have another value of the field: **yes**, or **no** (it would change the
run; `resume.allow=[FIELD]` allows it all the same). **weights** is as no, and with `--checkpoint` the value is always the
checkpoint's, because its weights were trained for it.
"""


def text() -> str:
    """The whole page as text."""
    return "\n".join([_HEAD, *(line for name in _sections() for line in _section(name))])


def _sections() -> list[str]:
    return [field.name for field in dataclasses.fields(ExperimentConfig)]


def _section(section: str) -> Iterator[str]:
    yield f"## {section}\n"
    known = {name: own for name, own in declarations(ExperimentConfig).items() if name.startswith(f"{section}.")}
    inner = {name: strip_optional(field_type(name)) for name in (section, *known)}
    sections = {
        name: annotation
        for name, annotation in inner.items()
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    }
    if is_group(section):
        files = ", ".join(f"`{path.stem}`" for path in sorted((CONFIG_DIR / section).glob("*.yaml")))
        yield f"Files: `{section}=` {files}.\n"
    for name, config_class in sections.items():
        if paragraph := _docstring(config_class):
            yield f"{'' if name == section else f'`{name}`: '}{paragraph}\n"
    yield "| field | type | default | values | resume | meaning |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, own in known.items():
        if name not in sections or own.doc:
            yield _row(name, own, is_section=name in sections)
    yield ""


def _row(name: str, own: Declaration, *, is_section: bool) -> str:
    annotation = field_type(name)
    plain = strip_optional(annotation)
    named = {str: "texts by name"}.get(get_args(plain)[-1], "sections by name") if get_origin(plain) is dict else None
    words = "section or null" if is_section else named or type_name(annotation)
    changes = "weights" if own.by_weights else "yes" if own.may_change else "no"
    cells = [f"`{name}`", words.removeprefix("a "), _default(name), _values(own), changes, own.doc]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(name: str) -> str:
    """The default of a field as YAML shows it, also of a field whose section is absent by default."""
    *path, last = name.split(".")
    config_class: Any = strip_optional(field_type(".".join(path))) if path else ExperimentConfig
    (field,) = [field for field in dataclasses.fields(config_class) if field.name == last]
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "must be set" if value == "???" else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_yaml(one) for one in value)}]"
    names = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else str(value)


def _values(own: Declaration) -> str:
    choices = [f"`{_yaml(value)}`" + (f": {meaning}" if meaning else "") for value, meaning in own.choices.items()]
    listed = ("; " if any(own.choices.values()) else ", ").join(choices)
    return ", ".join([*([listed] if listed else []), *(rule.short for rule in own.rules)])


def _docstring(config_class: type) -> str:
    """The docstring of a section's dataclass on one line; empty where it has only the signature that dataclasses generate."""
    docstring = inspect.cleandoc(config_class.__doc__ or "")
    return "" if docstring.startswith(f"{config_class.__name__}(") else " ".join(docstring.split())


if __name__ == "__main__":
    print(text(), end="")
