"""The house: what may import what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
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


def test_the_package_is_imported_at_its_first_use() -> None:
    """torch takes a second; then all that was there at once before is there."""
    program = (
        "import sys, fastproj, fastproj.cli\n"
        "assert 'torch' not in sys.modules\n"
        "fastproj.backends.registry.NAMES, fastproj.spec.KINDS\n"
        "[getattr(fastproj, name) for name in fastproj._MODULES]\n"
        "import torch\n"
        "assert torch.ops.fastproj.project and 'fastproj.trak' not in sys.modules\n"
        "assert not hasattr(fastproj, 'nothing')\n"
        "from fastproj import *\n"
        "assert TRAKer is fastproj.TRAKer and project is fastproj.project\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_packages_come_when_they_are_named() -> None:
    program = (
        "import sys, fastproj\n"
        "assert fastproj.Projector and 'fastproj.trak' not in sys.modules\n"
        "assert fastproj.trak.Fisher and fastproj.compat.trak.CudaProjector\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_library_needs_no_testbed() -> None:
    outside = {path for path in importers("fastproj.testbed") if not path.startswith("bench/")}
    assert outside == {"fastproj/commands/demo.py"}


# A file or folder of fastproj imports from floors below its own. `kernels/` is installed here too.
HOUSE = (
    {"gauss_table", "memory", "namesake"},
    {"spec"},
    {"call"},
    {"kernels"},
    {"backends"},
    {"checks"},
    {"torch_ops"},
    {"ops"},
    {"projector"},
    {"factored"},
    {"compat", "trak"},
    {"testbed"},
    {"commands"},
    {"cli"},
    {"__main__"},
)

# And one of fastproj/trak.
FLOORS = (
    {"batches", "callers", "files", "precision", "progress", "sharded", "threads"},
    {"attributes", "distributed", "fingerprints", "inputs"},
    {"draws"},
    {"store", "tasks"},
    {"checkpoints", "evaluation", "gradients", "loaded", "solving"},
    {"curvature", "saver"},
    {"featurizer", "mixing", "readiness"},
    {"immediate", "passes"},
    {"estimator"},
    {"hf"},
)


def upward(package: str, floors: tuple[set[str], ...], folders: dict[str, Path]) -> set[str]:
    """The imports between rooms of a package that don't go down.

    folders : by what the names of their files begin with.
    """
    floor = {room: number for number, rooms in enumerate(floors) for room in rooms}
    files = {
        f"{prefix}{path.relative_to(folder).with_suffix('').as_posix()}": path
        for prefix, folder in folders.items()
        for path in folder.rglob("*.py")
    }
    apart = {"__init__", "_build_info"}  # what a package shows; what its build wrote
    rooms = {name: name.split("/")[0] for name in files if name not in apart}
    assert set(rooms.values()) == set(floor)
    wrong = set()
    for name, room in rooms.items():
        used = {
            other.removeprefix(f"{package}.").split(".")[0]
            for other in imported(files[name])
            if other.startswith(f"{package}.")
        }
        wrong |= {
            f"{room} -> {other}"
            for other in (used & set(floor)) - {room}
            if floor[other] >= floor[room]
        }
    return wrong


def test_no_room_of_the_house_imports_from_its_floor_or_above() -> None:
    folders = {"": ROOT / "fastproj", "kernels/": ROOT / "kernels"}
    assert upward("fastproj", HOUSE, folders) == set()


def test_no_room_of_trak_imports_from_its_floor_or_above() -> None:
    assert upward("fastproj.trak", FLOORS, {"": ROOT / "fastproj" / "trak"}) == set()


def test_the_page_on_architecture_names_the_floors_of_trak() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    said = page.split("From the ground up they are: ")[1].split(".")[0]
    assert tuple(set(re.findall(r"`(\w+)`", floor)) for floor in said.split(";")) == FLOORS


def test_nobody_reaches_into_the_store() -> None:
    """Its names with an underscore are its own."""
    for path in (ROOT / "fastproj" / "trak").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
                assert owner not in ("saver", "store", "systems"), f"{path}: {owner}.{node.attr}"
