"""Replacing a package's functions and classes in place, and putting them back."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any


def needed(function: str, module: str, package: str) -> ModuleType:
    """``module``, which ``function`` works on.

    Raises
    ------
    ImportError
        Where it isn't installed, with the name of its package.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{function}: received {error!r} from `import {module}`; expected the package "
            f"{package} (pip install {package})"
        ) from error


def takes(function: str, theirs: Callable[..., Any], parameter: str, wanted: str) -> None:
    """Raise ImportError unless a function that ``function`` replaces has ``parameter``.

    Versions without it call it the same way and mean something else, such as no scale.
    """
    if parameter not in inspect.signature(theirs).parameters:
        raise ImportError(
            f"{function}: received a {theirs.__name__} without {parameter}; expected a newer "
            f"version (pip install '{wanted}')"
        )


class Patch:
    """Objects to be replaced by others wherever loaded modules hold them.

    A module holds an object as a global, or as a value of a global dict (a registry of classes).
    Objects in closures, default arguments or instances are not replaced. ``undo`` restores the
    places that ``apply`` changed. Modules imported in between keep what they took.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    @property
    def active(self) -> bool:
        return bool(self._undo)

    def apply(self, replacements: list[tuple[Any, Any]]) -> None:
        """Put the second of each pair in place of the first, in all modules but fastproj's."""
        new_by_id = {id(old): new for old, new in replacements}
        for name, module in list(sys.modules.items()):
            try:
                values = object.__getattribute__(module, "__dict__")  # loads no lazy module
            except AttributeError:
                continue
            if not isinstance(values, dict) or name.split(".")[0] == "fastproj":
                continue
            self._replace(values, new_by_id)
            for value in list(values.values()):
                if type(value) is dict and value is not values:
                    self._replace(value, new_by_id)

    def set(self, module: ModuleType, name: str, value: Any) -> None:
        """Give a global of ``module``, where it has it, another value."""
        if name in (values := vars(module)):
            self._undo.append(partial(values.__setitem__, name, values[name]))
            values[name] = value

    def undo(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()

    def _replace(self, values: dict[Any, Any], new_by_id: dict[int, Any]) -> None:
        for key, old in list(values.items()):
            if id(old) in new_by_id:
                values[key] = new_by_id[id(old)]
                self._undo.append(partial(values.__setitem__, key, old))
