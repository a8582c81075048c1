"""Each instruction set of the CPU backend, AMX by emulation where the processor lacks it."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from fastproj.backends import cpu

EMULATOR_SOURCE = Path(__file__).parents[1] / "csrc" / "amx_emulator.cpp"


@pytest.fixture(scope="session")
def amx_emulator(tmp_path_factory) -> ctypes.CDLL:
    """Tile instructions trapped and carried out in software, in this process from here on."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if platform.machine() != "x86_64" or platform.system() != "Linux" or compiler is None:
        pytest.skip("the AMX emulator needs x86-64 Linux and a C++ compiler")
    for needed in (cpu.isas()["avx512"], cpu.isas()["amx"]):
        if "AVX-512" in needed:
            pytest.skip(f"the AMX kernel also uses AVX-512 and its VBMI: {needed}")
    library = tmp_path_factory.mktemp("amx") / "libamx_emulator.so"
    command = [compiler, "-O2", "-std=c++17", "-mfma", "-shared", "-fPIC"]
    subprocess.run([*command, str(EMULATOR_SOURCE), "-o", str(library)], check=True)
    emulator = ctypes.CDLL(str(library))
    assert emulator.install_amx_emulator() == 0
    return emulator


@pytest.fixture(params=["portable", "avx2", "avx512", "amx", "neon"])
def isa(request, monkeypatch) -> str:
    """Calls in the test run on this instruction set."""
    name = request.param
    known = cpu.isas()
    if known[name]:
        if name != "amx" or "no code" in known[name]:
            pytest.skip(f"{name}: {known[name]}")
        request.getfixturevalue("amx_emulator")
        index = list(known).index(name)
        monkeypatch.setattr(cpu, "_isa", lambda: index)
        return name
    monkeypatch.setenv(cpu.ISA_VARIABLE, name)
    return name
