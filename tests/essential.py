"""Which values of a parameter `make test` runs, and which are left to `make test-all`."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def essential(values: Iterable[Any], kept: Container[Any]) -> list[Any]:
    """The values, those that aren't kept marked as slow; a tuple has a value for each parameter."""
    return [value if value in kept else slow(value) for value in values]


def slow(value: Any) -> Any:
    """One value of a parameter, or a tuple of several parameters', for `make test-all`."""
    several = value if isinstance(value, tuple) else (value,)
    return pytest.param(*several, marks=pytest.mark.slow)
