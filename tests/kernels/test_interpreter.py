"""Every kernel in Triton's interpreter, on CPU tensors.

Triton decides at import whether it interprets, so the cases run in processes of their own: two, for
two cores. A case that fails shows in the output of the process.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CASES = [str(Path(__file__).parent / name) for name in ("cases.py", "cases_sjlt.py")]
GROUPS = {
    "rademacher": "not gaussian and not sjlt",
    "gaussian and sjlt": "gaussian or sjlt",
}


def start(selection: str, marks: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    environment.pop("FASTPROJ_BACKEND", None)
    environment.pop("FASTPROJ_TRITON_CONFIG", None)
    return subprocess.Popen(
        [*command, *CASES, "-k", selection],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def check(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate()
    passed = re.search(r"(\d+) passed", output)
    assert process.returncode == 0, output
    assert passed is not None, output
    print(output.splitlines()[-1])


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    running = {name: start(selection, "not slow") for name, selection in GROUPS.items()}
    yield running
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", ["cases", "cases_sjlt"])
def test_a_gpu_gets_every_case(name: str) -> None:
    """test_gpu.py imports all names of both files: an __all__ would hide their tests."""
    module = importlib.import_module(f"tests.kernels.{name}")
    written = {each for each in vars(module) if each.startswith("test_")}
    imported: dict[str, object] = {}
    exec(f"from tests.kernels.{name} import *", imported)
    assert written
    assert written <= imported.keys()


@pytest.mark.parametrize("name", GROUPS)
def test_interpreted_cases(name: str, processes: dict[str, subprocess.Popen[str]]) -> None:
    check(processes[name])


@pytest.mark.slow
def test_interpreted_slow_cases() -> None:
    check(start("", "slow"))
