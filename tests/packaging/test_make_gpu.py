"""`make gpu`, step by step, with stand-ins for Python and the sanitizer: no GPU, nothing built."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

STEPS = "gpu-build gpu-test-cuda gpu-test-triton gpu-test-rest sanitize-gpu gpu-bench".split()
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def stand_in(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def make(folder: Path, *, fails: str = "", say: str = "") -> tuple[int, str, list[str]]:
    """Status, output and the commands of `make gpu` in a folder with nothing but the Makefile.

    fails : a pattern (of bash) of commands that exit with 1; say : what Python prints.
    """
    shutil.copy(ROOT / "Makefile", folder)
    log = folder / "commands"
    judge = f'[[ -n "{fails}" && "$*" == {fails or "x"} ]] && exit 1\necho "{say}"; exit 0'
    python = stand_in(folder / "python", f'echo "$*" >> {log}\n{judge}')
    sanitizer = stand_in(folder / "sanitizer", f'echo "sanitizer $*" >> {log}\n{judge}')
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FASTPROJ", "MAKE"))}
    done = subprocess.run(
        ["make", "gpu", "VENV=", f"PYTHON={python}", f"SANITIZER={sanitizer}"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    commands = log.read_text().splitlines() if log.exists() else []
    return done.returncode, done.stdout, commands


def test_every_step_runs_and_nothing_is_installed(tmp_path: Path) -> None:
    status, output, commands = make(tmp_path, say="90")
    assert status == 0, output
    assert [line for line in output.splitlines() if "passed after" in line] == [
        line for line in output.splitlines() if line.startswith("==") and " after " in line
    ]
    assert [s for s in STEPS if f"== {s} passed" in output] == STEPS
    assert "make gpu: everything passed" in output
    text = "\n".join(commands)
    assert "pip" not in text
    assert "-m venv" not in text
    assert "setup.py -q build --build-base build/gpu --build-lib build/gpu/lib" in text
    pytests = [line for line in commands if "-m pytest" in line]
    assert all("-m gpu" in line for line in pytests)
    tools = [line.split()[2] for line in commands if line.startswith("sanitizer")]
    assert tools == ["memcheck", "racecheck", "synccheck"]
    assert all("--error-exitcode" in line for line in commands if line.startswith("sanitizer"))
    assert [line for line in commands if "-m bench.project --device cuda" in line][1:] == [
        "-m bench.project --device cuda --ladder --repeats 5 --max-seconds 1"
    ]
    for step in STEPS:
        assert (tmp_path / "build" / "gpu" / "logs" / f"{step}.log").is_file()


@pytest.mark.parametrize(
    ("fails", "step"),
    [
        ("*setup.py*", "gpu-build"),
        ("*tests/kernels", "gpu-test-triton"),
        ("*racecheck*", "sanitize-gpu"),
        ("*--ladder*", "gpu-bench"),
    ],
)
def test_a_step_that_fails_is_named_and_the_later_ones_run(
    tmp_path: Path, fails: str, step: str
) -> None:
    status, output, commands = make(tmp_path, fails=fails, say="90")
    assert status != 0
    assert f"== {step} FAILED" in output
    assert f"make gpu: failed: {step}\n" in output
    assert sum(f"== {other} passed" in output for other in STEPS) == len(STEPS) - 1
    assert any("--ladder" in line for line in commands)


def test_what_the_tests_import_is_what_the_first_step_asks_for() -> None:
    """A module that fails to import costs its whole step where nothing else is installed."""
    makefile = (ROOT / "Makefile").read_text()
    asked_for = re.search(r'missing = \[n for n in "([^"]+)"\.split\(\)', makefile)
    assert asked_for is not None
    here = {path.stem for path in ROOT.glob("*.py")} | {"bench", "fastproj", "tests"}
    known = {*asked_for[1].split(), *here, *sys.stdlib_module_names}
    foreign = {
        f"{path.relative_to(ROOT)}: {name}"
        for folder in ("tests", "bench")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.parse(path.read_text()).body
        for name in imported(node)
        if name not in known and "kernels" not in path.parts  # those test triton itself
    }
    assert not foreign


def imported(node: ast.stmt) -> list[str]:
    """The top-level packages that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module.partition(".")[0]]
    return []


def test_without_a_gpu_nothing_starts(tmp_path: Path) -> None:
    status, output, commands = make(tmp_path, fails="*is_available*")
    assert status != 0
    assert not [line for line in commands if "setup.py" in line or "-m pytest" in line]
    assert "== gpu-build" not in output
