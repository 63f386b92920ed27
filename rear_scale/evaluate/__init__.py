"""Images -> scores. The package can be called: rear_scale.evaluate(...) is the function of that name in rear_scale/api.py."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    # Python binds an imported package to its name in the parent, where rear_scale.evaluate is also the library's function:
    # the call has to work before and after that.
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        # By name: api.py stands behind this package in the import order.
        return import_module("rear_scale.api").evaluate(*arguments, **named)


sys.modules[__name__].__class__ = _Callable
