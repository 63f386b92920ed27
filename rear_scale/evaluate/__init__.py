"""Evaluation: images -> scores. The package is callable: rear_scale.evaluate(...) calls the function of rear_scale/api.py."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    # Importing this package sets the attribute `evaluate` of rear_scale to this module, in place of the library's function.
    # So the module is callable too, and rear_scale.evaluate(...) works before and after the import.
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        # Imported by name, because api.py comes after this package in the import order.
        return import_module("rear_scale.api").evaluate(*arguments, **named)


sys.modules[__name__].__class__ = _Callable
