"""The reference of all config fields, as Markdown: python -m rear_scale.config.reference > configs/README.md"""

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

A config is one of the files here (`--config rear_l.yaml`) or a file of your own, whose `defaults` list names what it builds on.
Every field is set in a file or on the command line, as `optim.lr=2e-4`. Some sections have files to choose from, as
`strategy=zero3`. Relative paths are relative to the current directory.

The column *resume* says whether a field may have another value when a run is resumed: **yes**, or **no** (it would change the
run; `resume.allow=[FIELD]` allows it). **weights**: as no, and with `--checkpoint` the checkpoint's value counts and no other,
because its weights are for that one.
"""


def text() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *(line for name in _sections() for line in _section(name))])


def _sections() -> list[str]:
    return [field.name for field in dataclasses.fields(ExperimentConfig)]


def _section(section: str) -> Iterator[str]:
    yield f"## {section}\n"
    known = {name: own for name, own in declarations(ExperimentConfig).items() if name.startswith(f"{section}.")}
    inner = {name: strip_optional(field_type(name)) for name in (section, *known)}
    sections = {name: kind for name, kind in inner.items() if dataclasses.is_dataclass(kind)}
    if is_group(section):
        files = ", ".join(f"`{path.stem}`" for path in sorted((CONFIG_DIR / section).glob("*.yaml")))
        yield f"Files: `{section}=` {files}.\n"
    for name, kind in sections.items():
        if paragraph := _docstring(kind):
            yield f"{'' if name == section else f'`{name}`: '}{paragraph}\n"
    yield "| field | type | default | values | resume | meaning |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, own in known.items():
        if name not in sections or own.doc:
            yield _row(name, own, is_section=name in sections)
    yield ""


def _row(name: str, own: Declaration, *, is_section: bool) -> str:
    kind = field_type(name)
    plain = strip_optional(kind)
    named = {str: "texts by name"}.get(get_args(plain)[-1], "sections by name") if get_origin(plain) is dict else None
    words = "section or null" if is_section else named or type_name(kind)
    changes = "weights" if own.by_weights else "yes" if own.may_change else "no"
    cells = [f"`{name}`", words.removeprefix("a "), _default(name), _values(own), changes, own.doc]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(name: str) -> str:
    """The default of a field as YAML has it; of a section that is absent by default, its fields' own."""
    *path, last = name.split(".")
    kind: Any = strip_optional(field_type(".".join(path))) if path else ExperimentConfig
    (field,) = [field for field in dataclasses.fields(kind) if field.name == last]
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


def _docstring(kind: type) -> str:
    """What a section's dataclass says of itself, on one line; empty where it has only the signature that dataclasses give it."""
    found = inspect.cleandoc(kind.__doc__ or "")
    return "" if found.startswith(f"{kind.__name__}(") else " ".join(found.split())


if __name__ == "__main__":
    print(text(), end="")
