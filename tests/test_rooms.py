"""The house: what may import what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests import ROOT


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(room: str) -> set[str]:
    """The folders and files of fastproj, kernels and bench, other than the room, that import it."""
    found = set()
    for folder in ("fastproj", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            place = path.relative_to(ROOT)
            mine = ".".join(place.parts).startswith(f"{room}.")
            if not mine and any(f"{name}.".startswith(f"{room}.") for name in imported(path)):
                found.add(place.as_posix())
    return found


def test_the_library_needs_no_command() -> None:
    assert importers("fastproj.commands.demo") == set()
    outside = {path for path in importers("fastproj.commands") if not path.startswith("bench/")}
    assert outside == {"fastproj/cli.py"}


def test_the_library_needs_no_testbed() -> None:
    assert importers("fastproj.testbed") == {"fastproj/commands/demo.py", "bench/problems.py"}
