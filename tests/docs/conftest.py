"""What the pages' code changes in this process is undone: other tests follow."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _fast_jl_is_what_it_was() -> Iterator[None]:
    path, before = list(sys.path), sys.modules.get("fast_jl")
    yield
    sys.path[:] = path
    sys.modules.pop("fast_jl", None)
    if before is not None:
        sys.modules["fast_jl"] = before
