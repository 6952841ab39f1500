"""Lazy imports of a package's public names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def attach(package: str, modules: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` of a package whose modules are imported when one of their names is first used.

        __getattr__, __all__ = attach(__name__, {"text": ("ShapesText",), "world": ("ShapesWorld",)})

    Args:
        package: its `__name__`.
        modules: the public names of each module, relative to the package.
    """
    home = {name: module for module, names in modules.items() for name in names}

    def getattr_(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return getattr_, sorted(home)
