"""The Python code of docs/extending.md, for the tests that run it."""

from __future__ import annotations

import re
import sys
from types import ModuleType

from helpers import ROOT

PAGE = ROOT / "docs/extending.md"


def snippets(heading: str) -> list[str]:
    """The Python blocks below a heading (`# Extending`, `## A metric`), in their order."""
    section = PAGE.read_text().split(f"{heading}\n", 1)[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def module_of(heading: str, number: int = 0) -> ModuleType:
    """A snippet as the module that it would be in a file of its own. The caller undoes what it registers."""
    [code] = snippets(heading)[number : number + 1]
    module = ModuleType(f"snippet_{re.sub(r'[^a-z]', '_', heading.lower())}_{number}")
    sys.modules[module.__name__] = module  # dataclasses look there for their module
    exec(compile(code, f"{PAGE.name}: {heading}", "exec"), vars(module))
    return module
