"""The CPU kernels for machines other than this one: compiled by clang, and run under qemu.

`zig c++` (the package ziglang) is a clang that brings the headers and libraries of other systems.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import build_native
from tests import ROOT

pytestmark = pytest.mark.slow

TARGETS = {
    "aarch64-linux-gnu.2.17": {"portable", "neon"},
    "aarch64-macos": {"portable", "neon"},
    "x86_64-macos": {"portable", "avx2", "avx512", "amx"},
}


def clang(target: str) -> list[str]:
    """clang for a target."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("no clang for other systems here: pip install ziglang")
    return [sys.executable, "-m", "ziglang", "c++", "-target", target]


def cross_built(target: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`fastproj._cpu` for another system, with the headers of this Python."""
    monkeypatch.setenv("CXX", shlex.join(clang(target)))
    monkeypatch.setenv("LDFLAGS", "-Wl,-s")
    monkeypatch.setenv("FASTPROJ_CPU", "1")
    monkeypatch.delenv(build_native.KERNEL_CXX, raising=False)
    if target.endswith("macos"):
        # Not -bundle, as on a Mac: zig 0.17's linker crashes on it.
        flags = ["-shared", "-undefined", "dynamic_lookup"]
        monkeypatch.setattr(build_native, "shared_flags", lambda: flags)
    module = build_native.cpu_module("0")
    assert isinstance(module, build_native.Module)
    isas = module.info["isas"]
    assert isinstance(isas, list)
    assert set(isas) == TARGETS[target]
    tag = f"cpython-{sys.version_info[0]}{sys.version_info[1]}"
    output = folder / "fastproj" / f"_cpu.{tag}-aarch64-linux-gnu.so"
    build_native.build_module(module, folder / "objects", output)
    return output


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_warnings(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXXFLAGS", "-Werror")
    assert cross_built(target, tmp_path, monkeypatch).stat().st_size > 100_000


def test_answers_on_arm64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ARM64 Python with torch, as docs/install.md makes one, is asked the known answers."""
    python = shlex.split(os.environ.get("ARM64_PYTHON", ""))
    if not python:
        pytest.skip("set ARM64_PYTHON to a command that runs an ARM64 Python with torch")
    cross_built("aarch64-linux-gnu.2.17", tmp_path, monkeypatch)
    for folder in ("fastproj", "kernels"):
        to = tmp_path / "fastproj" / ("kernels" if folder == "kernels" else "")
        shutil.copytree(
            ROOT / folder, to, ignore=shutil.ignore_patterns("*.so"), dirs_exist_ok=True
        )
    script = ROOT / "tests" / "packaging" / "known_answers.py"
    use = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['', 'cpu']; "
    use += f"runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([*python, "-c", use], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
    assert "cpu neon projections: ok" in done.stdout
